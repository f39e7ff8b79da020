"""When the next request goes where: each endpoint's own limit and pauses, and several endpoints as one."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_longalign.endpoint.protocol import EndpointError, GenerationError, RunStopped
from hf_longalign.endpoint.wire import AWAY, CONGESTION, AttemptError


logger = logging.getLogger(__name__)

_DECREASE = 0.7
# Recovery is quick up to here of where it last broke, slow beyond: as TCP CUBIC does, and for the same reason. With a
# plain sawtooth an endpoint would idle a fifth of its slots. Where nothing breaks well past that, it is history.
_NEAR = 0.95
_PAST = 1.1
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0


def backoff(failures: int, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: uniform over [0, min(30, 0.5 * 2^failures)].

    The full range is drawn so that requests which failed together do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    # Bounded before the power is taken: after a night of failures it would be a number of hundreds of digits.
    return rng.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(failures, 10)))


class AdaptiveLimiter:
    """A limit that finds the number of slots an endpoint has: additive increase, multiplicative decrease.

    It starts at `most`: an endpoint that refuses requests charges nothing for them, and one that takes them is busy
    from the first second. A refusal, or a time-out, multiplies the limit by 0.7; of the requests sent before a
    decrease only one counts, since all of them met the same crowd. A reply adds one slot while the limit is away from
    the last one that was too high, and one slot for every full round of replies near it.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if most < 1:
            raise ValueError(f"`max_concurrency` must be at least 1, got {most!r}. Set it to the endpoint's slots.")
        self.most = most
        self.limit = float(most)
        self.in_flight = 0
        self.paused_until = -math.inf
        self._broke_at = math.inf
        self._round = 0
        self._clock = clock

    def room(self) -> int:
        """How many more requests may be sent now."""
        return 0 if self.paused else max(0, int(self.limit) - self.in_flight)

    @property
    def paused(self) -> bool:
        """Whether a pause is under way."""
        return self._clock() < self.paused_until

    def acquire(self) -> int:
        """Take a slot; the ticket goes back with `release`."""
        self.in_flight += 1
        return self._round

    def release(self, ticket: int, *, congested: bool = False, replied: bool = False) -> None:
        """Give a slot back, with what became of its request."""
        full = self.in_flight >= int(self.limit)
        if congested and ticket == self._round:
            self._round += 1
            # What was under way and no more: a limit that was never reached says nothing.
            self._broke_at = min(self.limit, self.in_flight)
            self.limit = max(1.0, self._broke_at * _DECREASE)
        # A reply where slots were free says nothing of how many more the endpoint has.
        elif replied and full:
            near = self._broke_at * _NEAR < self.limit + 1 and self.limit < self._broke_at * _PAST + 1
            self.limit = min(float(self.most), self.limit + (1.0 / self.limit if near else 1.0))
        self.in_flight -= 1

    def pause(self, seconds: float) -> None:
        """Send nothing for so long."""
        self.paused_until = max(self.paused_until, self._clock() + seconds)


@dataclass
class Lane:
    """One endpoint: its name for messages (no login), its client, its limiter, and how it wants to be asked.

    `habits` outlive the lane: see `wire.body_of`.
    """

    name: str
    client: Any
    limiter: AdaptiveLimiter
    habits: set[str] = field(default_factory=set)
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

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[Lane]:
        """Wait for a slot of the lane with most room, and learn from how its request ends: see `AttemptError`."""
        while True:
            if self._stop is not None:
                raise self._stop
            # By free slots, so that a fast endpoint gets as much more as it can take.
            lane = max(self.lanes, key=lambda lane: lane.limiter.room())
            if lane.limiter.room():
                break
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        ticket = lane.limiter.acquire()
        try:
            yield lane
        except AttemptError as error:
            self._failed(lane, ticket, error)
            raise
        except GenerationError:  # an answer, if not the one that was asked for
            self._silent_since = None
            lane.limiter.release(ticket)
            raise
        except BaseException:  # says nothing about the lane
            lane.limiter.release(ticket)
            raise
        else:
            lane.failures = 0
            self._silent_since = None
            lane.limiter.release(ticket, replied=True)
        finally:
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

    def _failed(self, lane: Lane, ticket: int, error: AttemptError) -> None:
        """Send the lane less, or nothing for as long as it asks for."""
        kind = error.fault.kind
        lane.limiter.release(ticket, congested=kind in CONGESTION)
        wait = error.wait or 0.0
        if kind == AWAY and not lane.limiter.paused:  # many requests meet one outage
            lane.failures += 1
            wait = max(wait, backoff(lane.failures, self._rng))
        if wait:
            lane.limiter.pause(wait)
            asyncio.get_running_loop().call_later(wait, self._wake)
        logger.debug("%s: %s, limit %.0f, pause %.1f s", lane.name, kind, lane.limiter.limit, wait)
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        # A server that asks for an hour (a daily quota) is not worth the patience: nobody would be asked meanwhile.
        paused = min(lane.limiter.paused_until for lane in self.lanes) - now
        if error.wait and paused > self._patience:
            self.stop(EndpointError(f"{lane.name} asks to wait {paused:.0f} s. Run again later to continue."))
        elif now - self._silent_since > self._patience:
            last = f"{lane.name}, {error}"
            message = f"No endpoint has answered for {self._patience:.0f} s (last: {last}). Run again when it is back."
            self.stop(EndpointError(message))

    def _wake(self) -> None:
        """Let as many of those who wait try again as there are slots."""
        room = sum(lane.limiter.room() for lane in self.lanes)
        while room > 0 and self._waiting:
            # One that was cancelled meanwhile is done and takes no slot.
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1
