"""Asks endpoints from a small process of its own, so that a SIGKILL of the run loses no reply that is under way.

The run's process is the one that gets killed: it holds tokenizers and data, and a scheduler or a user stops it. The
recorder holds the connections and journals each reply before it hands it over. When the run is gone, it sends nothing
more, waits for the replies on their way, journals them and ends; a rerun meanwhile waits for those replies instead of
asking again. Only what kills both (the machine, a whole container) loses replies under way: they are asked again, and
the journal counts the most that they can have cost.
"""

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hf_longalign.endpoint.protocol import (
    Fault,
    Generator,
    Notify,
    Reply,
    Request,
    RunStopped,
    ignore,
)
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal


_HEADER = 8
_EXIT_SECONDS = 10.0
_WATCH_SECONDS = 0.2


class Recorder:
    """A generator that is asked, and whose replies are journaled, in another process.

    The process starts with `check`, which comes first, and ends with `close`. It is in a session of its own: neither a
    Ctrl-C nor the end of the terminal reaches it. `owner` is the name that claims on its requests must bear.
    """

    remote = True

    def __init__(self, generator: Generator, journal: Path, budget: Budget) -> None:
        self.model = generator.model
        self.concurrency = generator.concurrency
        self.owner = ""
        self._settings = (generator, journal.absolute(), budget, logging.getLogger("hf_longalign").getEffectiveLevel())
        self._process: subprocess.Popen[bytes] | None = None
        self._link: _Link | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answers: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._numbers = count()

    async def check(self) -> None:
        """Start the process and see `Generator.check`."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = f"from hf_longalign.synthesis.recorder import main; main({theirs.fileno()}, {os.getpid()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._link = await _Link.open(ours)
        self._link.send(*self._settings)
        self._reading = asyncio.create_task(self._read(self._link))
        self.owner = await self._call("check")

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """See `Generator.reply`. What this returns is in the journal."""
        reply: Reply = await self._call("reply", request, notify)
        return reply

    def drain(self) -> None:
        """See `Generator.drain`."""
        if self._link is not None:
            self._link.send(-1, "drain", None)

    async def close(self) -> None:
        """End the process; replies still under way are journaled first, without anybody waiting for them."""
        link, reading, process = self._link, self._reading, self._process
        self._link = self._reading = self._process = None
        if link is not None and reading is not None:
            reading.cancel()
            link.close()
        if process is not None and not self._answers:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, _EXIT_SECONDS)
        self._answers.clear()

    async def _call(self, what: str, value: Any = None, notify: Notify = ignore) -> Any:
        if self._link is None:
            raise RunStopped("The recorder is closed.")
        link, number = self._link, next(self._numbers)
        answers = self._answers[number] = asyncio.Queue()
        link.send(number, what, value)
        kind, answer = await answers.get()
        while kind == "fault":
            try:
                await notify(answer)
            except Exception:
                link.send(number, "enough", None)
                del self._answers[number]
                raise
            link.send(number, "again", None)
            kind, answer = await answers.get()
        # A call that is cancelled stays: `close` does not wait for its reply.
        del self._answers[number]
        if kind == "failed":
            raise answer
        return answer

    async def _read(self, link: "_Link") -> None:
        try:
            while True:
                number, kind, value = await link.receive()
                if number in self._answers:
                    self._answers[number].put_nowait((kind, value))
        except EOFError:
            stopped = RunStopped("The recorder process has died. Run again to continue.")
            for answers in self._answers.values():
                answers.put_nowait(("failed", stopped))


class _Link:
    """Python values over a socket, each with its length before it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> "_Link":
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, *values: Any) -> None:
        """Queue the values; what the other end no longer reads is dropped."""
        data = pickle.dumps(values)
        if not self._writer.is_closing():
            self._writer.write(len(data).to_bytes(_HEADER, "big") + data)

    async def receive(self) -> tuple[Any, ...]:
        """The next values. Raises `EOFError` when the other end is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_HEADER), "big")
            values: tuple[Any, ...] = pickle.loads(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError from None
        return values

    def close(self) -> None:
        self._writer.close()


def main(descriptor: int, parent: int) -> None:
    """Run the other process: `descriptor` is its end of the socket pair."""
    asyncio.run(_record(socket.socket(fileno=descriptor), parent))


async def _record(end: socket.socket, parent: int) -> None:
    link = await _Link.open(end)
    generator, path, budget, level = await link.receive()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_longalign").setLevel(level)
    with Journal(path) as journal:
        desk = _Desk(link, generator, journal, budget)
        reading = asyncio.create_task(desk.read())
        while not reading.done() and os.getppid() == parent:
            await asyncio.wait([reading], timeout=_WATCH_SECONDS)
        reading.cancel()
        await desk.finish()


class _Desk:
    """The recorder's side: one task for each request."""

    def __init__(self, link: _Link, generator: Generator, journal: Journal, budget: Budget) -> None:
        self._link = link
        self._generator = generator
        self._journal = journal
        self._budget = budget
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._go_on: dict[int, asyncio.Future[bool]] = {}
        self._orphaned = False

    async def read(self) -> None:
        """Take orders until the run is gone."""
        while True:
            try:
                number, what, value = await self._link.receive()
            except EOFError:
                return
            if what == "drain":
                self._generator.drain()
            elif what in ("again", "enough"):
                self._go_on.pop(number).set_result(what == "again")
            else:
                self._tasks[number] = asyncio.create_task(self._serve(number, what, value))

    async def finish(self) -> None:
        """Send nothing more and wait for what is on its way."""
        self._orphaned = True
        self._generator.drain()
        for go_on in self._go_on.values():
            go_on.set_result(False)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._generator.close()
        self._journal.release_all()
        self._link.close()

    async def _serve(self, number: int, what: str, request: Request) -> None:
        try:
            if what == "check":
                await self._generator.check()
                self._link.send(number, "done", self._journal.owner)
            else:
                self._link.send(number, "done", await self._reply(number, request))
        except Exception as error:  # noqa: BLE001 - raised in the run's process
            self._link.send(number, "failed", error)
        finally:
            del self._tasks[number]

    async def _reply(self, number: int, request: Request) -> Reply:
        async def notify(fault: Fault) -> None:
            if self._orphaned:
                raise RunStopped("The run is gone.")
            self._link.send(number, "fault", fault)
            go_on = self._go_on[number] = asyncio.get_running_loop().create_future()
            if not await go_on:
                raise RunStopped("The run is stopping.")

        reply = await self._generator.reply(request, notify)
        spend = self._budget.cost(reply.prompt_tokens, reply.completion_tokens)
        return self._journal.put(request, reply, spend)
