"""Journals that are merged: what is new is taken, what was paid twice counts twice, what is not whole is refused."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from hf_longalign.endpoint.protocol import Fault, Reply
from hf_longalign.synthesis.budget import Spend
from hf_longalign.synthesis.journal import Journal, JournalError

from .test_journal import _reply, _request


def _pay(path, number, usd, text="text"):
    with Journal(path) as journal:
        journal.put(_request(number), Reply(text, "stop", 5, 3, "tiny"), Spend(8, usd))


def _merged(into, *others):
    """How many replies were new, and what all have cost."""
    with Journal(into) as journal:
        return [journal.merge(other) for other in others], journal.totals().spend


def test_merging_takes_what_is_new(tmp_path):
    with Journal(tmp_path / "a.sqlite") as one, Journal(tmp_path / "b.sqlite") as two:
        one.put(_request(1), _reply(1))
        two.put(_request(1), _reply(10))
        two.put(_request(2), _reply(2), Spend(8, 0.5))
        assert one.merge(tmp_path / "b.sqlite") == 1
        assert one.get(_request(1).key) == _reply(1) and one.get(_request(2).key) == _reply(2)
        assert one.totals().spend == Spend(24, 0.5)
        two.fault(_request(3), Fault("wrong_model", 10, 5), Spend(15, 0.5))
        assert one.merge(tmp_path / "b.sqlite") == 0 == one.merge(tmp_path / "b.sqlite")
        assert one.totals().faults == 2 and one.totals().spend == Spend(39, 1.0)
    with pytest.raises(JournalError, match=r"missing\.sqlite"), Journal(tmp_path / "a.sqlite") as one:
        one.merge(tmp_path / "missing.sqlite")


def test_what_two_shards_have_paid_for_counts_twice_and_a_copy_once(tmp_path):
    a, b, c, d = (tmp_path / f"{name}.sqlite" for name in "abcd")
    _pay(a, 1, 1.0)
    _pay(a, 2, 2.0)
    _pay(b, 2, 2.0, "theirs")
    assert _merged(c, a, b, a, b) == ([2, 0, 0, 0], Spend(24, 5.0))
    assert _merged(d, b, a) == ([1, 1], Spend(24, 5.0))
    # Each holds the payments of all by now: nothing is counted anew, in whatever order.
    assert _merged(c, d, a) == ([0, 0], Spend(24, 5.0))
    assert _merged(d, c, b) == ([0, 0], Spend(24, 5.0))
    assert _merged(a, c, d) == ([0, 0], Spend(24, 5.0))
    with Journal(d) as journal:
        assert journal.get(_request(2).key).text == "theirs" and journal.totals().replies == 2


_PUT_TWO_AND_WAIT = """
import sys, time
from hf_longalign.endpoint.protocol import Reply, Request
from hf_longalign.synthesis.journal import Journal
journal = Journal(sys.argv[1])
for number in range(2):
    request = Request((("user", f"prompt {number}"),), "tiny")
    journal.put(request, Reply("text", "stop", 1, 1, "tiny"))
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture
def live(path):
    """A process that has put two replies and goes on."""
    process = subprocess.Popen([sys.executable, "-c", _PUT_TWO_AND_WAIT, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_live_shard_is_merged_whole_or_refused(tmp_path, path, live):
    copied = tmp_path / "copied.sqlite"
    with Journal(tmp_path / "all.sqlite") as journal:
        shutil.copy(path, copied)
        with pytest.raises(
            JournalError, match=r"copied\.sqlite-wal` along with it, or copy it once its run has ended"
        ):
            journal.merge(copied)
        assert journal.totals().replies == 0
        # The remedies of the message.
        shutil.copy(f"{path}-wal", f"{copied}-wal")
        assert journal.merge(copied) == 2
    with Journal(tmp_path / "in_place.sqlite") as journal:
        assert journal.merge(path) == 2
        live.kill()
        live.wait()
        assert journal.merge(path) == 0
    shutil.copy(path, tmp_path / "ended.sqlite")
    with Journal(tmp_path / "later.sqlite") as journal:
        assert journal.merge(tmp_path / "ended.sqlite") == 2


def test_what_another_program_opened_after_a_kill_is_merged_once_it_was_looked_at(tmp_path, path, live, caplog):
    live.kill()
    live.wait()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM replies").fetchone() == (2,)
    assert not path.with_name("journal.sqlite-wal").exists()
    with Journal(tmp_path / "all.sqlite") as journal:
        with pytest.raises(JournalError, match=r"If it is no copy, open it once \(`hf-longalign journal list journal"):
            journal.merge(path)
        Journal(path).close()
        assert "`journal.sqlite` may lack its last replies" in caplog.text
        assert journal.merge(path) == 2
        assert caplog.text.count("may lack") == 1


def test_a_journal_cut_short_by_copying_is_not_merged(tmp_path, path):
    with Journal(path) as journal:
        for number in range(200):
            journal.put(_request(number), Reply("text " * 200, "stop", 5, 3, "tiny"))
    short = tmp_path / "short.sqlite"
    short.write_bytes(path.read_bytes()[: 20 * 4096])
    with Journal(tmp_path / "all.sqlite") as journal, pytest.raises(JournalError, match=r"short\.sqlite"):
        journal.merge(short)
