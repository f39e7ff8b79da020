"""The pictures of a report, drawn from its numbers."""

from pathlib import Path

import numpy as np

from hf_longalign.coverage_plot import plot_coverage
from hf_longalign.evaluation.plots import plot_accuracy_by_length, plot_heatmap, plot_perplexity
from hf_longalign.records.names import suite_of
from hf_longalign.records.report import Grid, Report, SuiteResult
from hf_longalign.records.training import CoverageRecord


def draw_pictures(report: Report, folder: str | Path, coverage: CoverageRecord | None = None) -> list[str]:
    """Draw what a report has numbers for, and return the names of the PNGs.

    `<suite>_accuracy.png` and `<suite>_heatmap.png` show the mean of a suite's tasks, `<suite>_<task>.png` each of
    them, `perplexity.png` the perplexity by position, `coverage.png` what training covered.

    Args:
        report: what was measured.
        folder: where the PNGs go.
        coverage: of the training.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    drawn: list[Path] = []
    for suite in report.suites:
        drawn += _draw_suite(suite, report.labels, folder)
    if report.perplexity:
        found = report.perplexity
        documents = "1 document" if found.documents == 1 else f"{found.documents:,} documents"
        path = folder / "perplexity.png"
        drawn.append(plot_perplexity(found.values, found.edges, path, title=f"Perplexity by position, {documents}"))
    if coverage is not None and coverage.histogram.pairs:
        path = folder / "coverage.png"
        drawn.append(plot_coverage(coverage, path, evaluated_lengths=evaluated_lengths(report)))
    return [path.name for path in drawn]


def evaluated_lengths(report: Report) -> list[int]:
    """Return the context lengths of a report, in tokens, ascending."""
    tasks = [task for suite in report.suites for task in suite.tasks]
    lengths = {length for task in tasks if task.grid for length in task.grid.lengths}
    lengths |= {task.length for task in tasks if task.length}
    return sorted(lengths | ({report.perplexity.window} if report.perplexity else set()))


def _draw_suite(suite: SuiteResult, labels: list[str], folder: Path) -> list[Path]:
    grids = {task.task: task.grid for task in suite.tasks if task.grid is not None}
    if not grids:
        return []
    first = next(iter(grids.values()))
    # Tasks that are too large for the shortest length lack it: the mean is over those that were asked at all.
    whole = {
        name: grid for name, grid in grids.items() if grid.lengths == first.lengths and grid.depths == first.depths
    }
    means = {label: np.mean([grid.cells[label] for grid in whole.values()], axis=0) for label in labels}
    what = next(iter(whole)).replace("_", "-") if len(whole) == 1 else f"mean of {len(whole)} tasks"
    title = f"{suite_of(suite.suite).title}, {what}"
    paths = [
        plot_accuracy_by_length(
            {label: mean.mean(0) for label, mean in means.items()},
            first.lengths,
            folder / f"{suite.suite}_accuracy.png",
            title=title,
            highlight=labels,
            intervals={label: _intervals(list(whole.values()), label) for label in labels},
        )
    ]
    if len(first.depths) > 1:
        path = folder / f"{suite.suite}_heatmap.png"
        paths.append(plot_heatmap(means, first.lengths, first.depths, path, title=title))
    for name, grid in grids.items() if len(grids) > 1 and len(first.depths) > 1 else ():
        path = folder / f"{suite.suite}_{name}.png"
        title = f"{suite_of(suite.suite).title}, {name.replace('_', '-')}"
        paths.append(plot_heatmap(grid.cells, grid.lengths, grid.depths, path, title=title))
    return paths


def _intervals(grids: list[Grid], label: str) -> np.ndarray:
    """95 % intervals `(lengths, 2)` of the mean over tasks: that of independent means."""
    cells = [grid.by_length[label] for grid in grids]
    value = np.array([[cell.value for cell in row] for row in cells])
    low = np.array([[cell.value if cell.low is None else cell.low for cell in row] for row in cells])
    high = np.array([[cell.value if cell.high is None else cell.high for cell in row] for row in cells])
    below, above = (np.sqrt((gap**2).sum(0)) / len(grids) for gap in (value - low, high - value))
    mean = value.mean(0)
    return np.clip(np.stack([mean - below, mean + above], axis=-1), 0, 1)
