"""Every reply that was paid for, on disk before anything else happens to it: an sqlite file in WAL mode.

`put` commits where it is called, in about 0.1 ms: what it has returned survives a kill of the process. A thread
flushes the file to the disk every second, which is the most that a loss of power can cost. Nothing here is a secret or
a local path: prompts, replies, model names, counts.
"""

import json
import logging
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_longalign.endpoint.protocol import Fault, Reply, Request, RunStopped
from hf_longalign.synthesis import claims
from hf_longalign.synthesis.budget import Budget, Spend


logger = logging.getLogger(__name__)

# "LAsj" in the file's header, and the version of the tables.
_APPLICATION = 0x4C41736A
_VERSION = 1
_SCHEMA = (
    """
    CREATE TABLE replies (
        key TEXT PRIMARY KEY, model TEXT NOT NULL, purpose TEXT NOT NULL, messages TEXT NOT NULL,
        sampling TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT, prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL, reply_model TEXT NOT NULL, usd REAL NOT NULL, at REAL NOT NULL
    )""",
    """
    CREATE TABLE faults (
        id TEXT PRIMARY KEY, key TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, purpose TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL,
        confirmed INTEGER NOT NULL, at REAL NOT NULL
    )""",
    claims.TABLE,
    """
    CREATE TABLE totals (
        replies INTEGER, faults INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, usd REAL,
        unconfirmed_tokens INTEGER, unconfirmed_usd REAL
    )""",
    "INSERT INTO totals VALUES (0, 0, 0, 0, 0, 0, 0)",
    """
    CREATE TRIGGER count_reply AFTER INSERT ON replies BEGIN
        UPDATE totals SET replies = replies + 1, prompt_tokens = prompt_tokens + NEW.prompt_tokens,
            completion_tokens = completion_tokens + NEW.completion_tokens, usd = usd + NEW.usd;
    END""",
    """
    CREATE TRIGGER count_fault AFTER INSERT ON faults BEGIN
        UPDATE totals SET faults = faults + 1, prompt_tokens = prompt_tokens + NEW.prompt_tokens,
            completion_tokens = completion_tokens + NEW.completion_tokens, usd = usd + NEW.usd,
            unconfirmed_tokens = unconfirmed_tokens
                + (1 - NEW.confirmed) * (NEW.prompt_tokens + NEW.completion_tokens),
            unconfirmed_usd = unconfirmed_usd + (1 - NEW.confirmed) * NEW.usd;
    END""",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_REPLY = "text, finish_reason, prompt_tokens, completion_tokens, reply_model"
# A full disk must stop the run before the next request is paid for, with room left for the replies under way.
_DISK_RESERVE = 64 * 2**20
_FLUSH_SECONDS = 1.0
_PATIENCE_SECONDS = 60
# Pages of 4 KiB in the write-ahead log after which a commit moves them into the file itself, should the thread lag.
_LONGEST_LOG = 20_000


class JournalError(RunStopped):
    """The journal cannot be written: a full disk, or a file that is no journal."""


@dataclass(frozen=True)
class Totals:
    """What the journal holds. `unconfirmed` is the part of `spend` that nobody confirmed (time-outs, kills)."""

    replies: int
    faults: int
    spend: Spend
    unconfirmed: Spend


class Journal:
    """Replies by key, shared by any number of threads and processes on one machine.

    A journal is opened in the process that uses it, after a fork and not before. `owner` is its name on claims.

    >>> import tempfile
    >>> request = Request((("user", "Hi"),), "tiny")
    >>> with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.sqlite") as journal:
    ...     stored = journal.put(request, Reply("Hello", "stop", 3, 1, "tiny"))
    ...     journal.get(request.key).text, journal.totals().spend.tokens
    ('Hello', 4)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._pid = os.getpid()
        self.owner = claims.new_owner()
        self._lock = threading.Lock()
        self._connection = self._connect()
        self._closing = threading.Event()
        self._flusher = threading.Thread(target=self._flush, name="journal", daemon=True)
        self._flusher.start()

    def get(self, key: str) -> Reply | None:
        """The reply to `key`, or None."""
        with self._locked() as connection:
            return _reply(connection, key)

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
        with self._transaction() as connection:
            new = connection.execute(f"INSERT OR IGNORE INTO replies VALUES ({', '.join('?' * 12)})", values).rowcount
            connection.execute("DELETE FROM claims WHERE key = ?", (request.key,))
            stored = reply if new else _reply(connection, request.key)
        return stored or reply

    def claim(self, request: Request, budget: Budget, owner: str | None = None) -> claims.Claim:
        """Take on the asking of `request` and set its cost aside; raises `BudgetExceeded` or `JournalError`.

        `owner` is the journal of the process that will ask, if it is another one.
        """
        if shutil.disk_usage(self.path.parent).free < _DISK_RESERVE:
            raise JournalError(f"The disk of the journal `{self.path.name}` is full. Free some space and run again.")
        with self._transaction() as connection:
            return claims.claim(connection, request, budget, owner or self.owner)

    def release(self, request: Request, owner: str | None = None) -> None:
        """Give up a claim that led to no reply."""
        with self._transaction() as connection:
            claims.release(connection, request.key, owner or self.owner)

    def release_all(self) -> None:
        """Give up every claim of this journal: none of its requests is under way."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))

    def fault(self, request: Request, fault: Fault, spend: Spend) -> None:
        """Note what an attempt without a reply has cost."""
        values = (
            uuid.uuid4().hex,
            *(request.key, fault.kind, request.model, request.purpose, fault.prompt_tokens, fault.completion_tokens),
            *(spend.usd, int(fault.confirmed), time.time()),
        )
        with self._transaction() as connection:
            connection.execute(f"INSERT INTO faults VALUES ({', '.join('?' * 10)})", values)

    def drop(self, unwanted: Callable[[dict[str, Any]], bool]) -> int:
        """Forget the replies whose entries (see `entries`) are `unwanted`, and return how many.

        They are asked for again; what they have cost stays counted, as faults named "dropped".
        """
        keys = [(entry["key"],) for entry in self.entries() if unwanted(entry)]
        with self._transaction() as connection:
            for key in keys:
                connection.execute(
                    "UPDATE totals SET (replies, prompt_tokens, completion_tokens, usd) = (SELECT totals.replies - 1, "
                    "totals.prompt_tokens - r.prompt_tokens, totals.completion_tokens - r.completion_tokens, "
                    "totals.usd - r.usd FROM replies AS r WHERE r.key = ?)",
                    key,
                )
                connection.execute(
                    "INSERT INTO faults SELECT lower(hex(randomblob(16))), key, 'dropped', model, purpose, "
                    "prompt_tokens, completion_tokens, usd, 1, at FROM replies WHERE key = ?",
                    key,
                )
            connection.executemany("DELETE FROM replies WHERE key = ?", keys)
        return len(keys)

    def totals(self) -> Totals:
        """What the journal holds, in numbers."""
        with self._locked() as connection:
            row = connection.execute("SELECT * FROM totals").fetchone()
        return Totals(row[0], row[1], Spend(row[2] + row[3], row[4]), Spend(row[5], row[6]))

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every reply with its request, ordered by key."""
        connection = self._connect()
        try:
            cursor = connection.execute("SELECT * FROM replies ORDER BY key")
            names = [column[0] for column in cursor.description]
            for row in cursor:
                entry = dict(zip(names, row, strict=True))
                yield entry | {name: json.loads(entry[name]) for name in ("messages", "sampling")}
        finally:
            connection.close()

    def export(self, path: str | Path) -> int:
        """Write every entry as a line of JSON and return how many. Equal journals give equal bytes: no times."""
        target = Path(path)
        unfinished = target.with_name(target.name + ".part")
        number = 0
        with unfinished.open("w", encoding="utf-8") as file:
            for entry in self.entries():
                entry.pop("at")
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                number += 1
        unfinished.replace(target)
        return number

    def merge(self, path: str | Path) -> int:
        """Take over the replies of another journal that this one lacks, and what it spent; returns how many."""
        if not Path(path).is_file():
            raise JournalError(f"The journal `{Path(path).name}` does not exist.")
        Journal(path).close()  # is one, of this version
        with self._locked() as connection:
            connection.execute("ATTACH ? AS other", (str(path),))
            try:
                connection.execute("INSERT OR IGNORE INTO faults SELECT * FROM other.faults")
                return connection.execute("INSERT OR IGNORE INTO replies SELECT * FROM other.replies").rowcount
            finally:
                connection.execute("DETACH other")

    def close(self) -> None:
        """Flush and close the file. What this journal still claims was cut off under way."""
        self._closing.set()
        self._flusher.join()
        with self._transaction() as connection:
            claims.reap(connection, self.owner)
        self._connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, _PATIENCE_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _use_write_ahead_log(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_LONGEST_LOG}")
            _prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            raise self._failure(error) from None
        return connection

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._pid:
            raise RuntimeError("`Journal` must be opened in the process that uses it. Open it after the fork.")
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise self._failure(error) from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._locked() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _flush(self) -> None:
        """Move the log into the file, which flushes both, until the journal is closed."""
        connection = self._connect()
        while not self._closing.wait(_FLUSH_SECONDS):
            try:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except sqlite3.Error as error:
                logger.warning("%s", self._failure(error))
        connection.close()

    def _failure(self, error: sqlite3.Error) -> JournalError:
        return JournalError(f"The journal `{self.path.name}` cannot be used: {error}.")


def _reply(connection: sqlite3.Connection, key: str) -> Reply | None:
    row = connection.execute(f"SELECT {_REPLY} FROM replies WHERE key = ?", (key,)).fetchone()
    return Reply(*row) if row else None


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Turn it on. Where others open a new journal at the same moment, SQLite does not wait for them by itself."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file; refuse a file that is something else."""
    connection.execute("BEGIN IMMEDIATE")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not tables:
        for statement in _SCHEMA:
            connection.execute(statement)
    elif application != _APPLICATION:
        raise sqlite3.DatabaseError("it is another kind of database")
    elif version != _VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, not {_VERSION}")
    connection.execute("COMMIT")
