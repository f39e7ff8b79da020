"""Prompts are shared whole, asked once, and read by all."""

import json
import logging
import multiprocessing
import os
import signal
import threading

import pytest

from hf_longalign.evaluation.prompt import Completion, GenerationStats, Prompt
from hf_longalign.evaluation.runner import Examinee, ResultStore, answers, ask, share, spent


PROMPTS = [
    Prompt("needle", task, index, f"{task} {index} {depth}", ("a",), 8, length=length, depth=depth)
    for task in ("single", "multi_key")
    for length in (64, 128)
    for index in range(3)
    for depth in (0.0, 0.5, 1.0)
]


class Echo:
    """Answers with the prompt's own text and notes what it was asked; dies after so many answers."""

    def __init__(self, dies_after=None):
        self.asked, self.dies_after, self.stats = [], dies_after, GenerationStats()

    def generate(self, prompts):
        for prompt in reversed(prompts):
            if self.dies_after is not None and len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            self.stats.prompt_tokens += 10
            self.stats.seconds += 0.5
            yield prompt, Completion(f"echo {prompt.text}", 3)


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 100])
def test_shares_are_whole_groups_of_all_prompts(processes):
    shares = [share(PROMPTS, rank, processes) for rank in range(processes)]
    assert sorted(p.key for part in shares for p in part) == sorted(p.key for p in PROMPTS)
    groups = [{(p.task, p.length, p.index) for p in part} for part in shares]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_an_interrupted_run_asks_only_what_is_left(tmp_path):
    killed, goes_on = Echo(dies_after=7), Echo()
    with ResultStore(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        ask(Examinee("base", "id", killed), PROMPTS, store, progress=False)
    with ResultStore(tmp_path) as store:
        examinee = Examinee("base", "id", goes_on)
        ask(examinee, PROMPTS, store, progress=False)
        assert len(killed.asked) + len(goes_on.asked) == len(PROMPTS)
        assert [found.text for found in answers(examinee, PROMPTS, store)] == [f"echo {p.text}" for p in PROMPTS]
        ask(examinee, PROMPTS, store, progress=False)
    assert len(killed.asked) + len(goes_on.asked) == len(PROMPTS)
    total = spent(examinee, PROMPTS, store)  # of both runs
    assert (total.prompt_tokens, total.seconds) == (10 * len(PROMPTS), 0.5 * len(PROMPTS))


def test_another_model_does_not_read_these_answers(tmp_path):
    with ResultStore(tmp_path) as store:
        ask(Examinee("base", "id", Echo()), PROMPTS[:2], store, progress=False)
        other = Echo()
        ask(Examinee("base", "other id", other), PROMPTS[:2], store, progress=False)
    assert len(other.asked) == 2


def test_two_processes_equal_one(tmp_path):
    with ResultStore(tmp_path / "one") as store:
        ask(Examinee("base", "id", Echo()), PROMPTS, store, progress=False)
        expected = answers(Examinee("base", "id", Echo()), PROMPTS, store)
    with ResultStore(tmp_path / "two", 0) as first, ResultStore(tmp_path / "two", 1) as second:
        for rank, store in enumerate((first, second)):
            ask(Examinee("base", "id", Echo()), PROMPTS, store, rank=rank, processes=2, progress=False)
        assert answers(Examinee("base", "id", Echo()), PROMPTS, first) == expected


def test_what_was_spent_waits_for_the_other_process(tmp_path):
    with ResultStore(tmp_path, rank=0) as one, ResultStore(tmp_path, rank=1) as other:
        ask(Examinee("base", "m", Echo()), PROMPTS[::2], one)
        late = threading.Timer(0.3, ask, (Examinee("base", "m", Echo()), PROMPTS[1::2], other))
        late.start()
        assert spent(Examinee("base", "m", Echo()), PROMPTS, one).prompt_tokens == 10 * len(PROMPTS)
        late.join()


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
