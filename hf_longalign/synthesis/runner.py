"""Drives many jobs at once: each asks through the journal, the generator is kept busy, what is hopeless is stopped."""

import asyncio
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from tqdm.auto import tqdm

from hf_longalign.endpoint.protocol import (
    CONTENT_FILTER,
    Fault,
    GenerationError,
    Generator,
    NoReplyError,
    Reply,
    Request,
    RunStopped,
)
from hf_longalign.synthesis.budget import HOPELESS, Breaker, Budget, Spend
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.tables import Claim, JournalLedger


T = TypeVar("T")
Ask = Callable[[Request], Awaitable[Reply]]
Job = Callable[[Ask], Awaitable[T]]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_LOG_SECONDS = 30.0


class _AnsweredElsewhereError(Exception):
    """Between two attempts, another process got the reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


class Progress:
    """A bar on a terminal, a log line every half minute elsewhere.

    `counts` holds what happened to seeds and requests by name ("done", "rejected", "retried", "asked", "journaled"),
    `faults` the attempts that gave no reply.
    """

    def __init__(self, total: int | None = None, *, name: str = "contexts", show: bool | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.spend = Spend()
        self._name = name
        # Off a terminal a bar would fill a log with thousands of lines.
        self._logged = time.monotonic()
        # disable=None: tqdm hides the bar where stderr is no terminal, and the log lines take over.
        disable = None if show is None else not show
        self._bar = tqdm(total=total, desc=name, unit="seed", smoothing=0.05, disable=disable)
        self._log = show is None and self._bar.disable

    def add(self, spend: Spend) -> None:
        """Add what a reply or a fault has cost."""
        self.spend += spend
        self._refresh()

    def done(self) -> None:
        """One seed has its outcome."""
        self.counts["done"] += 1
        self._bar.update()
        self._refresh()

    def close(self) -> None:
        """Leave the bar as it stands and log the last line."""
        self._bar.close()
        if self._log:
            logger.info("%s", self)

    def __str__(self) -> str:
        total = f"/{self._bar.total}" if self._bar.total else ""
        shown = ", ".join(f"{value} {name}" for name, value in self._shown().items())
        return f"{self._name}: {self.counts['done']}{total} done, {shown}"

    def _shown(self) -> dict[str, str]:
        return {
            "rejected": str(self.counts["rejected"]),
            "retried": str(self.counts["retried"]),
            "faults": str(self.faults.total()),
            "tokens": f"{self.spend.tokens:,}",
            "cost": f"${self.spend.usd:.2f}",
        }

    def _refresh(self) -> None:
        if not self._bar.disable:
            self._bar.set_postfix(self._shown(), refresh=False)
        elif self._log and time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            logger.info("%s", self)


class Runner:
    """Asks each request once, journal first, for as many jobs at a time as keep the generator busy.

    A job is `async def job(ask)`, one for each seed: it awaits `ask(request)` as often as it needs and returns its
    outcome. It may catch `GenerationError`, nothing else, and computes in `await asyncio.to_thread(...)`.
    """

    def __init__(
        self, generator: Generator, journal: Journal, *, budget: Budget | None = None, progress: Progress | None = None
    ) -> None:
        self.journal = journal
        self.budget = budget or Budget()
        self.generator = generator
        # One that asks in batches keeps a ledger of them, and asks at another price: see `BatchGenerator`.
        self._batched: Any = generator if hasattr(generator, "bind") else None
        self.progress = progress or Progress(show=False)
        self._under_way: dict[str, asyncio.Task[Reply]] = {}
        self._begin()

    def _begin(self) -> None:
        self._checked: asyncio.Task[None] | None = None
        self._main: asyncio.Task[Any] | None = None
        self._stop: BaseException | None = None
        self._without_reply: Counter[str] = Counter()
        self._in_a_row = 0
        self._breaker = Breaker()
        self._refused: GenerationError | None = None

    async def ask(self, request: Request) -> Reply:
        """The journal's reply, or the generator's once it is on disk. One key is asked once, however many ask for it.

        Raises `GenerationError` (no usable reply, ever), `NoReplyError` or `RunStopped`.
        """
        reply = self.journal.get(request.key)
        if reply is None:
            task = self._under_way.get(request.key)
            # Between this look and the entry nothing is awaited, so that no second job can ask the same in between.
            if task is None:
                task = self._under_way[request.key] = asyncio.create_task(self._fetch(request))
                # Only while it is under way: afterwards the journal has it, and a fault must not be remembered.
                task.add_done_callback(lambda _: self._under_way.pop(request.key, None))
            # Shielded: a job that is cancelled must not cancel what another one waits for, or what is paid for.
            reply = await asyncio.shield(task)
        else:
            # A reply that an earlier run paid for shows too that the endpoint serves this model.
            self.progress.counts["journaled"] += 1
            self._breaker.replied()
        if reply.finish_reason == CONTENT_FILTER:
            raise GenerationError(CONTENT_FILTER, f"The endpoint's content filter refused request {request.key}.")
        return reply

    def count(self, kind: str, reason: str = "", key: str = "") -> None:
        """Count what became of a seed or a reply; "usable" and "unusable" ones tell whether it is worth going on."""
        self.progress.counts[kind] += 1
        if kind == "usable":
            self._breaker.usable()
        elif kind == "unusable":
            reply = self.journal.get(key)
            self._halt(self._breaker.unusable(reason, key, reply.text if reply else ""))

    def run(self, jobs: Iterable[Job[T]]) -> list[T]:
        """Run every job, in any order, and return their results in the order of the jobs.

        Ctrl-C, a spent budget or a lost endpoint: nothing more is sent, the replies on their way are journaled, then
        `KeyboardInterrupt` or `RunStopped` is raised. A second Ctrl-C leaves at once.
        """
        # Here and not on the loop: an interrupt may come before the loop of another thread runs.
        self._begin()
        results: dict[int, T] = {}
        with suppress(asyncio.CancelledError):  # the second Ctrl-C; the first one is raised below
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                results = asyncio.run(self._run(jobs))
            else:  # a notebook has a loop of its own, and asyncio runs one in a thread
                results = self._run_beside(jobs)
        if self._stop is not None:
            raise self._stop
        # Fewer requests than the breaker waits for, and every one refused: no data is better than an empty success.
        if self._refused is not None and not self.journal.totals().replies:
            raise self._breaker.hopeless(self._refused)
        if self._without_reply:
            kinds = ", ".join(f"{kind}: {number}" for kind, number in self._without_reply.most_common())
            raise RunStopped(
                f"{self._without_reply.total()} seeds got no reply ({kinds}). Every other reply is in the journal; "
                "run again to ask for the rest."
            )
        # By number, since jobs end in any order.
        return [results[index] for index in sorted(results)]

    def _run_beside(self, jobs: Iterable[Job[T]]) -> dict[int, T]:
        """Run on a loop in another thread, which gets no signals: those that come here are handed on."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(asyncio.run, self._run(jobs))
            while True:
                try:
                    return running.result()
                except KeyboardInterrupt as reason:
                    if running.done():
                        raise
                    self._interrupt_from_outside(reason)

    async def _run(self, jobs: Iterable[Job[T]]) -> dict[int, T]:
        self._main = asyncio.current_task()
        results: dict[int, T] = {}
        numbered = enumerate(jobs)
        # Twice as many jobs as requests: one that verifies its reply leaves no slot of the endpoint idle.
        workers = [self._work(numbered, results) for _ in range(2 * self.generator.concurrency)]
        with self._signals():
            try:
                await asyncio.gather(*workers)
            finally:
                await self.generator.close()
        return results

    async def _work(self, numbered: Iterator[tuple[int, Job[T]]], results: dict[int, T]) -> None:
        # One iterator for all workers: each takes the next job when it is free, and jobs are made only then.
        for index, job in numbered:
            if self._stop is not None:
                return
            try:
                results[index] = await job(self.ask)
            except NoReplyError as error:
                self._without_reply[error.kind] += 1
                self._in_a_row += 1
                if self._in_a_row >= HOPELESS:
                    self._halt(RunStopped(f"{HOPELESS} requests in a row got no reply. The last: {error}"))
            except Exception as error:  # noqa: BLE001 - raised by `run` once the replies on their way have arrived
                self._halt(error)
            else:
                self.progress.done()

    async def _fetch(self, request: Request) -> Reply:
        """Claim the request, get its reply and put it on disk. A claim outlives only a cancellation."""
        # The generator is checked once, before the first request that the journal cannot answer: a rerun that has all
        # its replies needs no endpoint.
        if self._checked is None:
            # A task, which all first requests await: the check is made once, and its failure reaches each of them.
            self._checked = asyncio.create_task(self._check())
        await asyncio.shield(self._checked)
        stored = await self._claim(request)
        if stored is not None:
            return stored
        try:
            self.progress.counts["asked"] += 1
            reply = await self.generator.reply(request, partial(self._fault, request))
        # Raised through the generator by `_fault`: the only way out of its loop of attempts.
        except _AnsweredElsewhereError as other:
            return other.reply
        except GenerationError as error:
            if error.kind != CONTENT_FILTER:
                self.journal.release(request)
                self._refused = error
                self._halt(self._breaker.refused(error))
                raise
            # Kept, so that no later run pays for the same refusal.
            reply = Reply("", CONTENT_FILTER, 0, 0, request.model)
        except Exception:
            self.journal.release(request)
            raise
        # Before anything else happens to the reply: from here on a kill does not lose it.
        spend = self._terms(request)[0].cost(reply.prompt_tokens, reply.completion_tokens)
        stored = self.journal.put(request, reply, spend)
        self._in_a_row = 0
        self._breaker.paid(request.key)
        self.progress.add(spend)
        return stored

    async def _check(self) -> None:
        """Check the generator, and refuse to wait for batches that it will not collect."""
        ledger, places = JournalLedger(self.journal, self.budget), frozenset[str]()
        if self._batched is not None:
            places = self._batched.places
            self._batched.bind(ledger)
        left = [batch for batch in ledger.open_batches() if batch.place not in places]
        if left:
            raise RunStopped(
                f"{sum(len(batch.requests) for batch in left):,} requests are under way in batches at "
                f"{left[0].place}. Run again as that run was, to collect what they bring, and change it then."
            )
        await self.generator.check()

    def _terms(self, request: Request) -> tuple[Budget, bool]:
        """The budget at the prices of a request, and whether it waits for a batch before it is sent."""
        share = None if self._batched is None else self._batched.price_share(request)
        return (self.budget, False) if share is None else (self.budget.at(share), True)

    async def _claim(self, request: Request) -> Reply | None:
        """Wait for the right to ask; returns the reply where another process got it meanwhile."""
        budget, waits = self._terms(request)
        while True:
            if self._stop is not None:
                # A claim taken now would be sent after the drain.
                raise RunStopped("The run is stopping.")
            claim = self.journal.claim(request, budget, waits=waits)
            if claim is Claim.MINE:
                return None
            if claim is Claim.ANSWERED:
                return self.journal.get(request.key)
            # Another process asks for it, or what is under way fills the budget.
            await asyncio.sleep(_POLL_SECONDS)

    async def _fault(self, request: Request, fault: Fault) -> None:
        """Count an attempt without a reply; where it cost something, the next one needs room in the budget again."""
        self.progress.faults[fault.kind] += 1
        if fault.prompt_tokens or fault.completion_tokens:
            spend = self._terms(request)[0].cost(fault.prompt_tokens, fault.completion_tokens)
            self.journal.fault(request, fault, spend)
            self.progress.add(spend)
            # Not under way while it waits: two that wait for each other's room would wait forever.
            self.journal.release(request)
            stored = await self._claim(request)
            if stored is not None:
                raise _AnsweredElsewhereError(stored)

    def _halt(self, reason: BaseException | None) -> None:
        """Send nothing more, if there is a reason; the first is the one that is raised."""
        if reason is not None and self._stop is None:
            self._stop = reason
            self.generator.drain()

    def _interrupt(self, reason: BaseException) -> None:
        """Stop in order the first time, at once the second."""
        if self._stop is None:
            logger.warning("Waiting for %d replies on their way. Again to leave at once.", len(self._under_way))
            self._halt(reason)
        elif self._main is not None:
            self._main.cancel()

    def _interrupt_from_outside(self, reason: BaseException) -> None:
        if self._main is None:
            self._halt(reason)
        else:
            self._main.get_loop().call_soon_threadsafe(self._interrupt, reason)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop in order on the first Ctrl-C or SIGTERM, at once on the second."""
        if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
            yield
            return
        loop = asyncio.get_running_loop()
        handled: list[tuple[signal.Signals, Any]] = []
        for number, reason in ((signal.SIGINT, KeyboardInterrupt()), (signal.SIGTERM, SystemExit(143))):
            handled.append((number, signal.getsignal(number)))
            loop.add_signal_handler(number, self._interrupt, reason)
        try:
            yield
        finally:
            for number, before in handled:
                loop.remove_signal_handler(number)
                # asyncio sets the default where it removes its handler; a notebook or a trainer may have had its own.
                # None: set in C.
                signal.signal(number, signal.SIG_DFL if before is None else before)
