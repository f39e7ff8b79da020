"""The scores of a report as tables, `model-index` and `.eval_results`: with their conditions, in words that follow."""

import dataclasses
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_longalign.cards import adapter_card
from hf_longalign.cards.scores import eval_results, headline, hub_results, scores_note, scores_table
from hf_longalign.records.report import (
    METRICS,
    Difference,
    EvaluatedModel,
    Grid,
    GroupResult,
    Report,
    Score,
    SuiteResult,
    TaskResult,
)
from hf_longalign.records.training import PositionsRecord, RopeRecord, TrainingRecord


def task(name, metric, base, adapter, spread=0.02, **more):
    change = adapter - base
    scores = {
        label: Score(value, value - spread, value + spread) for label, value in (("base", base), ("adapter", adapter))
    }
    differences = [Difference("adapter", "base", change, change - spread, change + spread)]
    return TaskResult(name, metric, samples=200, scores=scores, differences=differences, **more)


CELLS = {"base": [[0.5, 0.5]] * 2, "adapter": [[1.0, 0.8]] * 2}
BY_LENGTH = {"base": [Score(0.5)] * 2, "adapter": [Score(1.0, 0.9, 1.0), Score(0.8, 0.7, 0.9)]}
GRID = Grid([1024, 4096], [0.0, 1.0], CELLS, BY_LENGTH)
NEEDLE = task("single", "exact_match", 0.5, 0.9, haystack="built-in noise", grid=GRID)
TASKS = [
    task("qasper", "qa_f1", 0.271, 0.334),
    task("gov_report", "rouge_l", 0.24, 0.245),
    task("hotpotqa", "qa_f1", 0.4, 0.3, cut_answers={"adapter": 3}),
    TaskResult("lcc", error="no network"),
]
REPORT = Report(
    [EvaluatedModel("base", "org/base", what="the base as published"), EvaluatedModel("adapter", "out")],
    [
        SuiteResult("needle", [NEEDLE]),
        SuiteResult("longbench", TASKS, [GroupResult("average", {"base": 0.304, "adapter": 0.293})]),
        SuiteResult("short", [task("arc_easy", "acc_norm", 0.5, 0.5, dataset="allenai/ai2_arc")]),
    ],
    prompts="8f4e2b0c9a7d6e5f",
    date="2026-11-21",
)


def test_each_score_has_its_length_haystack_and_metric():
    found = {result.dataset_config: result for result in eval_results(REPORT, "user/a")}
    assert set(found) == {"single_1024", "single_4096", "qasper", "gov_report", "hotpotqa", "arc_easy"}
    needle = found["single_4096"]
    assert needle.dataset_args == {"length": 4096, "haystack": "built-in noise", "samples": 200}
    assert (needle.metric_type, needle.metric_name, needle.metric_value) == ("exact_match", "exact match (%)", 80.0)
    assert found["gov_report"].metric_type == "rouge" and found["gov_report"].metric_name == "ROUGE-L (%)"
    assert found["arc_easy"].dataset_type == "allenai/ai2_arc"
    assert len(eval_results_to_model_index("a", list(found.values()))[0]["results"]) == 6  # nothing is joined


def test_the_hub_reads_what_stands_in_the_front_matter():
    card = ModelCard(adapter_card(RECORD, {}, REPORT, repo_id="user/a"))
    assert [result.metric_value for result in card.data.eval_results] == [100.0, 80.0, 33.4, 24.5, 30.0, 50.0]


def test_the_hubs_results_are_of_data_that_it_knows():
    files = hub_results(REPORT, "user/a")
    assert set(files) == {".eval_results/longbench.yaml", ".eval_results/short.yaml"}
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/longbench.yaml"]))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("zai-org/LongBench", "qasper", 33.4),
        ("zai-org/LongBench", "gov_report", 24.5),
        ("zai-org/LongBench", "hotpotqa", 30.0),
    ]
    assert entries[0].date == "2026-11-21" and entries[0].notes == "F1 in percent, samples 200"
    assert entries[0].source_url == "https://huggingface.co/user/a/blob/main/report.md"


RECORD = TrainingRecord(RopeRecord("llama"), PositionsRecord("skip_all", 32768, 0.5, 0))


def test_words_follow_the_numbers():
    lines = {line.split(" | ")[0].strip("| "): line for line in headline(REPORT).splitlines()[2:]}
    assert lines["Needle in a haystack"].endswith("| 50.0 | 90.0 | 1 better |")
    assert lines["LongBench"].endswith("| 30.4 | 29.3 | 1 better, 1 worse, 1 no clear change |")
    assert lines["Short contexts"].endswith("| 50.0 | 50.0 | 1 no clear change |")
    same = dataclasses.replace(REPORT, suites=[SuiteResult("needle", [task("single", "exact_match", 0.5, 0.5)])])
    for report in (same, None, dataclasses.replace(REPORT, models=REPORT.models[:1])):
        text = adapter_card(RECORD, {}, report)
        assert not re.search(r"learned|improve|better, |1 better", text)
    assert "What that changed has not been measured." in adapter_card(RECORD, {})


def test_a_change_is_bold_where_it_is_larger_than_chance():
    table = scores_table(REPORT, REPORT.suites[1]).splitlines()
    assert table[0] == "| task | metric | samples | base | adapter | adapter − base |"
    assert table[2].endswith("| **+6.3 (+4.3 to +8.3)** |") and table[3].endswith("| +0.5 (−1.5 to +2.5) |")
    assert table[4].endswith("| **−10.0 (−12.0 to −8.0)** |")
    assert table[5] == "| *average* |  |  | 30.4 | 29.3 |  |"


def test_what_was_not_measured_as_meant_is_named():
    note = scores_note(REPORT.suites[1])
    assert note == "Scores in percent. Not measured: `lcc`. Answers cut at the limit of new tokens: `hotpotqa`."
    assert (
        scores_note(REPORT.suites[0])
        == "Exact match in percent. Texts of 1,024 and 4,096 tokens. Haystack: built-in noise."
    )


def test_three_models_have_three_columns_and_the_first_is_the_reference():
    scaled = EvaluatedModel("base, scaled", "org/base", what="the base with the adapter's RoPE")
    found = dataclasses.replace(NEEDLE, scores={**NEEDLE.scores, "base, scaled": Score(0.6)}, grid=None)
    suite = SuiteResult("needle", [found])
    report = dataclasses.replace(REPORT, models=[REPORT.models[0], scaled, REPORT.models[1]], suites=[suite])
    assert scores_table(report, suite).splitlines()[0] == (
        "| task | samples | base | base, scaled | adapter | adapter − base |"
    )
    text = adapter_card(RECORD, {}, report)
    assert "**base**: the base as published." in text and "**base, scaled**: the base with the adapter's RoPE." in text


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_words_and_an_id_of_its_own(metric):
    report = Report(
        REPORT.models[1:], [SuiteResult("longbench", [TaskResult("t", metric, scores={"adapter": Score(0.5)})])]
    )
    (found,) = eval_results(report)
    assert re.fullmatch(r"[a-z0-9_]+", found.metric_type) and "_" not in found.metric_name
    assert found.metric_type == METRICS[metric].hub_id


def test_lm_evals_filters_are_no_part_of_a_metric():
    report = Report(
        REPORT.models[1:],
        [SuiteResult("short", [TaskResult("gsm8k", "exact_match,strict-match", scores={"adapter": Score(0.5)})])],
    )
    assert eval_results(report)[0].metric_type == "exact_match"
    assert scores_note(report.suites[0]) == "Exact match in percent."
