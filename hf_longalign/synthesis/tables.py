"""The tables of a journal, and what is done to several of them at once: claims, batches, merges.

A claim on a key keeps two processes from paying for one reply. It lives as long as its process. One that a killed
process left behind becomes a fault "killed" that counts the most its request can have cost, since nobody will say what
was billed.
"""

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_longalign.endpoint.batch import OpenBatch
from hf_longalign.endpoint.protocol import Reply, Request, Sampling
from hf_longalign.synthesis.budget import Budget, BudgetExceeded, Spend


if TYPE_CHECKING:
    from hf_longalign.synthesis.journal import Journal


# A process on another host (a container on the same disk) cannot be looked up: its claims end by the clock.
LEASE_SECONDS = 1800.0
# What the owner of a claim begins with where a batch holds it, followed by the batch's tag.
BATCH = "batch|"
# "LAsj" in the file's header, and the version of the tables. Version 1 was not closed as `close` does it now.
APPLICATION = 0x4C41736A
VERSION = 2
SCHEMA = (
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
    """
    CREATE TABLE claims (
        key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL, model TEXT NOT NULL, purpose TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL
    )""",
    """
    CREATE TABLE totals (
        replies INTEGER, faults INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, usd REAL,
        unconfirmed_tokens INTEGER, unconfirmed_usd REAL
    )""",
    "INSERT INTO totals VALUES (0, 0, 0, 0, 0, 0, 0)",
    # Sums kept by the database itself: a budget asks for them before each request, and a scan would take seconds.
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
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
# Made by the first run that looks for batches: a journal from before has none.
_BATCH_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS batches (
        tag TEXT PRIMARY KEY, name TEXT, place TEXT NOT NULL, owner TEXT NOT NULL, at REAL NOT NULL
    )""",
    "CREATE TABLE IF NOT EXISTS batch_requests (tag TEXT NOT NULL, request TEXT NOT NULL)",
)
DROP = (
    """
    UPDATE totals SET (replies, prompt_tokens, completion_tokens, usd) = (
        SELECT totals.replies - 1, totals.prompt_tokens - r.prompt_tokens,
            totals.completion_tokens - r.completion_tokens, totals.usd - r.usd FROM replies AS r WHERE r.key = ?)""",
    """
    INSERT INTO faults SELECT key || '@' || at, key, 'dropped', model, purpose, prompt_tokens, completion_tokens, usd,
        1, at FROM replies WHERE key = ?""",
    "DELETE FROM replies WHERE key = ?",
)
# A payment is known by its key and time: in `replies` where its reply is kept, in `faults` where it is not.
MERGE = (
    """
    INSERT OR IGNORE INTO faults SELECT * FROM other.faults AS theirs WHERE kind NOT IN ('paid_twice', 'dropped')
        OR NOT EXISTS (SELECT 1 FROM main.replies AS ours WHERE ours.key = theirs.key AND ours.at = theirs.at)""",
    """
    INSERT OR IGNORE INTO faults
        SELECT theirs.key || '@' || theirs.at, theirs.key, 'paid_twice', theirs.model, theirs.purpose,
            theirs.prompt_tokens, theirs.completion_tokens, theirs.usd, 1, theirs.at
        FROM other.replies AS theirs JOIN main.replies AS ours ON ours.key = theirs.key WHERE ours.at != theirs.at""",
    """
    INSERT OR IGNORE INTO replies SELECT * FROM other.replies AS theirs
        WHERE NOT EXISTS (SELECT 1 FROM main.faults AS ours WHERE ours.id = theirs.key || '@' || theirs.at)""",
)


def lacks_its_log(path: Path) -> bool:
    """Return whether a journal was copied without its log, which the file's header says it has."""
    for _ in range(10):  # another process may be opening or closing the file just now
        if not path.is_file():
            return False
        with path.open("rb") as file:
            header = file.read(100)  # its fields: https://sqlite.org/fileformat.html
        ours = header.startswith(b"SQLite format 3\0") and header[60:64] == VERSION.to_bytes(4, "big")
        if not ours or header[18] != 2 or path.with_name(f"{path.name}-wal").exists():
            return False
        time.sleep(0.05)
    return True


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file; refuse a file that is something else."""
    connection.execute("BEGIN IMMEDIATE")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not tables:
        # In the transaction of `BEGIN IMMEDIATE`: of two processes that start at once, one makes the tables.
        for statement in SCHEMA:
            connection.execute(statement)
    # The application id tells a journal from any other sqlite file, such as a browser's or a tracker's.
    elif application != APPLICATION:
        raise sqlite3.DatabaseError("it is another kind of database. Name another file")
    elif version > VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, not {VERSION}. Upgrade hf_longalign")
    elif version < VERSION:  # the same tables
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


# Kept in the journal's file and not in memory, since several processes share one budget.
class Claim(Enum):
    """What came of asking for a claim."""

    MINE = "mine"
    ANSWERED = "answered"  # the reply is in the journal by now
    THEIRS = "theirs"  # another process is asking: wait for its reply
    NO_ROOM = "no room"  # what is set aside for requests under way fills the budget: wait for one to end


def new_owner() -> str:
    """Host, process id, start time and a random part: a name that no other journal, open now or later, will have."""
    import psutil

    return f"{socket.gethostname()}|{os.getpid()}|{psutil.Process().create_time():.0f}|{uuid.uuid4().hex[:8]}"


def is_alive(owner: str, until: float) -> bool:
    """Whether the process named by `owner` still runs; on another host, whether its lease does."""
    import psutil

    if owner.startswith(BATCH):  # until its batch is closed
        return True
    # From the right: a host name may hold the separator, numbers do not.
    host, pid, started, _ = owner.rsplit("|", 3)
    if host != socket.gethostname():
        return time.time() < abs(until)
    try:
        process = psutil.Process(int(pid))
        # The start time is computed from the clock at boot, which moves by a second or so.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(started)) < 5
    except psutil.NoSuchProcess:
        return False


def look(connection: sqlite3.Connection, key: str, owner: str) -> Claim | None:
    """Return why `key` need not be claimed by `owner` now (answered, or asked by a live process), else None."""
    if connection.execute("SELECT 1 FROM replies WHERE key = ?", (key,)).fetchone():
        return Claim.ANSWERED
    holder = connection.execute("SELECT owner, until FROM claims WHERE key = ?", (key,)).fetchone()
    return Claim.THEIRS if holder and holder[0] != owner and is_alive(*holder) else None


def claim(
    connection: sqlite3.Connection, request: Request, budget: Budget, owner: str, *, waits: bool = False
) -> Claim:
    """Claim `request`'s key for `owner`, inside the transaction of the caller. Raises `BudgetExceeded`.

    A claim that `owner` has already stays, if there is still room for it. One that `waits` for a batch costs nothing
    where its process is killed: nothing was sent.
    """
    # Again inside the transaction: between the look without a lock and this one another process may have claimed it.
    found = look(connection, request.key, owner)
    if found is not None:
        return found
    if connection.execute("SELECT 1 FROM claims WHERE key = ? AND owner != ?", (request.key, owner)).fetchone():
        reap(connection)  # `look` has found that its process is gone
    most = budget.most(request)
    if not budget.allows(_spent(connection) + _set_aside(connection, request.key), most):
        reap(connection)
        # Nothing is under way any more that could end below its limit and leave room.
        if not _set_aside(connection, request.key).tokens:
            raise BudgetExceeded(_what_is_left(connection, budget, most))
        return Claim.NO_ROOM
    until = (time.time() + LEASE_SECONDS) * (-1 if waits else 1)
    tokens = (request.most_prompt_tokens, request.sampling.token_limit)
    connection.execute(
        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (request.key, owner, until, request.model, request.purpose, *tokens, most.usd),
    )
    return Claim.MINE


def release(connection: sqlite3.Connection, key: str, owner: str) -> None:
    """Give up the claim that `owner` has on `key`, if it has one."""
    connection.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, owner))


def reap(connection: sqlite3.Connection, owner: str | None = None) -> None:
    """Turn into faults the claims of `owner`, or of every process that no longer runs."""
    for key, holder, until, model, purpose, prompt, completion, usd in connection.execute(
        "SELECT * FROM claims"
    ).fetchall():
        if holder == owner or (owner is None and not is_alive(holder, until)):
            release(connection, key, holder)
            if until >= 0:  # else it waited, see `claim`
                # Unconfirmed: the server may have billed nothing. To count less would let a run that is killed often
                # pass its limit.
                add_fault(connection, (key, "killed", model, purpose, prompt, completion, usd, 0))


def add_fault(connection: sqlite3.Connection, values: tuple[Any, ...]) -> None:
    """Note a fault that came just now; `values` are those of its columns between `id` and `at`."""
    row = (uuid.uuid4().hex, *values, time.time())
    connection.execute("INSERT INTO faults VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _spent(connection: sqlite3.Connection) -> Spend:
    """What all replies and faults have cost."""
    return Spend(*connection.execute("SELECT prompt_tokens + completion_tokens, usd FROM totals").fetchone())


def _set_aside(connection: sqlite3.Connection, but: str) -> Spend:
    """The most that the requests under way can cost, in all processes, leaving out the key `but`."""
    row = connection.execute(
        "SELECT TOTAL(prompt_tokens + completion_tokens), TOTAL(usd) FROM claims WHERE key != ?", (but,)
    ).fetchone()
    return Spend(int(row[0]), row[1])


def _what_is_left(connection: sqlite3.Connection, budget: Budget, most: Spend) -> str:
    gone, parts = _spent(connection), []
    (guessed,) = connection.execute("SELECT unconfirmed_tokens FROM totals").fetchone()
    if budget.tokens is not None:
        parts.append(f"{gone.tokens:,} of {budget.tokens:,} tokens (the next request may take {most.tokens:,})")
    if budget.usd is not None:
        parts.append(f"${gone.usd:.4f} of ${budget.usd:.4f} (the next request may cost ${most.usd:.4f})")
    if guessed:
        parts.append(f"{guessed:,} tokens of it by time-outs and kills, counted as the most they can be")
    return (
        f"The budget is spent: {', '.join(parts)}. Every reply is in the journal; raise `budget_tokens` or "
        "`budget_usd` and run again to continue."
    )


class JournalLedger:
    """The ledger of a run that asks in batches; see [`~hf_longalign.endpoint.batch.Ledger`]."""

    def __init__(self, journal: "Journal", budget: Budget) -> None:
        self.journal = journal
        self.budget = budget
        with journal.transaction() as connection:
            for statement in _BATCH_TABLES:
                connection.execute(statement)

    def open_batch(self, tag: str, place: str, requests: Sequence[Request]) -> None:
        """Note what is about to be sent; see `Ledger.open_batch`."""
        with self.journal.transaction() as connection:
            row = (tag, None, place, self.journal.owner, time.time())
            connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
            fields = ([r.messages, r.model, r.sampling.as_dict(), r.purpose, r.chat] for r in requests)
            lines = [(tag, json.dumps(request)) for request in fields]
            connection.executemany("INSERT INTO batch_requests VALUES (?, ?)", lines)
            # A claim of a process that was killed counts as paid; one of a batch waits for what the batch brings.
            holders = [(BATCH + tag, request.key) for request in requests]
            connection.executemany("UPDATE claims SET owner = ? WHERE key = ?", holders)

    def name_batch(self, tag: str, name: str) -> None:
        """Note what the other side calls it."""
        with self.journal.transaction() as connection:
            connection.execute("UPDATE batches SET name = ? WHERE tag = ?", (name, tag))

    def leave_batch(self, tag: str) -> None:
        """Stop following it; the next run does."""
        with self.journal.transaction() as connection:
            connection.execute("UPDATE batches SET owner = '' WHERE tag = ?", (tag,))

    def open_batches(self) -> list[OpenBatch]:
        """Every open batch but those that a live process is sending this moment."""
        found = []
        with self.journal.transaction() as connection:
            for tag, name, place, owner in connection.execute(
                "SELECT tag, name, place, owner FROM batches"
            ).fetchall():
                if name is None and owner and is_alive(owner, 0.0):
                    continue
                lines = connection.execute("SELECT request FROM batch_requests WHERE tag = ?", (tag,)).fetchall()
                requests = tuple(
                    Request(tuple(map(tuple, messages)), model, Sampling(**sampling), purpose, chat)
                    for messages, model, sampling, purpose, chat in (json.loads(line) for (line,) in lines)
                )
                found.append(OpenBatch(tag, name, place, requests))
        return found

    def store(self, request: Request, reply: Reply, price_share: float) -> Reply:
        """Put a reply into the journal with what it has cost."""
        spend = self.budget.at(price_share).cost(reply.prompt_tokens, reply.completion_tokens)
        return self.journal.put(request, reply, spend)

    def close_batch(self, tag: str, again: Sequence[Request] = ()) -> None:
        """Forget a batch; see `Ledger.close_batch`."""
        with self.journal.transaction() as connection:
            kept = [(self.journal.owner, request.key, BATCH + tag) for request in again]
            connection.executemany("UPDATE claims SET owner = ? WHERE key = ? AND owner = ?", kept)
            connection.execute("DELETE FROM claims WHERE owner = ?", (BATCH + tag,))
            connection.execute("DELETE FROM batch_requests WHERE tag = ?", (tag,))
            connection.execute("DELETE FROM batches WHERE tag = ?", (tag,))
