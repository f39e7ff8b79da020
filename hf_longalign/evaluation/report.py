"""The folder of a report: `report.json`, `report.md` and the pictures, all from one `Report`."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hf_longalign.cards.page import table
from hf_longalign.cards.scores import PICTURES, headline, percent, reach_moved, reaches, scores_note, scores_table
from hf_longalign.plots import plot_accuracy_by_length, plot_coverage, plot_heatmap, plot_perplexity
from hf_longalign.records.base import dumps
from hf_longalign.records.report import Grid, Report, SuiteResult, metric_of, suite_of
from hf_longalign.records.training import CoverageRecord


logger = logging.getLogger(__name__)

# Fields of a diagnosis as a reader is told them.
WHY = {
    "right": "right",
    "cannot_find": "cannot find: right over the evidence alone",
    "cannot_use": "cannot use: wrong over the evidence alone",
    "closed_book": "knows it: right without any text",
}


def write_report(folder: str | Path, report: Report, *, coverage: CoverageRecord | None = None) -> Report:
    """Write a report and return it with the names of its `images`; without matplotlib, without them.

    `coverage` is what the adapter's training covered, drawn against the lengths evaluated.
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
        lines = [
            f"- {', '.join(task for task, why in told if why == text)}: {text}"
            for text in dict.fromkeys(text for _, text in told)
        ]
        parts += [f"{title}\n\n" + "\n".join(lines)] if told else []
    parts += _pictures(report, f"{suite.suite}_accuracy", f"{suite.suite}_heatmap")
    folded = _pictures(report, *(f"{suite.suite}_{task.task}" for task in suite.tasks))
    parts += ["<details><summary>Each task by length</summary>", *folded, "</details>"] if folded else []
    return [f"## {suite_of(suite.suite).title}", *parts]


def _pictures(report: Report, *stems: str) -> list[str]:
    return [f"![{PICTURES.get(stem, stem)}]({stem}.png)" for stem in stems if f"{stem}.png" in report.images]


def draw_pictures(report: Report, folder: str | Path, *, coverage: CoverageRecord | None = None) -> list[str]:
    """Draw what a report has numbers for, and return the names of the PNGs, all in `folder`.

    `<suite>_accuracy.png` shows the mean of a suite's tasks by length, `<suite>_heatmap.png` by depth and length, and
    `<suite>_<task>.png` each task; `perplexity.png` shows the perplexity by position, `coverage.png` the distances
    that training covered, with all the lengths that the report holds.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    drawn = [path for suite in report.suites for path in _draw_suite(suite, report.labels, folder)]
    lengths = {length for suite in report.suites for task in suite.tasks for length in task.scores_by_length}
    if report.perplexity is not None:
        found = report.perplexity
        lengths.add(found.window)
        title = f"Perplexity by position, {found.documents:,} document{'s' * (found.documents != 1)}"
        drawn.append(plot_perplexity(found.values, found.edges, folder / "perplexity.png", title=title))
    if coverage is not None and coverage.histogram.pairs:
        drawn.append(plot_coverage(coverage, folder / "coverage.png", evaluated_lengths=sorted(lengths)))
    return [path.name for path in drawn]


def _draw_suite(suite: SuiteResult, labels: Sequence[str], folder: Path) -> list[Path]:
    """The mean of the tasks that were asked at the same lengths and depths as the first one, and each task alone."""
    # A task at one length has no curve, and one that is as long as it is has no grid.
    grids = {task.task: task.grid for task in suite.tasks if task.grid is not None}
    if not grids:
        return []
    first, name = next(iter(grids.values())), suite_of(suite.suite).title
    # Tasks that are too large for the shortest length lack it.
    same = (first.lengths, first.depths)
    alike = {task: grid for task, grid in grids.items() if (grid.lengths, grid.depths) == same}
    labels = [label for label in labels if all(label in grid.cells for grid in alike.values())]
    what = f"mean of {len(alike)} tasks" if len(alike) > 1 else next(iter(alike)).replace("_", "-")
    metrics = {metric_of(task.metric).title for task in suite.tasks if task.task in alike and task.metric is not None}
    curves = {label: _mean_by_length(list(alike.values()), label) for label in labels}
    paths = [
        plot_accuracy_by_length(
            {label: mean for label, (mean, _) in curves.items()},
            first.lengths,
            folder / f"{suite.suite}_accuracy.png",
            title=f"{name}, {what}",
            highlight=labels,
            intervals={label: band for label, (_, band) in curves.items()},
            what=f"accuracy, {metrics.pop()}" if len(metrics) == 1 else "score",
        )
    ]
    if len(first.depths) > 1:
        # The rule of a model's own short score, which comes first: the other would draw a second line.
        reach = {label: found.length for label, found in suite.reaches[0].reach.items()} if suite.reaches else {}
        moved = suite.reaches[0].differences if suite.reaches else []
        notes = {d.label: f"{reach_moved(d)} against {d.reference}" for d in moved if d.reference == labels[0]}
        means = {label: np.mean([grid.cells[label] for grid in alike.values()], axis=0) for label in labels}
        path = folder / f"{suite.suite}_heatmap.png"
        told: dict[str, Any] = {"title": f"{name}, {what}", "reach": reach, "notes": notes}
        paths.append(plot_heatmap(means, first.lengths, first.depths, path, **told))
        for task, grid in grids.items() if len(grids) > 1 else ():
            path, title = folder / f"{suite.suite}_{task}.png", f"{name}, {task.replace('_', '-')}"
            paths.append(plot_heatmap(grid.cells, grid.lengths, grid.depths, path, title=title))
    return paths


def _mean_by_length(grids: Sequence[Grid], label: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over tasks `(lengths,)` and its 95 % interval `(lengths, 2)`: that of independent means."""
    cells = [grid.by_length[label] for grid in grids]
    value = np.array([[cell.value for cell in row] for row in cells])
    # A score without an interval adds nothing to that of the mean.
    low = np.array([[cell.value if cell.low is None else cell.low for cell in row] for row in cells])
    high = np.array([[cell.value if cell.high is None else cell.high for cell in row] for row in cells])
    below, above = (np.sqrt((gap**2).sum(0)) / len(grids) for gap in (value - low, high - value))
    mean = value.mean(0)
    return mean, np.clip(np.stack([mean - below, mean + above], axis=-1), 0, 1)
