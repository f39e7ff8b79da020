"""Results survive a kill, and every process sees those of all."""

import json
import logging
import multiprocessing
import os
import signal
import threading

import pytest

from hf_longalign.evaluation.store import ResultStore


def test_what_was_added_is_there_for_every_later_process(tmp_path):
    with ResultStore(tmp_path, rank=0) as one, ResultStore(tmp_path, rank=1) as other:
        one.add("a", {"text": "naïve \ud800 \u2028 line\nbreak"})
        other.add("b", [1, 2])
        assert "b" not in one
        one.refresh()
        assert one.get("b") == [1, 2]
    with ResultStore(tmp_path, rank=5) as later:
        assert later.get("a")["text"] == "naïve \ud800 \u2028 line\nbreak"


@pytest.mark.parametrize("torn", [b'{"key": "b", "val', b"x" * 70_000])
def test_a_torn_line_is_left_out_and_the_next_is_whole(tmp_path, torn):
    with ResultStore(tmp_path) as store:
        store.add("a", 1)
    with (tmp_path / "results-0.jsonl").open("ab") as file:
        file.write(torn)
    with ResultStore(tmp_path, rank=1) as other:
        assert "a" in other and "b" not in other
    with ResultStore(tmp_path) as store:
        assert "a" in store and "b" not in store
        store.add("c", 3)
    lines = (tmp_path / "results-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "c"]


def add_until_killed(folder, told):
    with ResultStore(folder) as store:
        for number in range(1_000_000):
            store.add(str(number), number)
            told.send(number)


def test_sigkill_loses_nothing_that_was_added(tmp_path):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=add_until_killed, args=(tmp_path, sender))
    process.start()
    sender.close()
    added = [receiver.recv() for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while receiver.poll():
        try:
            added.append(receiver.recv())
        except EOFError:
            break
    with ResultStore(tmp_path) as store:
        assert all(store.get(str(number)) == number for number in added)


def test_waiting_sees_what_another_adds_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_longalign")
    with ResultStore(tmp_path, rank=0) as one, ResultStore(tmp_path, rank=1) as other:
        other.add("a", 1)
        timer = threading.Timer(0.2, other.add, ("b", 2))
        timer.start()
        one.wait_for(["a", "b"], every=0.01)
        timer.join()
    assert [record.getMessage() for record in caplog.records] == [
        f"Waiting for 1 results of other processes in {tmp_path}."
    ]


def test_an_unwritable_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ResultStore(tmp_path / "file")
