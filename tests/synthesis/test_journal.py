"""The journal: nothing lost, nothing twice, on a full disk, after a kill, from several threads and processes."""

import json
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from hf_longalign.endpoint.protocol import Fault, Reply, Request, Sampling
from hf_longalign.synthesis.budget import Budget, BudgetExceeded, Spend
from hf_longalign.synthesis.disk import network_file_system
from hf_longalign.synthesis.journal import Journal, JournalError
from hf_longalign.synthesis.tables import Claim


NO_BUDGET = Budget()


def _request(number=0, **sampling):
    return Request((("user", f"prompt {number}"),), "tiny", Sampling(max_tokens=10, **sampling))


def _reply(number=0):
    return Reply(f"réponse {number}\x00🎉", "stop", 5, 3, "tiny")


def test_a_reply_is_there_again_after_reopening(path):
    with Journal(path) as journal:
        assert journal.get(_request().key) is None
        assert journal.put(_request(), _reply()) == _reply()
    with Journal(path) as journal:
        assert journal.get(_request().key) == _reply()


def test_the_first_reply_to_a_key_stays(path):
    with Journal(path) as journal:
        journal.put(_request(), _reply(1))
        assert journal.put(_request(), _reply(2)) == _reply(1)
        assert journal.totals().replies == 1 and journal.totals().spend.tokens == 8


def test_totals_count_replies_and_faults(path):
    with Journal(path) as journal:
        journal.put(_request(1), _reply(), Spend(8, 0.25))
        journal.fault(_request(2), Fault("wrong_model", 10, 5), Spend(15, 0.5))
        journal.fault(_request(2), Fault("timeout", 20, 7, confirmed=False), Spend(27, 1.0))
        totals = journal.totals()
    assert (totals.replies, totals.faults) == (1, 2)
    assert totals.spend == Spend(50, 1.75) and totals.unconfirmed == Spend(27, 1.0)


def test_what_is_dropped_is_asked_again_and_what_it_cost_stays_counted(path, tmp_path):
    with Journal(path) as journal:
        for number in range(4):
            text = "" if number % 2 else "fine"
            journal.put(_request(number), Reply(text, "stop", 5, 3, "tiny"), Spend(8, 0.25))
        with Journal(tmp_path / "copy.sqlite") as copy:
            copy.merge(path)
        before = journal.totals()
        assert journal.drop(lambda entry: not entry.text) == 2
        after = journal.totals()
        assert (after.replies, after.faults, after.spend) == (2, 2, before.spend) and not after.unconfirmed.tokens
        assert journal.get(_request(1).key) is None and journal.get(_request(2).key).text == "fine"
        # It does not come back with a copy from before, nor is it counted again.
        assert journal.merge(tmp_path / "copy.sqlite") == 0 and journal.totals() == after
        assert journal.claim(_request(1), NO_BUDGET) is Claim.MINE
        journal.put(_request(1), _reply(), Spend(8, 0.25))
        assert journal.totals().spend == Spend(40, 1.25)
        assert journal.drop(lambda entry: False) == 0
    with Journal(tmp_path / "other.sqlite") as other:
        other.merge(path)
        assert other.totals().spend == Spend(40, 1.25)


def test_two_journals_claim_a_key_once(path):
    with Journal(path) as one, Journal(path) as two:
        assert one.claim(_request(), NO_BUDGET) is Claim.MINE
        assert two.claim(_request(), NO_BUDGET) is Claim.THEIRS
        one.release(_request())
        assert two.claim(_request(), NO_BUDGET) is Claim.MINE
        two.put(_request(), _reply())
        assert one.claim(_request(), NO_BUDGET) is Claim.ANSWERED


