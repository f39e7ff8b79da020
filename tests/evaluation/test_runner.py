"""Prompts are shared whole, asked once, and read by all."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from tqdm import tqdm

from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.runner import Examinee, ResultStore, answers, ask, spent
from hf_longalign.records.report import Speed


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
        self.asked, self.dies_after, self.stats = [], dies_after, Speed()

    def generate(self, prompts):
        for prompt in reversed(prompts):
            if self.dies_after is not None and len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            self.stats.prompt_tokens += 10
            self.stats.seconds += 0.5
            yield prompt, Completion(f"echo {prompt.text}", 3)


def test_the_bar_counts_what_is_read(tmp_path, monkeypatch):
    """A batch is answered when it is full; until then a bar of answers would stand still."""
    shown = []

    class Reader(Echo):
        def generate(self, prompts):
            for prompt in (*prompts[:2], *prompts):  # memory ran out behind the second
                self.on_read(prompt)
            shown.append(bars[-1].n)
            yield from super().generate(prompts)

    bars = []
    monkeypatch.setattr(
        "hf_longalign.evaluation.runner.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1]
    )
    with ResultStore(tmp_path) as store:
        for generator in (Reader(), Echo()):
            ask(Examinee("base", type(generator).__name__, generator), PROMPTS, store)
    per_task = [bar.total for bar in bars]
    assert shown == per_task[: len(shown)] and [bar.n for bar in bars] == per_task and len(bars) == 2 * len(shown)


def test_open_keys_go_to_one_process_each_in_whole_units(tmp_path):
    units = [[f"{unit}-{depth}" for depth in range(3)] for unit in range(10)]
    with ResultStore(tmp_path) as one, ResultStore(tmp_path) as two:
        two.add("0-1", "known")
        given = {one: [], two: []}
        sources = {store: store.open_keys(units) for store in given}
        while sources:
            for store, source in list(sources.items()):
                keys = next(source, None)
                if keys is None:
                    del sources[store]
                    continue
                given[store] += keys
                for key in keys:
                    store.add(key, "told")
        assert len({key.split("-")[0] for key in given[one]} & {key.split("-")[0] for key in given[two]}) == 0
        assert sorted(given[one] + given[two]) == sorted({key for unit in units for key in unit} - {"0-1"})
        assert all(given.values()), "both have some"
    with ResultStore(tmp_path) as alone:
        assert next(alone.open_keys([*units, ["x"], ["y"]])) == ["x", "y"], "alone it takes all at once"


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
    with ResultStore(tmp_path / "two") as first, ResultStore(tmp_path / "two") as second:
        one, two = Echo(), Echo()
        threads = [
            threading.Thread(
                target=ask, args=(Examinee("base", "id", echo), PROMPTS, store), kwargs={"progress": False}
            )
            for echo, store in ((one, first), (two, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(p.key for p in one.asked + two.asked) == sorted(p.key for p in PROMPTS), "each once"
        first.refresh()
        assert answers(Examinee("base", "id", Echo()), PROMPTS, first) == expected


def test_what_was_added_is_there_for_every_later_process(tmp_path):
    with ResultStore(tmp_path) as one, ResultStore(tmp_path) as other:
        one.add("a", {"text": "naïve \ud800 \u2028 line\nbreak"})
        other.add("b", [1, 2])
        assert "b" not in one
        one.refresh()
        assert one.get("b") == [1, 2]
    with ResultStore(tmp_path) as later:
        assert later.get("a")["text"] == "naïve \ud800 \u2028 line\nbreak"


@pytest.mark.parametrize("torn", [b'{"key": "b", "val', b"x" * 70_000])
def test_a_torn_line_is_left_out_and_the_next_is_whole(tmp_path, torn):
    with ResultStore(tmp_path) as store:
        store.add("a", 1)
    with (tmp_path / "results-0.jsonl").open("ab") as file:
        file.write(torn)
    with ResultStore(tmp_path) as other:
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


def test_one_process_makes_what_all_need_once(tmp_path):
    made, found = [], []

    def make():
        made.append(1)
        time.sleep(0.2)
        return {"samples": 7}

    with ResultStore(tmp_path) as one, ResultStore(tmp_path) as other:
        threads = [threading.Thread(target=lambda s=s: found.append(s.once("plan", make))) for s in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made == [1] and found == [{"samples": 7}] * 2


def hold(folder, told):
    with ResultStore(folder) as store:
        for keys in store.open_keys([["a"], ["b"], ["c"], ["d"], ["e"]]):
            told.send(keys)
            time.sleep(600)


def test_what_a_killed_process_held_is_asked_by_the_others(tmp_path):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(tmp_path, sender))
    process.start()
    held = receiver.recv()
    with ResultStore(tmp_path) as store:
        units = [["a"], ["b"], ["c"], ["d"], ["e"]]
        assert held == ["a", "b", "c", "d", "e"] and not list(store.open_keys(units)), "it lives"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        keys = next(store.open_keys(units[:1]))
        assert keys == ["a"]


def test_who_never_came_is_told_and_made_up_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hf_longalign.evaluation.runner.LIMIT", 0.0)
    with ResultStore(tmp_path, expected=3) as store, ResultStore(tmp_path, expected=3) as other:
        for keys in store.open_keys([["a"], ["b"]]):
            for key in keys:
                store.add(key, 1)
        assert not store.missing(["a", "b"]) and list(other.open_keys([["a"], ["b"]])) == []
        store.tell_who_is_missing()
    assert len(caplog.records) == 2, "each process tells it once"
    (told,) = {record.getMessage() for record in caplog.records}
    assert "3 processes were started, and 2 came" in told and "set `output_dir` to a folder that all share" in told


def test_an_unwritable_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ResultStore(tmp_path / "file")
