"""When a run must stop: what it may spend, with claims that set money aside, and when asking is of no use.

A claim on a key keeps two processes from paying for one reply. It lives as long as its process. One that a killed
process left behind becomes a fault "killed" that counts the most its request can have cost, since nobody will say what
was billed.
"""

import os
import socket
import sqlite3
import time
import uuid
from dataclasses import dataclass, replace
from enum import Enum

from hf_longalign.endpoint.protocol import TOO_LONG, EndpointError, GenerationError, Request, RunStopped


# A process on another host (a container on the same disk) cannot be looked up: its claims end by the clock.
LEASE_SECONDS = 1800.0
# What the owner of a claim begins with where a batch holds it, followed by the batch's tag.
BATCH = "batch|"

CLAIMS_TABLE = """
    CREATE TABLE claims (
        key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL, model TEXT NOT NULL, purpose TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL
    )"""


@dataclass(frozen=True)
class Spend:
    """Tokens and dollars, spent or set aside."""

    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(self.tokens + other.tokens, self.usd + other.usd)


@dataclass(frozen=True)
class Budget:
    """Limits over everything the journal holds, earlier runs and other processes included.

    Before a request is sent, the most it can cost is set aside, so that a limit is never passed. Prices are in dollars
    per million tokens, as price lists give them.

    >>> budget = Budget(usd=1.0, prompt_price=0.15, completion_price=0.60)
    >>> budget.cost(1_000_000, 500_000)
    Spend(tokens=1500000, usd=0.45)
    >>> budget.allows(Spend(10, 0.99), Spend(10, 0.02))
    False
    """

    tokens: int | None = None
    usd: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tokens", "usd"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"`budget_{name}` must be above 0, got {limit!r}. Set None for no limit.")
        for name in ("prompt_price", "completion_price"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` must be at least 0, got {getattr(self, name)!r}. Set it to $ per 1M tokens."
                )
        if self.usd is not None and not self.prompt_price and not self.completion_price:
            raise ValueError(
                "`budget_usd` must come with prices, got none. Set `prompt_price` and `completion_price` in dollars "
                "per million tokens."
            )

    def at(self, share: float) -> "Budget":
        """The same limits at a share of the prices, such as 0.5 in a Batch API."""
        return replace(self, prompt_price=share * self.prompt_price, completion_price=share * self.completion_price)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Spend:
        """What these tokens cost."""
        usd = (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6
        return Spend(prompt_tokens + completion_tokens, usd)

    def most(self, request: Request) -> Spend:
        """The most one attempt at `request` can cost."""
        return self.cost(request.most_prompt_tokens, request.sampling.token_limit)

    def allows(self, committed: Spend, more: Spend) -> bool:
        """Whether `more` fits beside what is spent or set aside."""
        total = committed + more
        return (self.tokens is None or total.tokens <= self.tokens) and (self.usd is None or total.usd <= self.usd)


class BudgetExceeded(RunStopped):
    """What is left of the budget is less than the next request may cost."""


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
            if until < 0:  # it waited, see `claim`
                continue
            # Unconfirmed: the server may have billed nothing. To count less would let a run that is killed often pass
            # its limit.
            values = (uuid.uuid4().hex, key, "killed", model, purpose, prompt, completion, usd, 0, time.time())
            connection.execute("INSERT INTO faults VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


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


# So many requests in a row without a reply, or replies of no use, and the rest would fare no better.
HOPELESS = 20
# A streak is no chance where it would be rarer than this at the rate seen before it.
_CHANCE = 1e-6
# Seeds of one task stand together, and one task may fail as a whole where the others do well.
_LONG = 200
_SHOWN = 300


class Breaker:
    """Notes what became of a run's requests and says when to stop.

    Replies that cannot be read or fail a check are unusable. A run whose replies are all unusable stops after 20 of
    them; one that had better ones stops after a streak of at least 200 that has a chance of less than one in a million
    at the share of unusable ones before it. What an earlier run paid for counts towards that share and in no streak,
    so that a rerun goes on past the same replies.

    >>> breaker = Breaker()
    >>> for number in range(20):
    ...     breaker.paid(f"key {number}")
    ...     stop = breaker.unusable("parse: no context", f"key {number}", "As you wish.")
    >>> str(stop)[:68]
    'None of the last 20 replies can be used. The first: parse: no contex'
    """

    def __init__(self) -> None:
        self._paid: set[str] = set()
        self._seen = self._unusable = self._streak = self._refused = 0
        self._first = ""
        self._any_reply = False

    def paid(self, key: str) -> None:
        """A reply came from the generator, not from the journal."""
        self._paid.add(key)
        self.replied()

    def replied(self) -> None:
        """There is a reply, so not every request is refused."""
        self._any_reply = True
        self._refused = 0

    def usable(self) -> None:
        """A context, or a pair, went through all checks."""
        # A usable reply ends the streak, and what was in it now counts towards the share.
        self._seen += self._streak + 1
        self._unusable += self._streak
        self._streak = 0

    def unusable(self, reason: str, key: str, text: str) -> RunStopped | None:
        """The reply `text` to the request `key` cannot be used; returns why the run must stop, if it must."""
        if key not in self._paid:
            self._seen += 1
            self._unusable += 1
            return None
        if not self._streak:
            self._first = f"{reason}, in {' '.join(text.split())[:_SHOWN]!r}"
        self._streak += 1
        # Laplace's rule of succession: neither 0 nor 1 before anything was seen.
        share = (self._unusable + 1) / (self._seen + 2)
        least = HOPELESS if self._seen == self._unusable else _LONG
        if self._streak < least or share**self._streak > _CHANCE:
            return None
        return RunStopped(
            f"None of the last {self._streak} replies can be used. The first: {self._first}. Check the model, its "
            "chat template, `max_tokens` and the checks. The replies are in the journal; run again to go on all the "
            "same."
        )

    def refused(self, error: GenerationError) -> RunStopped | None:
        """The endpoint will not serve a request; returns why the run must stop, if it must.

        Texts that are too long may well stand together: they stop a run only where nothing else is served.
        """
        if self._any_reply and error.kind == TOO_LONG:
            return None
        self._refused += 1
        return self.hopeless(error) if self._refused >= HOPELESS else None

    def hopeless(self, error: GenerationError) -> EndpointError:
        """Why to stop where every request is refused."""
        return EndpointError(f"Every request is refused. The last: {error} Mend that and run again.")