_CLAIM_AND_DIE = """
import os, signal, sys
from hf_longalign.synthesis.budget import Budget
from hf_longalign.endpoint.protocol import Request, Sampling
from hf_longalign.synthesis.journal import Journal
request = Request((("user", "prompt 0"),), "tiny", Sampling(max_tokens=10))
assert Journal(sys.argv[1]).claim(request, Budget(tokens=1000)).value == "mine"
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_claim_of_a_killed_process_ends_and_counts_the_most_it_can_have_cost(path):
    died = subprocess.run([sys.executable, "-c", _CLAIM_AND_DIE, path]).returncode
    assert died == -signal.SIGKILL
    with Journal(path) as journal:
        assert journal.claim(_request(), NO_BUDGET) is Claim.MINE
        assert journal.totals().unconfirmed.tokens == _request().most_prompt_tokens + 10
        assert journal.totals().faults == 1


def test_what_is_under_way_fills_the_budget(path):
    most = _request().most_prompt_tokens + 10
    budget = Budget(tokens=2 * most + 8)
    with Journal(path) as one, Journal(path) as two:
        assert one.claim(_request(1), budget) is Claim.MINE
        assert two.claim(_request(2), budget) is Claim.MINE
        assert one.claim(_request(3), budget) is Claim.NO_ROOM
        two.put(_request(2), _reply())  # 8 of its tokens were used
        assert one.claim(_request(3), budget) is Claim.MINE
        one.put(_request(1), _reply())
        one.put(_request(3), _reply())
        for number in range(4, 100):
            try:
                one.claim(_request(number), budget)
            except BudgetExceeded as reason:
                assert "raise `budget_tokens`" in str(reason)
                break
            one.put(_request(number), _reply())
        spent = one.totals().spend.tokens
        assert budget.tokens - most - 2 < spent <= budget.tokens


def test_a_budget_in_dollars_holds_too(path):
    budget = Budget(usd=0.001, prompt_price=1.0, completion_price=10.0)
    with Journal(path) as journal:
        for number in range(100):
            request = _request(number)
            try:
                journal.claim(request, budget)
            except BudgetExceeded as reason:
                assert "$0.00" in str(reason)
                break
            journal.put(request, _reply(), budget.cost(5, 3))
        assert 0 < number < 100 and 0.0008 < journal.totals().spend.usd <= 0.001


def test_a_budget_without_prices_is_refused():
    with pytest.raises(ValueError, match="prompt_price"):
        Budget(usd=1.0)


def _spend_all(path, name, budget):
    with Journal(path) as journal:
        for number in range(300):
            request = _request(f"{name} {number}")
            while (claim := journal.claim(request, budget)) is Claim.NO_ROOM:
                pass
            assert claim is Claim.MINE
            journal.put(request, _reply())


def test_two_processes_never_pass_one_budget(path):
    Journal(path).close()
    budget = Budget(tokens=1000)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spend_all, args=(path, name, budget)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 1  # BudgetExceeded
    with Journal(path) as journal:
        assert 1000 - 200 < journal.totals().spend.tokens <= 1000


def test_threads_write_together(path):
    with Journal(path) as journal:

        def write(name):
            for number in range(100):
                journal.put(_request(f"{name} {number}"), _reply())

        threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.totals().replies == 400 == len(list(journal.entries()))


def test_equal_journals_give_equal_exports(tmp_path):
    exports = []
    for name, order in (("a", range(50)), ("b", reversed(range(50)))):
        with Journal(tmp_path / f"{name}.sqlite") as journal:
            for number in order:
                journal.put(_request(number), _reply(number))
            assert journal.export(tmp_path / f"{name}.jsonl") == 50
        exports.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert exports[0] == exports[1]
    first = json.loads(exports[0].splitlines()[0])
    assert first["messages"][0][0] == "user" and first["sampling"]["max_tokens"] == 10 and first["text"][:3] == "rép"
    assert not list(tmp_path.glob("*.part"))


def test_a_journal_of_the_version_before_is_taken_as_it_is(path):
    with Journal(path) as journal:
        journal.put(_request(), _reply())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA journal_mode = WAL")
    assert path.read_bytes()[18] == 2 and not path.with_name("journal.sqlite-wal").exists()
    with Journal(path) as journal:
        assert journal.get(_request().key) == _reply()
    assert path.read_bytes()[18] == 1


@pytest.fixture
def on_nfs(monkeypatch):
    monkeypatch.setattr("hf_longalign.synthesis.journal.network_file_system", lambda folder: "nfs4")


def test_on_a_network_s_disk_there_is_no_shared_log_and_every_commit_is_flushed(path, on_nfs):
    with Journal(path) as one, Journal(path) as two:
        one.put(_request(1), _reply(1))
        assert two.claim(_request(2), NO_BUDGET) is Claim.MINE
        assert one.claim(_request(2), NO_BUDGET) is Claim.THEIRS
        two.put(_request(2), _reply(2))
        assert one.get(_request(2).key) == _reply(2)
        assert one._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert one._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert not path.with_name("journal.sqlite-shm").exists()
    with Journal(path) as journal:
        assert journal.totals().replies == 2


def test_on_a_network_s_disk_another_machine_is_refused_until_it_is_gone(path, on_nfs, monkeypatch):
    with Journal(path) as journal:
        journal.put(_request(), _reply())
        monkeypatch.setattr("socket.gethostname", lambda: "node7")
        with pytest.raises(JournalError, match=r"\(nfs4\) and is in use by .*`--num_shards`.*delete `(.+)`") as caught:
            Journal(path)
    mark = path.with_name(re.search("delete `(.+)`", str(caught.value))[1])
    old = time.time() - 400
    os.utime(mark, (old, old))
    with Journal(path) as journal:
        assert journal.get(_request().key) == _reply() and mark.read_text() == "node7"
        # Should two machines have come at once, the one whose mark was overwritten stops.
        mark.write_text("node8")
        deadline = time.monotonic() + 60
        while journal._lost is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(JournalError, match="in use by the machine node8"):
            journal.get("key")
        mark.unlink()
        journal._lost = None
    with Journal(path) as journal:
        assert journal.totals().replies == 1


def test_file_systems_are_known_by_the_mount_that_a_folder_lies_on(tmp_path, monkeypatch):
    kinds = {"": "xfs", "home": "nfs4", "home/local": "ext4", "work": "lustre", "s3": "fuse.s3fs"}
    mounts = [type("disk", (), {"mountpoint": str(tmp_path / name), "fstype": kinds[name]}) for name in kinds]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    expected = {**kinds, "": None, "home/local": None, "home/me": "nfs4", "home/local/b": None, "other": None}
    assert {name: network_file_system(tmp_path / name) for name in expected} == expected


def test_a_full_disk_is_said_and_survived(path, monkeypatch):
    with Journal(path) as journal:
        journal.put(_request(0), _reply(0))
        # sqlite's own "disk full", at the size the file has now.
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count = {pages}")
        long = Reply("x" * 100_000, "stop", 5, 3, "tiny")
        with pytest.raises(JournalError, match="full") as caught:
            journal.put(_request(1), long)
        assert str(path.parent) not in str(caught.value) and caught.value.__cause__ is None
        assert journal.get(_request(0).key) == _reply(0) and journal.get(_request(1).key) is None
        journal._connection.execute("PRAGMA max_page_count = 1000000")
        assert journal.put(_request(1), long) == long
    with Journal(path) as journal:
        assert journal.get(_request(1).key) == long


def test_nothing_is_sent_while_the_disk_is_nearly_full(path, monkeypatch):
    with Journal(path) as journal:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
        with pytest.raises(JournalError, match="is full"):
            journal.claim(_request(), NO_BUDGET)
        journal.put(_request(), _reply())  # what is paid for is still taken


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no journal at all, but long enough to be looked into " * 100)
    with pytest.raises(JournalError, match=r"notes\.txt") as caught:
        Journal(path)
    assert str(tmp_path) not in str(caught.value)
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as connection:
        connection.execute("CREATE TABLE replies (question, answer)")
    with pytest.raises(JournalError, match=r"other\.sqlite"):
        Journal(tmp_path / "other.sqlite")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of a fork with threads
def test_a_forked_journal_is_refused(path):
    with Journal(path) as journal:
        pid = os.fork()
        if not pid:
            try:
                journal.get("key")
            except RuntimeError:
                os._exit(42)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


_PUT_AND_DIE = """
import os, signal, sys
from hf_longalign.endpoint.protocol import Reply, Request
from hf_longalign.synthesis.journal import Journal
journal = Journal(sys.argv[1])
for number in range(100):
    request = Request((("user", f"prompt {number}"),), "tiny")
    journal.put(request, Reply("text", "stop", 1, 1, "tiny"))
    print(request.key, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", [None, "nfs"])
def test_what_put_has_returned_survives_a_kill(path, kind):
    disk = f"import hf_longalign.synthesis.journal as j; j.network_file_system = lambda folder: {kind!r}\n"
    died = subprocess.run([sys.executable, "-c", disk + _PUT_AND_DIE, path], stdout=subprocess.PIPE, text=True)
    assert died.returncode == -signal.SIGKILL and path.with_name("journal.sqlite-wal").exists() is not bool(kind)
    keys = died.stdout.split()
    with Journal(path) as journal:
        assert len(keys) == 100 and all(journal.get(key) for key in keys)


def _intercept(monkeypatch, execute):
    """Let `execute(run, statement, *arguments)` stand in for the `execute` of every connection."""

    class Connection(sqlite3.Connection):
        def execute(self, *asked):
            return execute(super().execute, *asked)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Connection, **options))


def test_a_journal_that_another_is_making_is_waited_for(tmp_path, monkeypatch):
    """SQLite says so at once, not after its time-out, when two turn on the write-ahead log together."""
    refusals = ["database is locked"] * 3

    def execute(run, statement, *arguments):
        if statement.startswith("PRAGMA journal_mode") and refusals:
            raise sqlite3.OperationalError(refusals.pop())
        return run(statement, *arguments)

    _intercept(monkeypatch, execute)
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.totals().replies == 0
    assert not refusals
    refusals.append("disk I/O error")
    with pytest.raises(JournalError, match="disk I/O error"):
        Journal(tmp_path / "journal.sqlite")


def test_a_file_system_that_takes_no_shared_log_is_refused_by_name(tmp_path, monkeypatch):
    wal = "PRAGMA journal_mode = wal"
    _intercept(monkeypatch, lambda run, asked, *more: run("SELECT 'delete'" if asked == wal else asked, *more))
    refusal = r"journal mode 'wal' but 'delete'\. Set `journal` to a file on a disk of this"
    with pytest.raises(JournalError, match=refusal):
        Journal(tmp_path / "journal.sqlite")
