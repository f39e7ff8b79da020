"""The pictures of an evaluation: accuracy by length, and the heatmap of depth by length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_longalign.figures import COLOURS, QUIET, STYLE, load_figures, save_figure


def plot_accuracy_by_length(
    curves: Mapping[str, ArrayLike],
    lengths: Sequence[int],
    path: str | Path,
    *,
    title: str,
    train_length: int | None = None,
    highlight: Sequence[str] = (),
    intervals: Mapping[str, ArrayLike] | None = None,
) -> Path:
    """Draw accuracy against context length, one labelled curve per model, and return the file's path.

    Args:
        curves: float `(lengths,)` accuracies from 0 to 1 by name.
        lengths: context lengths in tokens, ascending; drawn on a logarithmic axis.
        path: where the PNG goes; its folder is made.
        title: what the reader should see.
        train_length: length of the training samples in tokens, drawn as a line.
        highlight: names drawn thick, the last one in the strongest colour; the others are thin.
        intervals: float `(lengths, 2)` lower and upper ends of the confidence intervals by name, drawn as bands.

    Raises:
        ValueError: a curve that is not one accuracy per length.
        ImportError: matplotlib is missing.
    """
    matplotlib, figure_class = load_figures()
    lines = {name: _checked(name, values, (len(lengths),)) for name, values in curves.items()}
    bands = {name: _checked(name, values, (len(lengths), 2)) for name, values in (intervals or {}).items()}
    colours = _line_colours(list(lines), highlight)
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=(8.4, 4.4), layout="constrained")
        axes = figure.subplots()
        if train_length is not None:
            axes.axvline(train_length, color=QUIET, linestyle=":", linewidth=1.2)
            axes.text(train_length * 1.04, 0.02, "training length", color=QUIET, fontsize=9)
        for name, accuracy in lines.items():
            thick = name in highlight
            axes.plot(
                lengths,
                accuracy,
                marker="o",
                markersize=6 if thick else 4,
                linewidth=2.8 if thick else 1.4,
                color=colours[name],
                clip_on=False,
                zorder=4 if thick else 3,
            )
        for name, band in bands.items():
            axes.fill_between(lengths, band[:, 0], band[:, 1], color=colours[name], alpha=0.15, linewidth=0)
        _label_ends(axes, {name: float(accuracy[-1]) for name, accuracy in lines.items()}, colours, highlight)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, tick_labels(lengths))
        axes.minorticks_off()
        axes.set_xlim(lengths[0] / 1.15, lengths[-1] * (1 if len(lengths) > 1 else 1.15))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("context length in tokens")
        axes.set_ylabel("accuracy, exact match")
        axes.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.6)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, path)


def _line_colours(names: Sequence[str], highlight: Sequence[str]) -> dict[str, str]:
    """A colour per curve; the highlighted ones take the two that stand out most."""
    ordered = [name for name in reversed(highlight) if name in names]
    ordered += [name for name in names if name not in ordered]
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(ordered)}


def _label_ends(axes: Any, ends: dict[str, float], colours: dict[str, str], highlight: Sequence[str]) -> None:
    """Name each curve beside its right end, which is easier to follow than a legend."""
    beside = axes.get_yaxis_transform()
    for name, height in spread(ends, gap=0.062, top=1.06).items():
        axes.plot([1.015, 1.055], [ends[name], height], transform=beside, clip_on=False, color=colours[name], lw=0.8)
        axes.text(
            1.065,
            height,
            f"{ends[name]:.2f}  {name}",
            transform=beside,
            va="center",
            fontsize=10,
            fontweight="bold" if name in highlight else "normal",
            color=colours[name],
        )


def spread(heights: Mapping[str, float], *, gap: float, top: float) -> dict[str, float]:
    """Move labels apart so that neighbours are at least `gap` apart and none is above `top`, in the order of heights.

    Labels that crowd share their surplus up and down. Many labels may reach below 0.

    >>> {name: round(height, 2) for name, height in spread({"a": 0.5, "b": 0.5, "c": 0.1}, gap=0.1, top=1.0).items()}
    {'a': 0.55, 'b': 0.45, 'c': 0.1}
    >>> {name: round(height, 2) for name, height in spread({"a": 1.0, "b": 1.0}, gap=0.1, top=1.0).items()}
    {'a': 1.0, 'b': 0.9}
    """
    groups: list[tuple[float, list[str]]] = []  # the place of the upper label, and all of the group from above
    for name in sorted(heights, key=lambda name: -heights[name]):
        upper, members = min(heights[name], top), [name]
        while groups and groups[-1][0] - gap * len(groups[-1][1]) < upper:
            members = groups.pop()[1] + members
            middle = float(np.mean([heights[member] for member in members]))
            upper = min(middle + gap * (len(members) - 1) / 2, top)
        groups.append((upper, members))
    return {name: upper - gap * index for upper, members in groups for index, name in enumerate(members)}


def plot_heatmap(
    panels: Mapping[str, ArrayLike], lengths: Sequence[int], depths: Sequence[float], path: str | Path, *, title: str
) -> Path:
    """Draw accuracy by depth and length, one panel per model on one colour scale, and return the file's path.

    Args:
        panels: float `(depths, lengths)` accuracies from 0 to 1 by name, side by side.
        lengths: context lengths in tokens, one per column.
        depths: place of the fact, 0 at the beginning of the context, 1 at its end, one per row.
        path: where the PNG goes; its folder is made.
        title: what the reader should see.

    Raises:
        ValueError: a panel that is not one accuracy per depth and length.
        ImportError: matplotlib is missing.
    """
    matplotlib, figure_class = load_figures()
    with matplotlib.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = figure_class(figsize=(4.2 * len(panels) + 0.9, 3.6), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for index, (axes, (name, values)) in enumerate(zip(all_axes, panels.items(), strict=True)):
            accuracy = _checked(name, values, (len(depths), len(lengths)))
            image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            for (row, column), value in np.ndenumerate(accuracy):
                colour = "white" if value < 0.55 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
            axes.set_xticks(range(len(lengths)), tick_labels(lengths))
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths] if index == 0 else [])
            axes.tick_params(length=0)
            axes.set_xlabel("context length in tokens")
            if index == 0:
                axes.set_ylabel("depth of the fact")
            axes.set_title(name, fontsize=11)
        figure.colorbar(image, ax=list(all_axes), label="accuracy", shrink=0.9).outline.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, path)


def plot_perplexity(
    curves: Mapping[str, Sequence[float | None]], edges: Sequence[int], path: str | Path, *, title: str
) -> Path:
    """Draw perplexity against position, one labelled curve per model, and return the file's path.

    Args:
        curves: perplexity by bin and name, `None` where a bin has no token.
        edges: `(bins + 1,)` positions, ascending; bin i holds those from `edges[i]` to `edges[i + 1] - 1`.
        path: where the PNG goes; its folder is made.
        title: what the reader should see.

    Raises:
        ValueError: a curve that is not one value per bin.
        ImportError: matplotlib is missing.
    """
    matplotlib, figure_class = load_figures()
    colours = _line_colours(list(curves), list(curves)[-1:])
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=(8.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for name, values in curves.items():
            heights = np.array([np.nan if value is None else value for value in values], dtype=float)
            if heights.shape != (len(edges) - 1,):
                raise ValueError(f"`{name}` must hold {len(edges) - 1} values, got {values!r}. Give one per bin.")
            axes.stairs(heights, edges, baseline=None, color=colours[name], linewidth=2, label=name)
        ticks = [edge for edge in edges if edge > 0]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(edges[0] or ticks[0] / 2, edges[-1])
        axes.set_xticks(ticks, tick_labels(ticks))
        axes.minorticks_off()
        axes.set_xlabel("tokens before the predicted one")
        axes.set_ylabel("perplexity, lower is better")
        axes.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.6)
        axes.legend(frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, path)


def tick_labels(lengths: Sequence[int]) -> list[str]:
    """Write lengths so that many of them fit beside each other.

    >>> tick_labels([64, 1024]), tick_labels([512, 4096, 10000, 131072])
    (['64', '1,024'], ['512', '4k', '10,000', '128k'])
    """
    many = max(lengths) > 4096
    return [f"{length // 1024}k" if many and length % 1024 == 0 else f"{length:,}" for length in lengths]


def _checked(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.shape != shape or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(
            f"`{name}` must hold accuracies from 0 to 1 of shape {shape}, got shape {array.shape}: {values!r}. "
            "Give one per length (and depth)."
        )
    return array
