"""The numbers of a report against numbers worked out by hand, and the files it is made of."""

import json
from dataclasses import replace

import pytest

from hf_longalign.evaluation.haystack import noise
from hf_longalign.evaluation.needles import needle_prompts, score_needle
from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.report import render_report, write_report
from hf_longalign.evaluation.results import suite_result
from hf_longalign.evaluation.ruler import ruler_prompts, score_ruler
from hf_longalign.evaluation.runner import Examinee, PromptSuite, ResultStore
from hf_longalign.records.report import (
    Difference,
    EvaluatedModel,
    PerplexityResult,
    Report,
    Score,
    Speed,
    SuiteResult,
    TaskResult,
)
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


def completions(texts):
    return [Completion(text, len(text), cut=text == "no") for text in texts]


def suite():
    base = ["yes" if prompt.length == 128 else "" for prompt in PROMPTS]
    adapter = ["yes yes" if prompt.depth > 0 else "no" for prompt in PROMPTS]
    answers = {"base": completions(base), "adapter": completions(adapter)}
    groups = {"one": ["single"], "none": ["other"]}
    return suite_result("needle", PROMPTS, answers, score, groups=groups, haystack="essays")


def test_scores_grids_and_differences():
    result = suite()
    single, multi = result.tasks
    # Four samples, two at each length; that each is asked at three depths makes no more of them.
    assert (single.task, multi.task, single.samples, single.haystack) == ("single", "multi_key", 4, "essays")
    assert single.metric == "exact_match"
    assert single.scores["base"].value == 0.0 and single.others["recall"]["base"] == 0.25
    assert single.scores["adapter"].value == pytest.approx(2 / 3)
    (change,) = single.differences
    assert (change.label, change.reference, change.value) == ("adapter", "base", pytest.approx(2 / 3))
    assert change.significant
    assert single.grid.lengths == LENGTHS and single.grid.depths == DEPTHS
    assert single.grid.cells["adapter"] == [[0, 0], [1, 1], [1, 1]]
    assert [cell.value for cell in single.grid.by_length["adapter"]] == pytest.approx([2 / 3, 2 / 3])
    assert single.cut_answers == {"adapter": 4} and single.length is None
    assert [group.group for group in result.groups] == ["one", "average"]
    assert result.groups[1].scores["adapter"] == pytest.approx(2 / 3)
    (reach,) = result.reaches
    assert reach.reach["adapter"].length == 256 and "85 %" in reach.rule


def test_three_models_are_compared_two_by_two():
    prompts = PROMPTS[:6]
    answers = {label: completions(["yes yes"] * 6) for label in ("base", "base, scaled RoPE", "adapter")}
    (task,) = suite_result("needle", prompts, answers, score).tasks
    found = [(change.label, change.reference) for change in task.differences]
    assert found == [("base, scaled RoPE", "base"), ("adapter", "base"), ("adapter", "base, scaled RoPE")]


def test_prompts_without_length_have_no_grid():
    prompts = [Prompt("longbench", "qasper", index, "text", ("yes",), 8, shortened=index > 0) for index in range(3)]
    result = suite_result("longbench", prompts, {"base": completions(["yes yes", "", "yes"])}, score)
    (task,) = result.tasks
    assert task.grid is None and task.differences == [] and task.cut_prompts == 2
    assert result.groups == [] and result.reaches == []


def test_parts_are_averaged_over_their_tasks():
    prompts = [
        Prompt("longbench", task, index, "text", ("yes",), 8, parts=(part,))
        for task, parts in (("a", ("0-4k", "0-4k", "8k+")), ("b", ("0-4k",)))
        for index, part in enumerate(parts)
    ]
    result = suite_result("longbench", prompts, {"base": completions(["yes yes", "", "yes yes", "yes yes"])}, score)
    assert {group.group: group.scores["base"] for group in result.groups if group.group != "average"} == {
        "0-4k": 0.75,
        "8k+": 1.0,
    }


