"""The tables of a journal, and the statements that change several of them at once."""

import sqlite3

from hf_longalign.synthesis import budget as claims


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
    claims.CLAIMS_TABLE,
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
