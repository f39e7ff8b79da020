"""The folder of a report: `report.json`, `report.md` and the pictures, all from one `Report`."""

import logging
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from hf_longalign.cards.markdown import table
from hf_longalign.cards.scores import headline, percent, reaches, scores_note, scores_table
from hf_longalign.plots import draw_pictures
from hf_longalign.records.base import dumps
from hf_longalign.records.names import metric_of, suite_of
from hf_longalign.records.report import Report, SuiteResult
from hf_longalign.records.training import CoverageRecord


logger = logging.getLogger(__name__)

IMAGES = {
    "needle_accuracy": "Accuracy by context length, with 95 % intervals",
    "needle_heatmap": "Accuracy by depth and length, mean of all tasks",
    "perplexity": "Perplexity by position",
    "coverage": "Relative distances covered in training, against the lengths evaluated",
}

# Fields of a diagnosis as a reader is told them.
WHY = {
    "right": "right",
    "cannot_find": "cannot find: right over the evidence alone",
    "cannot_use": "cannot use: wrong over the evidence alone",
    "closed_book": "right without any text",
}


def write_report(folder: str | Path, report: Report, *, coverage: CoverageRecord | None = None) -> Report:
    """Write a report and return it with the names of its `images`; without matplotlib, without them.

    Args:
        folder: where it goes; files of an earlier report are replaced.
        report: what was measured.
        coverage: what the adapter's training covered, from its record: drawn against the lengths evaluated.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        report = replace(report, images=draw_pictures(report, folder, coverage=coverage))
    except ImportError as error:
        logger.warning("The report has no pictures: %s", error)
    for name, text in (("report.json", dumps(report)), ("report.md", render_report(report))):
        # A reader, or a push, sees the old file or the new one.
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)
    return report


def render_report(report: Report) -> str:
    """Return `report.md`; what was not measured is left out.

    Example:

    >>> from hf_longalign.records.report import EvaluatedModel, Score, TaskResult
    >>> task = TaskResult("single", "exact_match", samples=4, scores={"base": Score(0.5, 0.15, 0.85)})
    >>> report = Report([EvaluatedModel("base", "org/model")], [SuiteResult("needle", [task])])
    >>> "| `single` | 4 | 50.0 (15.0–85.0) |" in render_report(report)
    True
    """
    models = [(model.label, f"`{model.name}`", model.revision or "", model.what) for model in report.models]
    parts = [f"# Evaluation of {report.models[-1].name}", table(("", "model", "revision", "what it is"), models)]
    parts += [headline(report), reaches(report)]
    for suite in report.suites:
        parts += _suite(report, suite)
    if report.perplexity:
        found = report.perplexity
        head = ("position", *(f"{low:,}–{high - 1:,}" for low, high in pairwise(found.edges)))
        rows = [
            (label, *("" if value is None else f"{value:.2f}" for value in found.values[label]))
            for label in report.labels
        ]
        documents = "1 document" if found.documents == 1 else f"{found.documents:,} documents"
        parts += ["## Perplexity by position", f"{documents}, windows of {found.window:,} tokens.", table(head, rows)]
    parts += _pictures(report, "perplexity")
    if "coverage.png" in report.images:
        parts += ["## Positions covered in training", *_pictures(report, "coverage")]
    if report.speed:
        note = "All answered prompts, runs and processes: seconds are summed over processes, tokens/s are of one."
        head = ("", "prompt tokens", "of them from the cache", "generated", "seconds", "prompt tokens/s")
        spent_rows = []
        for label, spent in report.speed.items():
            rate = f"{spent.prompt_tokens / max(spent.seconds, 1e-9):,.0f}"
            counts = (spent.prompt_tokens, spent.cached_tokens, spent.generated_tokens)
            spent_rows.append((label, *counts, f"{spent.seconds:,.1f}", rate))
        parts += ["## Speed", note, table(head, spent_rows)]
    comparable = (
        "Scores are percentages with 95 % intervals over samples: the answers to one sample at several depths count "
        "as one. A difference in bold is larger than chance at that level. Reports compare where the fingerprint of "
        f"all that was asked is the same: `{report.prompts}`."
    )
    parts += ["## Settings", table(("setting", "value"), report.settings.items()), comparable]
    return "\n\n".join(part for part in parts if part) + "\n"


def _suite(report: Report, suite: SuiteResult) -> list[str]:
    labels, parts = report.labels, [scores_table(report, suite), scores_note(suite)]
    further = [
        (task.task, metric_of(metric).title, *(percent(values[label]) for label in labels))
        for task in suite.tasks
        for metric, values in task.others.items()
    ]
    parts.append(table(("task", "further metric", *labels), further))
    within = [
        (task.task, part, *(percent(values[label]) for label in labels))
        for task in suite.tasks
        for part, values in task.parts.items()
    ]
    parts.append(table(("task", "of its prompts", *labels), within))
    for task in suite.tasks:
        if task.grid:
            rows = [(label, *(percent(cell.value) for cell in task.grid.by_length[label])) for label in labels]
            parts.append(table((f"{task.task}, by length", *(f"{length:,}" for length in task.grid.lengths)), rows))
    counted = [
        (task.task, *(task.cut_answers.get(label, 0) for label in labels), task.cut_prompts, task.left_out)
        for task in suite.tasks
        if task.cut_answers or task.cut_prompts or task.left_out
    ]
    parts.append(
        table(("task", *(f"answers cut, {label}" for label in labels), "prompts shortened", "left out"), counted)
    )
    reasons = [
        (task.task, label, *(f"{100 * getattr(why, name):.0f}" for name in WHY))
        for task in suite.tasks
        for label, why in task.diagnosis.items()
    ]
    parts.append(table(("why, in percent", "model", *WHY.values()), reasons))
    for title, told in (
        ("Not run:", [(task.task, task.error) for task in suite.tasks if task.error]),
        ("Notes:", [(task.task, task.note) for task in suite.tasks if task.note]),
    ):
        parts += [f"{title}\n\n" + "\n".join(f"- {task}: {text}" for task, text in told)] if told else []
    parts += _pictures(report, f"{suite.suite}_accuracy", f"{suite.suite}_heatmap")
    folded = _pictures(report, *(f"{suite.suite}_{task.task}" for task in suite.tasks))
    parts += ["<details><summary>Each task by length</summary>", *folded, "</details>"] if folded else []
    return [f"## {suite_of(suite.suite).title}", *parts]


def _pictures(report: Report, *stems: str) -> list[str]:
    return [f"![{IMAGES.get(stem, stem)}]({stem}.png)" for stem in stems if f"{stem}.png" in report.images]
