"""Every reply that was paid for, on disk before anything else happens to it: one sqlite file.

`put` commits where it is called, in about 0.1 ms: what it has returned survives a kill of the process. On a disk of
this machine sqlite's write-ahead log is in use, and a thread flushes it every second, which is the most that a loss of
power can cost. Nothing here is a secret or a local path: prompts, replies, model names, counts.
"""

import json
import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_longalign.endpoint.protocol import Fault, Reply, Request, RunStopped
from hf_longalign.synthesis import tables
from hf_longalign.synthesis.budget import Budget, Spend
from hf_longalign.synthesis.disk import network_file_system, whole


logger = logging.getLogger(__name__)

_PUT = f"INSERT OR IGNORE INTO replies VALUES ({', '.join('?' * 12)})"
_REPLY = "text, finish_reason, prompt_tokens, completion_tokens, reply_model"
# A full disk must stop the run before the next request is paid for, with room left for the replies under way.
_DISK_RESERVE = 64 * 2**20
_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 60
# Pages of 4 KiB in the write-ahead log after which a commit moves them into the file itself, should the thread lag.
_LONGEST_LOG = 20_000
# After so long without a sign of it, another machine is taken to have left the journal.
_HOST_SECONDS = 300


class JournalError(RunStopped):
    """The journal cannot be written: a full disk, or a file that is no journal."""


@dataclass(frozen=True)
class Totals:
    """What the journal holds. `unconfirmed` is the part of `spend` that nobody confirmed (time-outs, kills)."""

    replies: int
    faults: int
    spend: Spend
    unconfirmed: Spend


@dataclass(frozen=True)
class Entry:
    """A reply with its request, as the journal holds them."""

    key: str
    model: str
    purpose: str
    messages: list[tuple[str, str]]
    sampling: dict[str, Any]
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    reply_model: str
    usd: float
    at: float