def test_prompts_without_depth_have_one_row():
    prompts = [
        Prompt("ruler", "vt", index, "text", ("yes",), 8, length=length) for length in LENGTHS for index in range(4)
    ]
    result = suite_result("ruler", prompts, {"base": completions(["yes yes"] * 4 + [""] * 4)}, score)
    assert result.tasks[0].grid.cells["base"] == [[1.0, 0.0]]
    assert [reach.reach["base"].length for reach in result.reaches] == [128, 128]


def report(**more):
    models = [
        EvaluatedModel("base", "org/model", "abc", "the base"),
        EvaluatedModel("adapter", "user/adapter", None, "the adapter"),
    ]
    return replace(Report(models, [suite()], "f00", {"seed": 0, "lengths": LENGTHS}), **more)


def test_the_folder_holds_numbers_text_and_pictures(tmp_path):
    perplexity = PerplexityResult([0, 128, 256], 256, 1, {"base": [9.0, None], "adapter": [8.0, 7.0]})
    written = write_report(tmp_path, report(perplexity=perplexity, speed={"base": Speed(1000, 400, 80, 2.0)}))
    assert Report.from_json(json.loads((tmp_path / "report.json").read_text())) == written
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", *written.images}
    assert set(written.images) == {
        "needle_accuracy.png",
        "needle_heatmap.png",
        "needle_single.png",
        "needle_multi_key.png",
        "perplexity.png",
    }
    text = (tmp_path / "report.md").read_text()
    for line in (
        "# Evaluation of user/adapter",
        "| base | `org/model` | abc | the base |",
        "| multi_key, by length | 128 | 256 |",
        "![Accuracy by depth and length](needle_heatmap.png)",
        "1 document, windows of 256 tokens.",
        "| base | 9.00 |  |",
        "| base | 1,000 | 400 | 80 | 2.0 | 500 |",
        "| single | 0 | 4 | 0 | 0 |",
        "| effective length | rule | base | adapter | adapter − base |",
        "| Needle in a haystack | 85 % of its own short score | none | 256 | **+256 (+256 to +256)** |",
        "`f00`",
    ):
        assert line in text, line
    assert "**+66.7 (" in text


def test_what_failed_is_named_and_the_rest_stays():
    cut = TaskResult("ifeval", "acc", 4, {"base": Score(0.5), "adapter": Score(0.5)}, note="2 prompts were cut")
    cut = replace(cut, differences=[Difference("adapter", "base", -0.0001)])
    short = SuiteResult("short", [TaskResult("gsm8k", error="no network"), cut])
    text = render_report(report(suites=[suite(), short]))
    assert "Not run:\n\n- gsm8k: no network\n" in text and "| `single` |" in text
    assert "Notes:\n\n- ifeval: 2 prompts were cut\n" in text
    assert "| `ifeval` | 4 | 50.0 | 50.0 | 0.0 |" in text  # and not -0.0


def test_further_metrics_and_the_picture_of_each_task_are_shown(tmp_path):
    write_report(tmp_path, report())
    text = (tmp_path / "report.md").read_text()
    assert "| single | share of values found | 25.0 | 66.7 |" in text
    assert "](needle_single.png)" in text and "](needle_multi_key.png)" in text


def test_a_suite_tells_what_could_not_be_asked(tmp_path):
    who = Examinee("base", "id", None)
    with ResultStore(tmp_path) as store:
        store.add(who.key(PROMPTS[0].key), {"text": "yes", "tokens": 1, "cut": False})
        found = PromptSuite("longbench", PROMPTS[:1], score, missing={"lcc": "offline"}).results([who], store)
        nothing = PromptSuite("longbench", [], score, missing={"lcc": "offline"}).results([who], store)
    assert [task.task for task in found.tasks] == ["single", "lcc"]
    assert nothing.tasks == [TaskResult("lcc", error="offline")]
    assert "- lcc: offline" in render_report(report(suites=[nothing]))


