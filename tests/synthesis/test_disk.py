"""What is written appears whole or not at all, whoever else writes it and whenever a kill comes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hf_longalign.synthesis.disk import whole


def _write_folder(path, text):
    with whole(path) as unfinished:
        unfinished.mkdir()
        for number in range(5):
            (unfinished / f"{number}.txt").write_text(text)


def _read_folder(path):
    return [(path / f"{number}.txt").read_text() for number in range(5)]


def test_a_folder_replaces_the_one_before_and_a_failure_leaves_it(tmp_path):
    for text in ("one", "two"):
        _write_folder(tmp_path / "out", text)
        assert _read_folder(tmp_path / "out") == [text] * 5
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "out") as unfinished:
        unfinished.mkdir()
        raise ZeroDivisionError
    assert _read_folder(tmp_path / "out") == ["two"] * 5 and os.listdir(tmp_path) == ["out"]


def test_many_that_write_one_folder_at_once_all_succeed(tmp_path):
    failed = []

    def write(name):
        try:
            for _ in range(30):
                _write_folder(tmp_path / "out", name)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(set(_read_folder(tmp_path / "out"))) == 1 and os.listdir(tmp_path) == ["out"]


_KILLED_INSIDE = """
import os, signal, sys
from pathlib import Path
from hf_longalign.synthesis.disk import whole
with whole(Path(sys.argv[1])) as unfinished:
    unfinished.mkdir()
    (unfinished / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_left_is_removed_by_the_next_and_what_others_are_writing_stays(tmp_path):
    died = subprocess.run([sys.executable, "-c", _KILLED_INSIDE, tmp_path / "out"])
    assert died.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    host = socket.gethostname()
    mine = tmp_path / f"out.{host}-{os.getppid()}-1a2b3c4d.part"
    of_another_machine, forgotten, unrelated = (
        tmp_path / name for name in ("out.node7-1-1a2b3c4d.part", "out.node7-2-1a2b3c4d.part", "other.part")
    )
    for path in (mine, of_another_machine, forgotten, unrelated):
        path.write_text("")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(forgotten, (long_ago, long_ago))
    _write_folder(tmp_path / "out", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([mine.name, of_another_machine.name, "other.part", "out"])
