"""The numbers of a report against numbers worked out by hand, and the files it is made of."""

import json

import numpy as np
import pytest

from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.report import render_report
from hf_longalign.evaluation.results import suite_results
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.evaluation.suites import PromptSuite
from hf_longalign.evaluation.write import typed_report, write_report
from hf_longalign.records.report import Report
from hf_longalign.records.training import CoverageRecord, Histogram


LENGTHS, DEPTHS = [128, 256], [0.0, 0.5, 1.0]
PROMPTS = [
    Prompt("needle", task, index, f"{task} {index}", ("yes",), 8, length=length, depth=depth)
    for task in ("single", "multi_key")
    for length in LENGTHS
    for index in range(2)
    for depth in DEPTHS
]


def score(prompt, text):
    right = sum(word == "yes" for word in text.split())
    return {"exact_match": float(right == 2), "recall": right / 2}


def suite():
    base = ["yes" if prompt.length == 128 else "" for prompt in PROMPTS]
    adapter = ["yes yes" if prompt.depth > 0 else "no" for prompt in PROMPTS]
    return suite_results(
        "needle", PROMPTS, {"base": base, "adapter": adapter}, score, groups={"one": ["single"], "none": ["other"]}
    )


def test_scores_grids_and_differences():
    result = suite()
    single, multi = result["tasks"]
    assert (single["task"], multi["task"], single["samples"]) == ("single", "multi_key", 12)
    assert single["scores"]["base"]["value"] == 0.0 and single["others"]["recall"]["base"] == 0.25
    assert single["scores"]["adapter"]["value"] == pytest.approx(2 / 3)
    assert single["difference"]["value"] == pytest.approx(2 / 3) and single["difference"]["low"] > 0
    assert single["grid"]["lengths"] == LENGTHS and single["grid"]["depths"] == DEPTHS
    assert np.array(single["grid"]["adapter"]).tolist() == [[0, 0], [1, 1], [1, 1]]
    assert [cell["value"] for cell in single["grid"]["by_length"]["adapter"]] == pytest.approx([2 / 3, 2 / 3])
    assert [group["group"] for group in result["groups"]] == ["one", "average"]
    assert result["groups"][1]["scores"]["adapter"] == pytest.approx(2 / 3)


def test_prompts_without_length_have_no_grid():
    prompts = [Prompt("longbench", "qasper", index, "text", ("yes",), 8) for index in range(3)]
    result = suite_results("longbench", prompts, {"base": ["yes yes", "", "yes"]}, score)
    assert "grid" not in result["tasks"][0] and "difference" not in result["tasks"][0]
    assert result["groups"] == []


def report(**more):
    models = [
        {"label": "base", "name": "org/model", "revision": "abc"},
        {"label": "adapter", "name": "user/adapter", "revision": None},
    ]
    return {
        "models": models,
        "suites": [suite()],
        "settings": {"seed": 0, "lengths": LENGTHS},
        "prompts": "f00",
        **more,
    }


def test_the_folder_holds_numbers_text_and_pictures(tmp_path):
    perplexity = {
        "edges": [0, 128, 256],
        "documents": 4,
        "window": 256,
        "perplexity": {"base": [9.0, None], "adapter": [8, 7]},
    }
    speed = {"base": {"prompt_tokens": 1000, "cached_tokens": 400, "generated_tokens": 80, "seconds": 2.0}}
    written = write_report(tmp_path, report(perplexity=perplexity, speed=speed))
    stored = Report.from_json(json.loads((tmp_path / "report.json").read_text()))
    assert stored == typed_report(written) and stored.perplexity.values["base"] == [9.0, None]
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", *written["images"]}
    assert set(written["images"]) == {
        "needle_accuracy.png",
        "needle_heatmap.png",
        "needle_single.png",
        "needle_multi_key.png",
        "perplexity.png",
    }
    text = (tmp_path / "report.md").read_text()
    for line in (
        "# Evaluation of user/adapter",
        "| base | `org/model` | abc |",
        "| multi_key, by length | 128 | 256 |",
        "![Accuracy by depth and length, mean of all tasks](needle_heatmap.png)",
        "| base | 9.00 |  |",
        "| base | 1,000 | 400 | 80 | 2.0 | 500 |",
        "`f00`",
    ):
        assert line in text
    assert "+66.7 (" in text and "**+66.7" in text


def test_what_failed_is_named_and_the_rest_stays():
    score = {"value": 0.5}
    cut = {"task": "ifeval", "metric": "acc", "samples": 4, "scores": {"base": score, "adapter": score}}
    cut |= {"difference": {"value": -0.0001}, "note": "2 prompts were cut"}
    short = {"suite": "short", "metric": None, "groups": [], "tasks": [{"task": "gsm8k", "error": "no network"}, cut]}
    text = render_report({**report(), "suites": [suite(), short]})
    assert "Not run:\n\n- gsm8k: no network\n" in text and "| single |" in text
    assert "Notes:\n\n- ifeval: 2 prompts were cut\n" in text
    assert "| ifeval | acc | 4 | 50.0 | 50.0 | 0.0 |" in text  # and not -0.0


def test_partial_recall_and_the_picture_of_each_task_are_shown(tmp_path):
    write_report(tmp_path, report())
    text = (tmp_path / "report.md").read_text()
    assert "| single | recall | 12 | 25.0 | 66.7 | +41.7 |" in text
    assert "](needle_single.png)" in text and "](needle_multi_key.png)" in text


def test_a_suite_tells_what_could_not_be_asked(tmp_path):
    who = Examinee("base", "id", None)
    with ResultStore(tmp_path) as store:
        store.add(who.key(PROMPTS[0].key), {"text": "yes"})
        found = PromptSuite("longbench", PROMPTS[:1], score, missing={"lcc": "offline"}).results([who], store)
        nothing = PromptSuite("longbench", [], score, missing={"lcc": "offline"}).results([who], store)
    assert [task["task"] for task in found["tasks"]] == ["single", "lcc"]
    assert nothing["tasks"] == [{"task": "lcc", "error": "offline"}]
    assert "- lcc: offline" in render_report({**report(), "suites": [nothing]})


def test_a_record_without_distances_costs_no_report(tmp_path):
    written = write_report(tmp_path, report(), coverage=CoverageRecord(64))
    assert "coverage.png" not in written["images"] and (tmp_path / "report.md").exists()


def test_all_lengths_evaluated_stand_in_the_picture_of_distances(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "hf_longalign.evaluation.write.plot_coverage", lambda coverage, path, **options: drawn.update(options) or path
    )
    ruler = {"suite": "ruler", "metric": None, "groups": [], "tasks": [{"task": "vt", "length": 512, "error": "x"}]}
    found = {"edges": [0, 1024], "documents": 1, "window": 1024, "perplexity": {"base": [2.0], "adapter": [2.0]}}
    everything = {**report(perplexity=found), "suites": [suite(), ruler]}
    write_report(tmp_path, everything, coverage=CoverageRecord(64, histogram=Histogram(pairs=[1])))
    assert drawn["evaluated_lengths"] == [128, 256, 512, 1024]