def test_a_record_without_distances_costs_no_report(tmp_path):
    written = write_report(tmp_path, report(), coverage=CoverageRecord(64))
    assert "coverage.png" not in written.images and (tmp_path / "report.md").exists()


def test_the_heatmap_tells_how_much_further_the_adapter_reaches(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "hf_longalign.evaluation.report.plot_heatmap", lambda *args, **options: drawn.append(options) or args[3]
    )
    write_report(tmp_path, report())
    assert drawn[0]["notes"] == {"adapter": "+256 (+256 to +256) against base"}
    assert drawn[0]["reach"] == {"base": 0, "adapter": 256}


def test_all_lengths_evaluated_stand_in_the_picture_of_distances(tmp_path, monkeypatch):
    ruler = SuiteResult("ruler", [TaskResult("vt", length=512, error="x")])
    found = PerplexityResult([0, 1024], 1024, 1, {"base": [2.0], "adapter": [2.0]})
    drawn = {}
    monkeypatch.setattr(
        "hf_longalign.evaluation.report.plot_coverage", lambda coverage, path, **options: drawn.update(options) or path
    )
    everything = report(perplexity=found, suites=[suite(), ruler])
    write_report(
        tmp_path, everything, coverage=CoverageRecord(64, histogram=Histogram([0, 32, 64], [3, 1], [1.0, 0.5]))
    )
    assert drawn["evaluated_lengths"] == [128, 256, 512, 1024]


def test_why_answers_are_wrong_is_told_of_needles_by_depth_and_of_ruler():
    count = lambda text: len(text.split())  # noqa: E731
    grid = {"lengths": [300, 400], "samples": 3, "count": count, "diagnose_at": 400}
    needles = list(needle_prompts(haystack=noise(), depths=[0.0, 1.0], tasks=["multi_key"], max_new_tokens=8, **grid))
    ruler, _ = ruler_prompts(tasks=["niah_multiquery", "ruler_vt", "ruler_qa_hotpot", "ruler_cwe"], essays=noise(),
                             **{**grid, "lengths": [1500, 2000], "diagnose_at": 2000})  # fmt: skip
    for suite, prompts, scorer in (("needle", needles, score_needle), ("ruler", ruler, score_ruler)):
        by_task = {}
        for prompt in prompts:
            by_task.setdefault(prompt.task, []).append(prompt)
        for task, own in by_task.items():
            # All that is needed stands in the evidence, and nothing of it in the question.
            held = [all(answer in prompt.text for answer in prompt.answers) for prompt in own]
            assert all(held) if task.endswith(", evidence alone") or "," not in task else not any(held), task
            assert all((prompt.length is None) == ("," in task) for prompt in own)
            assert all(len(prompt.text.split()) < 400 for prompt in own if "," in task and "vt" not in task)

        def answered(prompt):
            text = " ".join(prompt.answers)
            if "," in prompt.task:
                return text if prompt.task.endswith("evidence alone") and prompt.index > 0 else "?"
            return text if prompt.index == 2 or prompt.length in (300, 1500) or prompt.depth == 0.0 else "?"

        result = suite_result(suite, prompts, {"base": [Completion(answered(p), 1) for p in prompts]}, scorer)
        assert [task.task for task in result.tasks] == [task for task in by_task if "," not in task]
        assert all(task.samples == 6 for task in result.tasks)
        for task in result.tasks:
            if task.task == "ruler_cwe":
                assert task.diagnosis == {}
            else:  # of samples 0 and 1 the needles at depth 1 were missed, and 1 and 2 found in the evidence
                share = 1 / 6 if suite == "needle" else 1 / 3
                why = task.diagnosis["base"]
                assert (why.cannot_find, why.cannot_use, why.closed_book) == pytest.approx((share, share, 0))
                assert why.right == pytest.approx(1 - 2 * share)
