"""The pictures of a report, drawn from its numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_longalign.evaluation.plots import plot_accuracy_by_length, plot_heatmap, plot_perplexity


def draw_pictures(report: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Draw what a report has numbers for, and return the names of the PNGs.

    `needle_accuracy.png` and `needle_heatmap.png` show the mean of the needle tasks, `needle_<task>.png` each of them,
    `perplexity.png` the perplexity by position.

    Args:
        report: see [`render_report`].
        folder: where the PNGs go.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    labels = [model["label"] for model in report["models"]]
    drawn = []
    for suite in report["suites"]:
        tasks = [task for task in suite["tasks"] if task.get("grid")]
        if tasks:
            drawn += _draw_needle(tasks, labels, folder)
    if report.get("perplexity"):
        found = report["perplexity"]
        title = f"Perplexity by position, {found['documents']:,} documents"
        drawn.append(plot_perplexity(found["perplexity"], found["edges"], folder / "perplexity.png", title=title))
    return [path.name for path in drawn]


def _draw_needle(tasks: list[Mapping[str, Any]], labels: list[str], folder: Path) -> list[Path]:
    lengths, depths = tasks[0]["grid"]["lengths"], tasks[0]["grid"]["depths"]
    means = {label: np.mean([task["grid"][label] for task in tasks], axis=0) for label in labels}
    what = tasks[0]["task"].replace("_", "-") if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    paths = [
        plot_accuracy_by_length(
            {label: mean.mean(0) for label, mean in means.items()},
            lengths,
            folder / "needle_accuracy.png",
            title=f"Needle in a haystack, {what}",
            highlight=labels,
            intervals={label: _intervals(tasks, label) for label in labels},
        ),
        plot_heatmap(means, lengths, depths, folder / "needle_heatmap.png", title=f"Needle in a haystack, {what}"),
    ]
    if len(tasks) > 1:
        paths += [
            plot_heatmap(
                {label: task["grid"][label] for label in labels},
                lengths,
                depths,
                folder / f"needle_{task['task']}.png",
                title=f"Needle in a haystack, {task['task'].replace('_', '-')}",
            )
            for task in tasks
        ]
    return paths


def _intervals(tasks: list[Mapping[str, Any]], label: str) -> np.ndarray:
    """95 % intervals `(lengths, 2)` of the mean over tasks: that of independent means."""
    cells = [task["grid"]["by_length"][label] for task in tasks]
    value, low, high = (np.array([[cell[name] for cell in row] for row in cells]) for name in ("value", "low", "high"))
    below, above = (np.sqrt((gap**2).sum(0)) / len(tasks) for gap in (value - low, high - value))
    mean = value.mean(0)
    return np.clip(np.stack([mean - below, mean + above], axis=-1), 0, 1)
