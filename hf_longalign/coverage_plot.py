"""The picture of the relative distances a training run covered, against the lengths that are evaluated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_longalign.figures import COLOURS, INK, QUIET, STYLE, load_figures, save_figure
from hf_longalign.records.training import CoverageRecord


def plot_coverage(
    coverage: CoverageRecord,
    path: str | Path,
    *,
    evaluated_lengths: Sequence[int] = (),
    title: str = "Relative distances covered in training",
) -> Path:
    """Draw how often training met each distance between two tokens, and which distances it met at all.

    Above, the pairs of tokens at a distance, the mean of each bin; below, the share of the bin's distances that were
    met at least once. A model that is evaluated at a length needs all distances below it: lengths are drawn as lines,
    those beyond the target length, which no distance of the training reaches, in another colour.

    Args:
        coverage: what a run covered, as `longalign_config.json` holds it.
        path: where the PNG goes; its folder is made.
        evaluated_lengths: context lengths in tokens.
        title: what the reader should see.

    Raises:
        ValueError: a coverage without a histogram.
        ImportError: matplotlib is missing.
    """
    histogram, target = coverage.histogram, coverage.target_length
    if not histogram.pairs:
        raise ValueError("`coverage` must hold a histogram, got none. Give the record's own.")
    edges, pairs = np.asarray(histogram.edges), np.asarray(histogram.pairs, dtype=float)
    matplotlib, figure_class = load_figures()
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=(8.4, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        # Bins without a pair lie below a logarithmic axis.
        upper.stairs(pairs / np.diff(edges), edges, baseline=0.5, fill=True, color=COLOURS[0], alpha=0.75)
        upper.set_yscale("log")
        upper.set_ylim(bottom=0.5)
        upper.set_ylabel("pairs of tokens\nper distance")
        upper.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.6)
        lower.stairs(histogram.covered, edges, fill=True, color=COLOURS[3], alpha=0.8)
        lower.set_ylim(0, 1)
        lower.set_yticks([0, 1], ["0 %", "100 %"])
        lower.set_ylabel("covered")
        lower.set_xlabel("distance between two tokens, in positions")
        lower.xaxis.set_major_formatter("{x:,.0f}")
        lower.set_xlim(0, 1.02 * max(target, *evaluated_lengths, 1))
        _mark_lengths((upper, lower), evaluated_lengths, target)
        share = f"{coverage.skip_distance_coverage:.1%} of the distances below {target:,} met"
        upper.set_title(share, loc="right", fontsize=10, color=INK)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, path)


def _mark_lengths(panels: Sequence[Any], lengths: Sequence[int], target: int) -> None:
    """A line per length, named at its top where there is room beside the axis and the next name."""
    low, high = panels[0].get_xlim()
    last = np.inf
    for length in sorted(set(lengths), reverse=True):
        colour = COLOURS[1] if length > target else INK
        for panel in panels:
            panel.axvline(length, color=colour, linestyle=(0, (3, 2)), linewidth=1.1)
        room = 0.09 * (high - low)
        if length - low > room and last - length > room:
            panels[0].text(
                length - 0.006 * (high - low),
                0.97,
                f"{length:,}",
                transform=panels[0].get_xaxis_transform(),
                ha="right",
                va="top",
                fontsize=9,
                color=colour,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
            )
            last = length
