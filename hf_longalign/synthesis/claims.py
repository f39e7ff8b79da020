"""Who is asking what: a claim on a key keeps two processes from paying for one reply, and sets its cost aside.

A claim lives as long as its process. One that a killed process left behind becomes a fault "killed" that counts the
most its request can have cost, since nobody will say what was billed.
"""

import os
import socket
import sqlite3
import time
import uuid
from enum import Enum

from hf_longalign.endpoint.protocol import Request, RunStopped
from hf_longalign.synthesis.budget import Budget, Spend


# A process on another host (a container on the same disk) cannot be looked up: its claims end by the clock.
LEASE_SECONDS = 1800.0

TABLE = """
    CREATE TABLE claims (
        key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL, model TEXT NOT NULL, purpose TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL
    )"""


class BudgetExceeded(RunStopped):
    """What is left of the budget is less than the next request may cost."""


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

    host, pid, started, _ = owner.rsplit("|", 3)
    if host != socket.gethostname():
        return time.time() < until
    try:
        process = psutil.Process(int(pid))
        # The start time is computed from the clock at boot, which moves by a second or so.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(started)) < 5
    except psutil.NoSuchProcess:
        return False


def claim(connection: sqlite3.Connection, request: Request, budget: Budget, owner: str) -> Claim:
    """Claim `request`'s key for `owner`, inside the transaction of the caller. Raises `BudgetExceeded`.

    A claim that `owner` has already stays, if there is still room for it.
    """
    if connection.execute("SELECT 1 FROM replies WHERE key = ?", (request.key,)).fetchone():
        return Claim.ANSWERED
    holder = connection.execute("SELECT owner, until FROM claims WHERE key = ?", (request.key,)).fetchone()
    if holder and holder[0] != owner:
        if is_alive(*holder):
            return Claim.THEIRS
        reap(connection)
    most = budget.most(request)
    if not budget.allows(spent(connection) + set_aside(connection, request.key), most):
        reap(connection)
        if not set_aside(connection, request.key).tokens:
            raise BudgetExceeded(_what_is_left(budget, spent(connection), most, unconfirmed(connection)))
        return Claim.NO_ROOM
    until = time.time() + LEASE_SECONDS
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
            values = (uuid.uuid4().hex, key, "killed", model, purpose, prompt, completion, usd, 0, time.time())
            connection.execute("INSERT INTO faults VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            release(connection, key, holder)


def spent(connection: sqlite3.Connection) -> Spend:
    """What all replies and faults have cost."""
    return Spend(*connection.execute("SELECT prompt_tokens + completion_tokens, usd FROM totals").fetchone())


def set_aside(connection: sqlite3.Connection, but: str = "") -> Spend:
    """The most that the requests under way can cost, in all processes, leaving out the key `but`."""
    row = connection.execute(
        "SELECT TOTAL(prompt_tokens + completion_tokens), TOTAL(usd) FROM claims WHERE key != ?", (but,)
    ).fetchone()
    return Spend(int(row[0]), row[1])


def unconfirmed(connection: sqlite3.Connection) -> Spend:
    """The part of what is spent that nobody confirmed."""
    return Spend(*connection.execute("SELECT unconfirmed_tokens, unconfirmed_usd FROM totals").fetchone())


def _what_is_left(budget: Budget, gone: Spend, most: Spend, guessed: Spend) -> str:
    parts = []
    if budget.tokens is not None:
        parts.append(f"{gone.tokens:,} of {budget.tokens:,} tokens (the next request may take {most.tokens:,})")
    if budget.usd is not None:
        parts.append(f"${gone.usd:.4f} of ${budget.usd:.4f} (the next request may cost ${most.usd:.4f})")
    if guessed.tokens:
        parts.append(f"{guessed.tokens:,} tokens of it by time-outs and kills, counted as the most they can be")
    return (
        f"The budget is spent: {', '.join(parts)}. Every reply is in the journal; raise `budget_tokens` or "
        "`budget_usd` and run again to continue."
    )
