"""A name has one holder, and what a lost process held is free."""

import os
import threading

import pytest

from hf_longalign.evaluation import claims
from hf_longalign.evaluation.claims import LIMIT, Claims


@pytest.fixture
def two(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    yield one, other
    one.close()
    other.close()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def elsewhere(one, other):
    """Let a process of this test be one of another machine, whose process ids say nothing."""
    sign = one.folder / f"{other.process}.alive"
    other.process = "0" * 12 + other.process[12:]
    other._sign = sign.rename(one.folder / f"{other.process}.alive")


def test_a_name_goes_to_one_of_many_at_once(tmp_path):
    everyone = [Claims(tmp_path) for _ in range(8)]
    names = [str(number) for number in range(50)]
    got = {one: [] for one in everyone}
    gate = threading.Barrier(len(everyone))

    def grab(one):
        gate.wait()
        got[one] += [name for name in names if one.take(name)]

    threads = [threading.Thread(target=grab, args=(one,)) for one in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for taken in got.values() for name in taken) == sorted(names)
    assert everyone[0].alive() == 8
    for one in everyone:
        one.close()


def test_another_machine_is_lost_when_it_gives_no_sign_for_long(two):
    one, other = two
    elsewhere(one, other)
    assert other.take("a") and other.take("b") and not one.take("a") and one.alive() == 2
    now = other._sign.stat().st_mtime
    os.utime(other._sign, (now - LIMIT / 2,) * 2)
    assert not one.take("a"), "a sign may come late"
    os.utime(other._sign, (now - LIMIT - 5,) * 2)
    assert one.alive() == 1 and one.take("a") and one.take("b")
    # It was only asleep: what it held is another's, and it must not write on.
    with pytest.raises(RuntimeError, match="gave no sign of life for 180 seconds"):
        other.check()
    other._sign.touch()
    assert not other.take("a")


def test_a_holder_that_is_gone_from_this_machine_is_lost_at_once(two):
    one, other = two
    other.process = f"{other.process[:12]}-{2**22 + 1}-{other.process[-8:]}"
    other._sign = other._sign.rename(one.folder / f"{other.process}.alive")
    assert other.take("a") and one.take("a")
    other._sign.touch()


def test_a_lost_process_that_was_clearing_up_is_cleared_up_after(two, tmp_path):
    one, other = two
    third = Claims(tmp_path)
    for lost in (other, third):
        elsewhere(one, lost)
    assert third.take("a") and other.take(f"what {third.process} held")
    for lost in (other, third):
        os.utime(lost._sign, (1, 1))
    assert one.take("a") and one.alive() == 1
    other._sign.touch()
    third._closed.set()


def test_two_that_clear_up_at_once_take_nothing_from_each_other(two, tmp_path):
    one, other = two
    lost = Claims(tmp_path)
    elsewhere(one, lost)
    assert lost.take("a")
    os.utime(lost._sign, (1, 1))
    read, seen, got = other._holder, [], []

    def read_and_be_overtaken(path):
        found = read(path)
        seen.append(path)
        if seen.count(one._path("a")) == 2 and not got:  # it is about to remove what the lost one held
            got.append(one.take("a"))
        return found

    other._holder = read_and_be_overtaken
    assert other.take("a") and got == [False]
    assert os.readlink(one._path("a")) == other.process
    lost._closed.set()


def test_disks_without_links_serve_one_process(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    one = Claims(tmp_path)
    assert one.take("a")
    other = Claims(tmp_path)
    with pytest.raises(
        ValueError, match="`output_dir` must be on a disk with symbolic links where processes share it"
    ):
        other.take("a")
    other.close()
    assert one.take("b")
    one.close()


def test_time_is_told_by_the_disk(two):
    one, other = two
    assert one.began <= other.began
    assert claims._machine() == one.process.split("-")[0]
