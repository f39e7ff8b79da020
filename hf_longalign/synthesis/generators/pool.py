"""Several endpoints as one: a request takes the next free slot, one that fails is left alone for a while."""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_longalign.synthesis.generators.base import EndpointError, RunStopped
from hf_longalign.synthesis.generators.completions import CONGESTION, AttemptError
from hf_longalign.synthesis.limiter import AdaptiveLimiter
from hf_longalign.synthesis.waiting import backoff


logger = logging.getLogger(__name__)

# The endpoint as a whole is away: no fault of the request.
AWAY = frozenset(("unreachable",))


@dataclass
class Lane:
    """One endpoint: its name for messages (no login), its client and its limiter."""

    name: str
    client: Any
    limiter: AdaptiveLimiter
    failures: int = 0


class Pool:
    """Hands out the slots of its lanes, first come first served, on one event loop.

    `patience` is how long, in seconds, no lane may answer before the run is stopped.
    """

    def __init__(self, lanes: Sequence[Lane], *, patience: float) -> None:
        self.lanes = lanes
        self._patience = patience
        self._silent_since: float | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._stop: RunStopped | None = None
        self._stopped = asyncio.Event()
        self._rng = random.Random()

    async def slot(self) -> tuple[Lane, int]:
        """Wait for a slot of the lane with most room; give it back with `replied`, `failed` or `left`."""
        while True:
            if self._stop is not None:
                raise self._stop
            lane = max(self.lanes, key=lambda lane: lane.limiter.room())
            if lane.limiter.room():
                return lane, lane.limiter.acquire()
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def replied(self, lane: Lane, ticket: int) -> None:
        """The lane answered."""
        lane.failures = 0
        self._silent_since = None
        lane.limiter.release(ticket, replied=True)
        self._wake()

    def failed(self, lane: Lane, ticket: int, error: AttemptError) -> None:
        """The lane did not: send it less, or nothing for as long as it asks for."""
        kind = error.fault.kind
        lane.limiter.release(ticket, congested=kind in CONGESTION)
        wait = error.wait or 0.0
        if kind in AWAY and not lane.limiter.paused:  # many requests meet one outage
            lane.failures += 1
            wait = max(wait, backoff(lane.failures, self._rng))
        if wait:
            lane.limiter.pause(wait)
            asyncio.get_running_loop().call_later(wait, self._wake)
        logger.debug("%s: %s, limit %.0f, pause %.1f s", lane.name, kind, lane.limiter.limit, wait)
        self._give_up_if_hopeless(lane, error)
        self._wake()

    def left(self, lane: Lane, ticket: int) -> None:
        """The request ended without a word about the lane."""
        lane.limiter.release(ticket)
        self._wake()

    async def sleep(self, seconds: float) -> None:
        """Wait, unless the run stops first."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
        if self._stop is not None:
            raise self._stop

    def stop(self, reason: RunStopped) -> None:
        """Hand out no more slots."""
        if self._stop is None:
            self._stop = reason
            self._stopped.set()
            for waiter in self._waiting:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiting.clear()

    def _give_up_if_hopeless(self, lane: Lane, error: AttemptError) -> None:
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        paused = min(lane.limiter.paused_until for lane in self.lanes) - now
        if error.wait and paused > self._patience:
            self.stop(EndpointError(f"{lane.name} asks to wait {paused:.0f} s. Run again later to continue."))
        elif now - self._silent_since > self._patience:
            last = f"{lane.name}, {error.fault.kind}"
            message = f"No endpoint has answered for {self._patience:.0f} s (last: {last}). Run again when it is back."
            self.stop(EndpointError(message))

    def _wake(self) -> None:
        room = sum(lane.limiter.room() for lane in self.lanes)
        while room > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1
