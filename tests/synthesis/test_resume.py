"""SIGKILL at any moment, Ctrl-C, a lost endpoint, a spent budget, two processes: nothing is paid for twice."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import forked
import pytest
from fake_endpoint import FakeEndpoint

from .kill_client import run


pytest.importorskip("openai", reason="needs hf_longalign[synthesis]")

CLIENT = Path(__file__).parent / "kill_client.py"
SEEDS = 200
AT_ONCE = 8  # the client's max_concurrency


def _start(folder, *servers, name="rows", seeds=f"0:{SEEDS}:1", budget=0, patience=60):
    urls = [server.url for server in servers]
    command = [sys.executable, CLIENT, name, folder, seeds, str(budget), str(patience), *urls]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def fork():
    """Starts the client in a process that has its imports already: a hundred starts are affordable."""

    def start(folder, *servers, seeds=f"0:{SEEDS}:1", budget=0, patience=60):
        urls = [server.url for server in servers]
        process = forked.context().Process(target=run, args=("rows", folder, seeds, budget, patience, *urls))
        process.start()
        return process

    return start


def _finish(process):
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def _rows(folder, *servers, **options):
    """The rows of a run to the end."""
    code, errors = _finish(_start(folder, *servers, **options))
    assert code == 0, errors
    return (folder / "rows-rows.jsonl").read_bytes()


def _wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _wait_for_requests(server, more):
    """Wait until the server was asked so many times more."""
    wanted = len(server.log) + more
    _wait_until(lambda: len(server.log) >= wanted)


def _query(folder, query):
    # Read only: closing it would else take a killed run's log into the file.
    with closing(sqlite3.connect(f"file:{folder}/journal.sqlite?mode=ro", timeout=60, uri=True)) as connection:
        return [value for (value,) in connection.execute(query)]


def _journaled(folder):
    """The prompts whose reply is in the journal."""
    return set(_query(folder, "SELECT json_extract(messages, '$[#-1][1]') FROM replies"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rows of a run that nothing disturbs."""
    with FakeEndpoint() as server:
        rows = _rows(tmp_path_factory.mktemp("undisturbed"), server)
    assert rows.count(b"\n") == SEEDS - 1 and len(server.log) == 2 * SEEDS
    return rows


class _Gate(FakeEndpoint):
    """Answers so many requests as it is let, and keeps the others waiting until their client is gone."""

    left = 0
    clients = 0

    async def _play(self, writer, entry):
        client = self.clients
        while not self.left or client != self.clients:
            if client != self.clients:
                return False
            await asyncio.sleep(0.001)
        self.left -= 1
        return await super()._play(writer, entry)

    def catch_up(self):
        """Take up what a client that is gone has sent: later it would pass for the next one's."""
        for _ in range(5):
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.005), self._loop).result()

    def answered(self):
        return [entry.prompt for entry in self.log if entry.answered]


def test_in_100_of_100_kills_between_replies_none_that_was_received_is_asked_for_again(tmp_path, undisturbed, fork):
    rng = random.Random(0)
    with _Gate() as server:
        for _ in range(100):
            more = rng.randrange(1, 5)
            wanted, server.left = len(server.answered()) + more, more
            process = fork(tmp_path, server)
            _wait_until(lambda wanted=wanted: len(server.answered()) == wanted)
            _wait_until(lambda: _journaled(tmp_path) == set(server.answered()))
            process.kill()
            process.join()
            server.catch_up()
            server.clients += 1
        assert len(server.answered()) < 2 * SEEDS  # every kill met a run with work left
        server.left = 2 * SEEDS
        rows = _rows(tmp_path, server)
    assert rows == undisturbed
    assert sorted(set(server.answered())) == sorted(server.answered()) and len(server.answered()) == 2 * SEEDS


