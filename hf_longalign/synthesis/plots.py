"""The picture of a data set: how long its rows are, and how deep in them the evidence stands."""

from collections.abc import Sequence
from pathlib import Path

from hf_longalign.figures import COLOURS, QUIET, STYLE, load_figures, save_figure


_BINS = 30
_DEPTH_BINS = 20


def plot_lengths(lengths: Sequence[int], depths: Sequence[float], path: str | Path, *, unit: str = "tokens") -> Path:
    """Draw the lengths of the rows, and beside them the depths of the gold contexts where there are any.

    Args:
        lengths: the length of every row.
        depths: the share of the distractors before the gold context, from 0 to 1; rows without distractors have none.
        path: where the PNG goes; its folder is made.
        unit: what lengths are counted in.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib, figure_class = load_figures()
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=(8.4 if depths else 4.6, 2.9), layout="constrained")
        panels = figure.subplots(1, 2 if depths else 1, squeeze=False)[0]
        panels[0].hist(lengths, bins=_BINS, color=COLOURS[0], alpha=0.8)
        panels[0].set_xlabel(f"length of a row in {unit}")
        panels[0].xaxis.set_major_formatter("{x:,.0f}")
        panels[0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        panels[0].set_ylabel("rows")
        if depths:
            panels[1].hist(depths, bins=_DEPTH_BINS, range=(0, 1), color=COLOURS[3], alpha=0.8)
            panels[1].set_xlim(0, 1)
            panels[1].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
            panels[1].set_xlabel("depth of the context that answers")
        for axes in panels:
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
            axes.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.6)
            axes.set_axisbelow(True)
        return save_figure(figure, path)
