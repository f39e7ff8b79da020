"""How many samples are asked: within the minutes, the same in every process, more where intervals are wide."""

import json
import platform
from dataclasses import asdict, replace

import numpy as np
import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_longalign.evaluation.models import Examined
from hf_longalign.evaluation.options import SuiteOptions
from hf_longalign.evaluation.plan import (
    FEWEST,
    MOST,
    Cost,
    announce,
    cells_to_refine,
    fit,
    plan_grid,
    seconds_per_token,
)
from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.results import suite_result
from hf_longalign.evaluation.runner import Examinee, PromptSuite, ResultStore
from hf_longalign.evaluation.suites import score_puzzle


@pytest.mark.parametrize("minutes", [0.5, 5.0, 50.0])
def test_the_grid_keeps_to_its_minutes(minutes):
    options = SuiteOptions(suites=["needle", "puzzles", "ruler"], minutes=minutes)
    grid = fit(Cost(0.001, 1e-8, 0.01), 2, options, [1024, 4096, 16384])
    assert FEWEST <= grid.samples <= MOST
    assert grid.minutes <= minutes or (grid.samples, grid.lengths) == (FEWEST, [1024])
    if grid.samples < MOST and len(grid.lengths) == 3:
        more = grid.minutes / grid.samples * (grid.samples + 1)
        assert more > minutes


def keys_of(folder):
    keys = {json.loads(line)["key"] for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()}
    return {key for key in keys if key.startswith("plan/")}


def test_what_was_planned_is_planned_again(tmp_path):
    model, options = tiny_llama(), SuiteOptions(minutes=0.1)
    with ResultStore(tmp_path) as store, ResultStore(tmp_path) as other:
        first = plan_grid(model, ["a"], options, [256, 512], store)
        assert first.lengths[0] == 256
        (key,) = keys_of(tmp_path)
        store.add(key, {**asdict(first), "samples": 7})
        # A slower machine, or another process, asks what was decided.
        assert plan_grid(model, ["a"], options, [256, 512], store).samples == 7
        assert plan_grid(model, ["a"], options, [256, 512], other).samples == 7
        elsewhere = replace(options, output_dir="elsewhere")
        assert plan_grid(model, ["a"], elsewhere, [256, 512], store).samples == 7
        assert plan_grid(model, ["a"], SuiteOptions(samples=4), [256], store).samples == 4
        assert plan_grid(None, ["a"], SuiteOptions(), [256], store).samples == 10
        assert plan_grid(model, ["a"], SuiteOptions(suites=["short"]), [256], store).minutes == 0
        assert keys_of(tmp_path) == {key}
        plan_grid(model, ["b"], options, [256, 512], store)
        assert len(keys_of(tmp_path)) == 2, "another model has a plan of its own"


def test_minutes_that_are_too_few_are_told(tmp_path, caplog):
    asked = [SuiteOptions(minutes=1.0), SuiteOptions(minutes=1.0, suites=["puzzles"])]
    for place, options in enumerate(asked):
        with ResultStore(tmp_path / str(place)) as store:
            store.add(f"speed/a/{platform.node()}", [0.002, 0.0, 0.005])
            plan_grid(tiny_llama(), ["a"], options, [1024], store)
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "longer than `minutes` 1" in told, "the second asks less, as the first is told to"


def test_costs_are_positive():
    read, pair, written = seconds_per_token(tiny_llama(max_position_embeddings=2048))
    assert read > 0 and pair >= 0 and written > 0


def grid_of(rates, samples):
    prompts = [
        Prompt("puzzles", "latest", index, "", ("yes",), 8, length=length)
        for length in rates
        for index in range(samples)
    ]
    rng = np.random.default_rng(0)
    texts = [Completion("yes" if rng.random() < rates[prompt.length] else "no", 1) for prompt in prompts]
    result = suite_result("puzzles", prompts, {"base": texts}, lambda prompt, text: {"exact_match": text == "yes"})
    return result, prompts


def test_samples_are_added_where_intervals_are_wide_and_time_is_left():
    result, prompts = grid_of({512: 0.5, 1024: 0.5}, 20)
    cells = cells_to_refine(result, prompts, {512: 1.0, 1024: 2.0}, 1000)
    assert [(cell.length, cell.samples, cell.seconds) for cell in cells] == [(512, 80, 60.0), (1024, 80, 120.0)]
    assert [cell.length for cell in cells_to_refine(result, prompts, {512: 1.0, 1024: 2.0}, 100)] == [512]
    assert cells_to_refine(result, prompts, {512: 1.0, 1024: 2.0}, 0) == []
    narrow, prompts = grid_of({512: 1.0, 1024: 1.0}, 120)
    assert cells_to_refine(narrow, prompts, {512: 1.0, 1024: 1.0}, 1000) == []


def test_samples_are_added_at_a_single_length_too():
    result, prompts = grid_of({512: 0.5}, 20)
    assert result.tasks[0].grid is None and result.tasks[0].length == 512
    assert [(cell.length, cell.samples) for cell in cells_to_refine(result, prompts, {512: 1.0}, 1000)] == [(512, 80)]
    unsized = [replace(prompt, length=None) for prompt in prompts]
    answers = {"base": [Completion("yes", 1)] * len(unsized)}
    result = suite_result("longbench", unsized, answers, lambda prompt, text: {"exact_match": 1.0})
    assert cells_to_refine(result, unsized, {}, 1000) == []


def test_what_is_still_to_be_asked_is_said_first(tmp_path, caplog):
    caplog.set_level("INFO", "hf_longalign")
    prompts = [Prompt("puzzles", "latest", n, "who " * n, ("x",), 8, chat=False, length=512) for n in range(4)]
    prompts.append(replace(prompts[0], task="latest, closed book", text="who who", length=None))
    suite = PromptSuite("puzzles", prompts, score_puzzle)
    who = [Examinee("base", "a", None), Examinee("adapter", "b", None)]
    served, local = (Examined(None, tiny_tokenizer(), None, model, who) for model in (None, tiny_llama()))
    with ResultStore(tmp_path) as store, ResultStore(tmp_path) as other:
        store.add(who[0].key(prompts[0].key), {"text": "x"})
        announce(served, [suite], store)
        announce(served, [suite], other)
        store.add(f"speed/a/{platform.node()}", [0.01, 0.0, 0.0])
        announce(local, [suite], store)
        announce(local, [suite], store, 15.0)
    tokens = 7 * 512 + 2 * len(tiny_tokenizer()("who who")["input_ids"])
    told = f"puzzles: 9 prompts of {tokens:,} tokens in all"
    minutes = 0.01 * tokens / 60
    assert [record.getMessage() for record in caplog.records] == [
        f"{told}.",
        f"{told}, about {minutes:.1f} min of one process.",
        f"{told}, about {minutes:.1f} min of one process.",
        f"In all about {minutes:.1f} min, then more samples where intervals are wide, until 15 min are over.",
    ], "the main process alone tells it"