def test_killed_at_any_moment_at_most_what_was_under_way_is_asked_again(tmp_path, undisturbed, fork):
    rng = random.Random(1)
    kept, lost = {}, 0
    with FakeEndpoint(latency=(0.03, 0.1)) as server:
        for _ in range(20):
            process = fork(tmp_path, server)
            _wait_for_requests(server, rng.randrange(10, 20))
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.join()
            time.sleep(0.2)  # the server may still be writing to nobody
            # What was on disk at an earlier kill has not been asked again.
            assert kept.items() <= server.asked().items()
            kept = {prompt: server.asked()[prompt] for prompt in _journaled(tmp_path)}
            lost += len(_query(tmp_path, "SELECT key FROM claims"))
        rows = _rows(tmp_path, server)
    assert rows == undisturbed
    # Claimed is what is under way and as much again that waits for a slot.
    assert 0 < len(server.log) - 2 * SEEDS <= lost <= 20 * 2 * AT_ONCE
    # Nobody knows what they have cost: the journal counts the most.
    assert _query(tmp_path, "SELECT kind FROM faults") == ["killed"] * lost
    assert _query(tmp_path, "SELECT unconfirmed_tokens FROM totals")[0] >= 20 * lost


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_replies_on_their_way(tmp_path, number):
    with FakeEndpoint(latency=(0.1, 0.3)) as server:
        process = _start(tmp_path, server, seeds="0:40:1")
        _wait_for_requests(server, 15)
        process.send_signal(number)
        code, errors = _finish(process)
        assert code in (-signal.SIGINT, 130, 143), errors
        asked = set(server.asked())
        assert asked == _journaled(tmp_path) and len(asked) < 80
        _rows(tmp_path, server, seeds="0:40:1")
    assert set(server.asked().values()) == {1}


def test_a_lost_endpoint_stops_the_run_and_another_goes_on(tmp_path):
    with FakeEndpoint(latency=(0.05, 0.1)) as first:
        process = _start(tmp_path, first, seeds="0:40:1", patience=0.5)
        _wait_for_requests(first, 15)
    code, errors = _finish(process)
    assert code == 1 and "No endpoint has answered" in errors
    kept = _journaled(tmp_path)
    with FakeEndpoint() as second:
        _rows(tmp_path, second, seeds="0:40:1")
    assert not kept & set(second.asked()) and len(kept) + len(second.log) == 80


def test_a_spent_budget_stops_the_run_and_a_larger_one_goes_on(tmp_path):
    with FakeEndpoint(latency=(0.02, 0.05)) as server:
        code, errors = _finish(_start(tmp_path, server, seeds="0:40:1", budget=1500))
        assert code == 1 and "The budget is spent" in errors and "of 1,500 tokens" in errors
        (spent,) = _query(tmp_path, "SELECT prompt_tokens + completion_tokens FROM totals")
        # Never over, and what is left is less than one request may take (its prompt's bytes + 64 + 8 + 20).
        assert 1500 - 300 < spent <= 1500
        assert set(server.asked()) == _journaled(tmp_path)
        again, errors = _finish(_start(tmp_path, server, seeds="0:40:1", budget=1500))
        assert again == 1 and "The budget is spent" in errors
        _rows(tmp_path, server, seeds="0:40:1", budget=100_000)
    assert set(server.asked().values()) == {1} and len(server.log) == 80


def test_two_processes_on_one_journal_share_the_replies(tmp_path):
    with FakeEndpoint(latency=(0.1, 0.4)) as one, FakeEndpoint(latency=(0.1, 0.4)) as two:
        up = _start(tmp_path, one, name="up", seeds="0:60:1")
        down = _start(tmp_path, two, name="down", seeds="59:-1:-1")
        assert [_finish(process)[0] for process in (up, down)] == [0, 0]
    asked = one.asked() + two.asked()
    assert len(asked) == 120 and set(asked.values()) == {1}
    assert one.log and two.log
    rows = [(tmp_path / f"rows-{name}.jsonl").read_text().splitlines() for name in ("up", "down")]
    assert rows[0] == rows[1][::-1]
