"""The Batch API: requests sent as a file, answered within a day at half the price, or at once by `vllm run-batch`."""

import asyncio
import json
import logging
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_longalign.endpoint.address import recorded_name
from hf_longalign.endpoint.batch_places import BatchRefusedError, CommandBatches, HostedBatches, Result
from hf_longalign.endpoint.protocol import (
    EndpointError,
    Fault,
    GenerationError,
    NoReplyError,
    Notify,
    Reply,
    Request,
    RunStopped,
    ignore,
    settle,
)
from hf_longalign.endpoint.wire import AttemptError, Refusal, body_of, habit_for, most, read_reply, read_status


logger = logging.getLogger(__name__)

# What hosted batches hold at most is 50,000 requests and 200 MB (https://platform.openai.com/docs/guides/batch).
MAX_BYTES = 150 * 2**20


@dataclass(frozen=True)
class OpenBatch:
    """A batch whose replies are not all in the journal yet.

    `tag` is its name here, given before anything is sent; `name` that at `place`, `None` where nobody learned it.
    """

    tag: str
    name: str | None
    place: str
    requests: tuple[Request, ...]


class Ledger(Protocol):
    """What remembers open batches and takes their replies: the journal of a run."""

    def open_batch(self, tag: str, place: str, requests: Sequence[Request]) -> None:
        """Note, on disk, that these requests are about to be sent; their claims pass from the process to the batch."""

    def name_batch(self, tag: str, name: str) -> None:
        """Note what the other side calls it."""

    def open_batches(self) -> list[OpenBatch]:
        """Every open batch but those that a live process is sending this moment."""

    def leave_batch(self, tag: str) -> None:
        """This process no longer follows it: whoever comes next may."""

    def store(self, request: Request, reply: Reply, price_share: float) -> Reply:
        """Put a reply on disk at this share of the price; the first one to a request stays and is returned."""

    def close_batch(self, tag: str, again: Sequence[Request] = ()) -> None:
        """Forget it. The claims of what is asked `again` pass back to the process, the others end."""