class Journal:
    """Replies by key, shared by any number of threads and processes on one machine.

    A journal is opened in the process that uses it, after a fork and not before. `owner` is its name on claims.
    A reply that it lacks is taken over from `others`, finished journals that nobody writes to, wherever they lie.

    Raises:
        JournalError: the file is no journal, a copy without its log, or on a network's disk in use by another machine.

    >>> import tempfile
    >>> request = Request((("user", "Hi"),), "tiny")
    >>> with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.sqlite") as journal:
    ...     stored = journal.put(request, Reply("Hello", "stop", 3, 1, "tiny"))
    ...     journal.get(request.key).text, journal.totals().spend.tokens
    ('Hello', 4)
    """

    def __init__(self, path: str | Path, others: Iterable[Path] = ()) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # sqlite's locks do not survive a fork: a child that wrote through the parent's connection would break the
        # file.
        self._pid = os.getpid()
        self.owner = tables.new_owner()
        self._lock = threading.RLock()
        self._lost: JournalError | None = None
        # sqlite shares its log through mapped memory, which the disk of another machine does not give
        # (https://sqlite.org/wal.html). There it is left out, each commit is flushed, and one machine works at a time.
        self._network = network_file_system(self.path.parent)
        if self._network:
            self._mark_host()
        if tables.lacks_its_log(self.path):
            logger.warning(
                "The journal `%s` may lack its last replies: it was in use when it was copied, without its log, or "
                "another program has opened it after a kill. Every other reply is there.",
                self.path.name,
            )
        self._others = {other: _finished(other) for other in others}
        self._connection = self._connect()
        self._closing = threading.Event()
        # A daemon: a process that ends in an error must not be kept alive by it.
        self._keeper = threading.Thread(target=self._keep_up, name="journal", daemon=True)
        self._keeper.start()

    def get(self, key: str) -> Reply | None:
        """The reply to `key`, or None."""
        with self._locked() as connection:
            found = _reply(connection, key)
            for path, other in self._others.items() if found is None else ():
                try:
                    row = other.execute("SELECT * FROM replies WHERE key = ?", (key,)).fetchone()
                except sqlite3.Error as error:
                    raise _unreadable(path, error) from None
                if row is not None:  # with its time, by which `merge` knows a copy from a second payment
                    connection.execute(_PUT, row)
                    return _reply(connection, key)
            return found

    def put(self, request: Request, reply: Reply, spend: Spend | None = None) -> Reply:
        """Store a reply and end its claim. The first reply to a key stays: returns the stored one."""
        values = (
            request.key,
            request.model,
            request.purpose,
            json.dumps(request.messages, ensure_ascii=False),
            json.dumps(request.sampling.as_dict(), sort_keys=True),
            *(reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens, reply.model),
            spend.usd if spend else 0.0,
            time.time(),
        )
        with self.transaction() as connection:
            # The first stays: a second reply to one key, from a shard or a race, must not change rows that were made
            # already.
            new = connection.execute(_PUT, values).rowcount
            # Whoever holds it: the reply is there, so nobody needs to ask.
            connection.execute("DELETE FROM claims WHERE key = ?", (request.key,))
            stored = reply if new else _reply(connection, request.key)
        return stored or reply

    def claim(self, request: Request, budget: Budget, *, waits: bool = False) -> tables.Claim:
        """Take on the asking of `request` and set its cost aside; see `tables.claim`. Raises `JournalError` too."""
        with self._locked() as connection:
            # Without a lock on the file: many wait here for what another process asks.
            found = tables.look(connection, request.key, self.owner)
        if found is not None:
            return found
        if shutil.disk_usage(self.path.parent).free < _DISK_RESERVE:
            raise JournalError(f"The disk of the journal `{self.path.name}` is full. Free some space and run again.")
        with self.transaction() as connection:
            return tables.claim(connection, request, budget, self.owner, waits=waits)

    def release(self, request: Request) -> None:
        """Give up a claim that led to no reply."""
        with self.transaction() as connection:
            tables.release(connection, request.key, self.owner)

    def fault(self, request: Request, fault: Fault, spend: Spend) -> None:
        """Note what an attempt without a reply has cost."""
        tokens = (fault.prompt_tokens, fault.completion_tokens)
        values = (request.key, fault.kind, request.model, request.purpose, *tokens, spend.usd, int(fault.confirmed))
        with self.transaction() as connection:
            tables.add_fault(connection, values)

    def drop(self, unwanted: Callable[[Entry], bool]) -> int:
        """Forget the replies whose entries are `unwanted`; returns how many. As faults "dropped" their cost stays."""
        keys = [(entry.key,) for entry in self.entries() if unwanted(entry)]
        with self.transaction() as connection:
            for statement in tables.DROP:
                connection.executemany(statement, keys)
        return len(keys)

    def cost_of(self, keys: Iterable[str]) -> tuple[int, int, int, float]:
        """How many of these keys have a reply, and what those cost: tokens in, tokens out, dollars as then paid."""
        query = "SELECT 1, prompt_tokens, completion_tokens, usd FROM replies WHERE key = ?"
        with self._locked() as connection:
            found = [connection.execute(query, (key,)).fetchone() or (0, 0, 0, 0.0) for key in sorted(keys)]
        replies, prompt, completion, usd = map(sum, zip(*found, strict=True))
        return replies, prompt, completion, usd

    def totals(self) -> Totals:
        """What the journal holds, in numbers."""
        with self._locked() as connection:
            row = connection.execute("SELECT * FROM totals").fetchone()
        return Totals(row[0], row[1], Spend(row[2] + row[3], row[4]), Spend(row[5], row[6]))

    def entries(self) -> Iterator[Entry]:
        """Every reply with its request, ordered by key."""
        # A connection of its own: the caller may take minutes over the entries, and others must be able to write.
        with closing(self._connect()) as connection:
            for key, model, purpose, messages, sampling, *reply in connection.execute(
                "SELECT * FROM replies ORDER BY key"
            ):
                asked = [(role, content) for role, content in json.loads(messages)]
                yield Entry(key, model, purpose, asked, json.loads(sampling), *reply)

    def export(self, path: str | Path) -> int:
        """Write every entry as a line of JSON and return how many. Equal journals give equal bytes: no times."""
        number = 0
        with whole(Path(path)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for entry in self.entries():
                fields = asdict(entry)
                # When it was asked differs between machines that hold the same replies.
                del fields["at"]
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
                number += 1
        return number

    def merge(self, path: str | Path) -> int:
        """Take over the replies of another journal that this one lacks, and what it spent; returns how many.

        A reply that both journals paid for counts twice in the totals, in whatever order journals are merged; one that
        was copied counts once. Raises `JournalError` for none, or one that is cut short or a copy without its log.
        """
        path, name = Path(path), Path(path).name
        if not path.is_file():
            raise JournalError(f"The journal `{name}` does not exist. Correct the path.")
        if tables.lacks_its_log(path):
            raise JournalError(
                f"The journal `{name}` was in use when it was copied, and its log was left behind: it would be merged "
                f"without its last replies. Copy `{name}-wal` along with it, or copy it once its run has ended. If it "
                f"is no copy, open it once (`hf-longalign journal list {name}`) and merge it then."
            )
        with Journal(path) as other:
            with other._locked() as connection:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                (counted,) = connection.execute("SELECT COUNT(*) FROM replies").fetchone()
                (total,) = connection.execute("SELECT replies FROM totals").fetchone()
            if found != "ok" or counted != total:  # cut or torn by copying
                raise JournalError(
                    f"The journal `{name}` is not whole ({found}; {counted:,} of {total:,} replies). Copy "
                    "it again once its run has ended."
                )
            with self._locked() as connection:
                # Attached, so that sqlite copies the rows itself, in one transaction: a kill leaves all of them here
                # or none.
                connection.execute("ATTACH ? AS other", (str(path),))
                try:
                    with self.transaction():
                        for statement in tables.MERGE[:-1]:
                            connection.execute(statement)
                        return connection.execute(tables.MERGE[-1]).rowcount
                finally:
                    connection.execute("DETACH other")

    def close(self) -> None:
        """Flush and close the file. What this journal still claims was cut off under way."""
        self._closing.set()
        self._keeper.join()
        with self.transaction() as connection:
            tables.reap(connection, self.owner)
        with suppress(sqlite3.OperationalError):
            # The last to leave takes the log into the file and says so in its header: a file that says "log" and has
            # none beside it was copied without. Others who still use the journal are not waited for.
            self._connection.execute("PRAGMA busy_timeout = 0")
            self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        for connection in (self._connection, *self._others.values()):
            connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> sqlite3.Connection:
        # isolation_level=None: transactions are begun here, by hand; Python's own would begin one before every write.
        connection = sqlite3.connect(self.path, _PATIENCE_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            # The tables come before the log is turned on, so that the file itself is a journal from the first moment.
            tables.prepare(connection)
            mode = "delete" if self._network else "wal"
            answer = _set_mode(connection, mode)
            if answer != mode:
                raise sqlite3.NotSupportedError(
                    f"its file system does not take sqlite's journal mode {mode!r} but {answer!r}. Set `journal` to a "
                    "file on a disk of this machine"
                )
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._network else 'NORMAL'}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_LONGEST_LOG}")
        except sqlite3.Error as error:
            connection.close()
            raise self._failure(error) from None
        return connection

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._pid:
            raise RuntimeError("`Journal` must be opened in the process that uses it. Open it after the fork.")
        if self._lost is not None:
            # On a network's disk another machine has taken the file over: whatever is written now could break it.
            raise self._lost
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise self._failure(error) from None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all that is done in the block, or nothing of it."""
        with self._locked() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _keep_up(self) -> None:
        """Until the journal is closed, flush the log to the disk; on a network's disk, say that it is in use."""
        connection = None if self._network else self._connect()
        while not self._closing.wait(_EVERY_SECONDS):
            try:
                if connection is None:
                    self._mark_host()
                else:  # moves the log into the file, which flushes both
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            # Raised at the next use of the journal, where somebody can hear it; a thread's own error goes nowhere.
            except JournalError as error:
                self._lost = error
            except (sqlite3.Error, OSError) as error:
                logger.warning("%s", self._failure(error))
        if connection is not None:
            connection.close()

    def _mark_host(self) -> None:
        """Keep every other machine away: locks between machines cannot be relied on, and two would break the file."""
        mark, own = self.path.with_name(f"{self.path.name}.host"), socket.gethostname()
        with suppress(FileNotFoundError):
            other, age = mark.read_text(encoding="utf-8"), time.time() - mark.stat().st_mtime
            if other not in ("", own) and age < _HOST_SECONDS:
                raise JournalError(
                    f"The journal `{self.path.name}` lies on a network's disk ({self._network}) and is in use by the "
                    f"machine {other}. Ask for a part of the seeds on each machine, with `--num_shards`, "
                    "`--shard_index` and one `--output_dir`, then merge what is in there. If nothing runs there, "
                    f"delete `{mark.name}`."
                )
        mark.write_text(own, encoding="utf-8")

    def _failure(self, error: Exception) -> JournalError:
        return JournalError(f"The journal `{self.path.name}` cannot be used: {error}.")


def _finished(path: Path) -> sqlite3.Connection:
    # "immutable" leaves out sqlite's locks and log, which a network's disk may lack and a finished file needs not.
    # Read only, or one that has gone meanwhile would be made anew, empty, and taken for finished.
    source = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        return sqlite3.connect(source, uri=True, check_same_thread=False)
    except sqlite3.Error as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> JournalError:
    return JournalError(
        f"The finished journal `{path.name}` cannot be read: {error}. Delete it, and its replies are asked for again, "
        "or bring back the whole file."
    )


def _reply(connection: sqlite3.Connection, key: str) -> Reply | None:
    row = connection.execute(f"SELECT {_REPLY} FROM replies WHERE key = ?", (key,)).fetchone()
    return Reply(*row) if row else None


def _set_mode(connection: sqlite3.Connection, mode: str) -> str:
    """Return the mode that is in use now. Where others open or close it at the same moment, sqlite does not wait."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            (answer,) = connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
            return str(answer)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
