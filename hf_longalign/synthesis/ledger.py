"""Open batches in the journal: what was sent as a file and has not come back yet."""

import json
import time
from collections.abc import Sequence

from hf_longalign.endpoint.batch import OpenBatch
from hf_longalign.endpoint.protocol import Reply, Request, Sampling
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.tables import BATCH, is_alive


_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS batches (
        tag TEXT PRIMARY KEY, name TEXT, place TEXT NOT NULL, owner TEXT NOT NULL, at REAL NOT NULL
    )""",
    "CREATE TABLE IF NOT EXISTS batch_requests (tag TEXT NOT NULL, request TEXT NOT NULL)",
)


class JournalLedger:
    """The ledger of a run that asks in batches; see [`~hf_longalign.endpoint.batch.Ledger`]."""

    def __init__(self, journal: Journal, budget: Budget) -> None:
        self.journal = journal
        self.budget = budget
        with journal.transaction() as connection:
            for statement in _TABLES:
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