@dataclass
class BatchGenerator:
    """Asks in batches, round by round: what one round could not use is asked again in the next.

    A batch and what it asks stand in the journal before anything is sent, so a run that is killed at any moment
    collects it when it is started again, and pays for nothing twice.

    Parameters:
        served_model: the name the other side serves.
        batches: `HostedBatches` or `CommandBatches`.
        concurrency: the most requests in one batch.
        linger: seconds without another request after which a batch is sent.
        max_rounds: how often one request is sent.
        accept_models: other names under which the model may answer.

    Example (no request is sent):

    >>> from hf_longalign.endpoint import HostedBatches
    >>> generator = BatchGenerator("gpt-4o-mini", HostedBatches("https://api.openai.com/v1"))
    >>> generator.model, generator.concurrency
    ('gpt-4o-mini', 10000)
    """

    served_model: str
    batches: HostedBatches | CommandBatches
    concurrency: int = 10_000
    linger: float = 5.0
    max_rounds: int = 4
    accept_models: Sequence[str] = ()
    model: str = field(init=False)

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}. Leave it out.")
        self.model = recorded_name(self.served_model)
        self._accepted = (self.served_model, self.model, *self.accept_models)
        self._ledger: Ledger | None = None
        self._habits: set[str] = set()
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._gatherer: asyncio.Task[None] | None = None
        self._stopped = False

    def bind(self, ledger: Ledger) -> None:
        """Use this ledger from now on."""
        self._ledger, self._stopped = ledger, False

    async def check(self) -> None:
        """Look whether batches can be sent, and collect those that earlier runs left open."""
        await self.batches.check()
        left = [batch for batch in self._its_ledger.open_batches() if batch.place in self.places]
        await asyncio.gather(*(self._collect(batch) for batch in left))

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """Return the reply, out of as many batches as it takes. See `Generator.reply`."""
        sent = 0
        while True:
            try:
                if self._stopped:
                    raise RunStopped("The run is stopping.")
                future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
                self._waiting.append((request, future))
                if self._gatherer is None or self._gatherer.done():
                    self._gatherer = asyncio.create_task(self._gather())
                return await future
            except AttemptError as error:
                sent += 1
                if sent >= self.max_rounds and error.reply is not None:
                    return error.reply
                await notify(error.fault)
                if sent >= self.max_rounds:
                    raise NoReplyError(
                        error.fault.kind, f"No reply to request {request.key} in {sent} batches, the last: {error}."
                    ) from None
            except Refusal as refusal:
                habit, told = habit_for(refusal, body_of(request, self.served_model)), refusal.told
                if habit == "max_completion_tokens":  # a batch cannot be streamed, which are the other habits
                    self._habits.add(habit)  # it was refused for nothing: not one of its rounds
                    continue
                if refusal.kind in ("key", "quota", "not_found", "option"):
                    what = f"the option `{refusal.option}`" if refusal.option else "every request"
                    raise EndpointError(
                        f"{self.batches.place} refuses {what}. It says: {told}. Set what it names, or leave the "
                        "option out (`null` in the YAML, None in Python)."
                    ) from None
                message = f"{self.batches.place} refuses request {request.key}: {told}"
                raise GenerationError(refusal.kind, message, told) from None

    def drain(self) -> None:
        """Send nothing more and wait for nothing: a batch may take a day, and the next run collects it."""
        self._stopped = True
        for task in (*self._tasks, *filter(None, [self._gatherer])):
            task.cancel()
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            settle(future, RunStopped("The run is stopping."))

    async def close(self) -> None:
        """Free what the other side's client holds; the next request opens it anew."""
        tasks = [*self._tasks, *filter(None, [self._gatherer])]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._gatherer = None
        await self.batches.close()

    @property
    def places(self) -> frozenset[str]:
        """Where its batches are: those of earlier runs are collected in `check`."""
        return frozenset([self.batches.place])

    def price_share(self, request: Request) -> float:
        """Return the share of the list prices that is billed for a request."""
        return self.batches.price_share

    @property
    def _its_ledger(self) -> Ledger:
        if self._ledger is None:
            raise RuntimeError("`bind` must come before the first request, got none. Ask through a run's journal.")
        return self._ledger

    async def _gather(self) -> None:
        """Send what waits whenever no more has come for a while, or a batch is full."""
        while self._waiting:
            number = 0
            while number != len(self._waiting) and len(self._waiting) < self.concurrency:
                number = len(self._waiting)
                await asyncio.sleep(self.linger)
            batch: list[Any] = []
            rest: list[Any] = []
            size = 0
            for request, future in self._waiting:
                size += len(self._line(request))
                fits = len(batch) < self.concurrency and size <= MAX_BYTES
                # Of one route: the other side takes a single one for the whole file.
                same = not batch or batch[0][0].chat == request.chat
                (batch if not batch or (fits and same) else rest).append((request, future))
            self._waiting = rest
            task = asyncio.create_task(self._ask(batch))
            # Kept here: the event loop itself holds tasks weakly, and one could vanish under way.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _line(self, request: Request) -> bytes:
        url = "/v1/chat/completions" if request.chat else "/v1/completions"
        body = body_of(request, self.served_model, self._habits)
        # ASCII: a lone surrogate or a line separator in a prompt must not cut the file.
        return json.dumps({"custom_id": request.key, "method": "POST", "url": url, "body": body}).encode() + b"\n"

    async def _ask(self, waiting: list[tuple[Request, asyncio.Future[Reply]]]) -> None:
        """Send one batch, put what it brings on disk, and answer those who wait for it."""
        tag, requests = uuid.uuid4().hex, [request for request, _ in waiting]
        try:
            self._its_ledger.open_batch(tag, self.batches.place, requests)
            name = await self.batches.send(tag, b"".join(map(self._line, requests)))
            self._its_ledger.name_batch(tag, name)
            logger.info("Sent %d requests as batch %s.", len(requests), name)
            outcomes = self._stored(requests, await self.batches.results(name))
            again = [request for request in requests if isinstance(outcomes[request.key], AttemptError | Refusal)]
            self._its_ledger.close_batch(tag, again)
        except asyncio.CancelledError:
            self._its_ledger.leave_batch(tag)
            for _, future in waiting:
                settle(future, RunStopped("The run is stopping; the next one collects what its batches bring."))
            raise
        except Exception as error:  # noqa: BLE001 - raised where a reply is waited for
            if isinstance(error, BatchRefusedError):
                self._its_ledger.close_batch(tag)
            else:  # perhaps it is under way all the same
                self._its_ledger.leave_batch(tag)
            for _, future in waiting:
                settle(future, error)
            return
        for request, future in waiting:
            settle(future, outcomes[request.key])

    async def _collect(self, batch: OpenBatch) -> None:
        """Take over what a batch of an earlier run brings; what it does not bring is asked again like anything."""
        name = batch.name or await self.batches.find(batch.tag)
        if name is not None:
            logger.info("Collecting %d requests of batch %s from an earlier run.", len(batch.requests), name)
            try:
                self._stored(batch.requests, await self.batches.results(name))
            except BatchRefusedError as refused:
                logger.warning("Batch %s of an earlier run brought nothing: %s", name, refused)
        self._its_ledger.close_batch(batch.tag)

    def _stored(self, requests: Sequence[Request], results: dict[str, Result]) -> dict[str, Any]:
        """By key, the reply once it is on disk, or what went wrong as `AttemptError` or `Refusal`."""
        outcomes: dict[str, Any] = {}
        for request in requests:
            result = results.get(request.key)
            try:
                if result is None:
                    raise AttemptError(most(request, "missing"), "the batch ended without a line for it")
                if not result.status:  # it was never worked on: expired, cancelled
                    raise AttemptError(Fault(result.code or "no_status"))
                if result.status != 200:
                    sent = body_of(request, self.served_model, self._habits)
                    raise read_status(result.status, {}, result.body, sent)
                reply = read_reply(result.body, request, self._accepted)
                outcomes[request.key] = self._its_ledger.store(request, reply, self.batches.price_share)
            except (AttemptError, Refusal) as error:
                outcomes[request.key] = error
        faults = Counter(str(one) for one in outcomes.values() if isinstance(one, AttemptError | Refusal))
        for told, number in faults.most_common(3):
            logger.warning("%d requests of a batch got no reply: %s", number, told)
        return outcomes
