"""Every picture: scores by length and depth, perplexity, distances covered in training, lengths of a data set.

Drawn without a display or a global state; equal numbers give equal bytes. Each function draws with a `title` that says
what the reader should see, writes a PNG to `path`, whose folder it makes, and returns the path; it raises an
ImportError where matplotlib is missing.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from hf_longalign.lazy import require
from hf_longalign.records.training import CoverageRecord, TrainingRecord


INK, QUIET = "#1f2933", "#9aa5b1"
# Okabe and Ito's colours, told apart by colour-blind readers too; the light ones darkened to be read as text.
COLOURS = ("#0072b2", "#d55e00", "#6b6b6b", "#009e73", "#cc79a7", "#b87d00", "#3a9bd1", "#000000",
           "#7a4fa3", "#7d7a00")  # fmt: skip
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": QUIET,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "figure.dpi": 160,
}


@contextmanager
def _canvas(path: str | Path, size: tuple[float, float], title: str | None = None, **style: Any) -> Iterator[Any]:
    """Yield an empty figure of a size in inches, in the style of all pictures, and write it as a PNG at the end."""
    matplotlib = require("matplotlib", "plot")
    from matplotlib.figure import Figure

    path, settings = Path(path), cast(Any, {**STYLE, **style})
    # A figure of its own and no pyplot: that one keeps figures alive and chooses a display at import.
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without this, matplotlib writes its version into the file, and equal pictures differ.
        figure.savefig(path, metadata={"Software": None})


def plot_accuracy_by_length(
    curves: Mapping[str, ArrayLike],
    lengths: Sequence[int],
    path: str | Path,
    *,
    title: str,
    train_length: int | None = None,
    highlight: Sequence[str] = (),
    intervals: Mapping[str, ArrayLike] | None = None,
    what: str = "accuracy, exact match",
) -> Path:
    """Draw accuracy against context length, one labelled curve per model.

    Args:
        curves: float `(lengths,)` accuracies from 0 to 1 by name.
        lengths: context lengths in tokens, ascending; drawn on a logarithmic axis.
        train_length: length of the training samples in tokens, drawn as a line.
        highlight: names drawn thick, the last one in the strongest colour; the others are thin.
        intervals: float `(lengths, 2)` lower and upper ends of the confidence intervals by name, drawn as bands.
        what: what is measured, written beside the vertical axis.

    Raises:
        ValueError: a curve that is not one accuracy per length.
    """
    lines = {name: _checked(name, values, (len(lengths),)) for name, values in curves.items()}
    bands = {name: _checked(name, values, (len(lengths), 2)) for name, values in (intervals or {}).items()}
    colours = _line_colours(list(lines), highlight)
    with _canvas(path, (8.4, 4.4), title) as figure:
        axes = figure.subplots()
        if train_length is not None:
            axes.axvline(train_length, color=QUIET, linestyle=":", linewidth=1.2)
            axes.text(train_length * 1.04, 0.02, "training length", color=QUIET, fontsize=9)
        for name, accuracy in lines.items():
            thick = name in highlight
            size, width, above = (6, 2.8, 4) if thick else (4, 1.4, 3)
            style = {"marker": "o", "markersize": size, "linewidth": width, "zorder": above}
            axes.plot(lengths, accuracy, color=colours[name], clip_on=False, **style)
        for name, band in bands.items():
            axes.fill_between(lengths, band[:, 0], band[:, 1], color=colours[name], alpha=0.15, linewidth=0)
        # Each curve is named beside its right end, which is easier to follow than a legend.
        ends, beside = {name: float(accuracy[-1]) for name, accuracy in lines.items()}, axes.get_yaxis_transform()
        for name, height in spread(ends, gap=0.062, top=1.06).items():
            drawn = {"transform": beside, "color": colours[name]}
            axes.plot([1.015, 1.055], [ends[name], height], clip_on=False, linewidth=0.8, **drawn)
            weight = "bold" if name in highlight else "normal"
            axes.text(1.065, height, f"{ends[name]:.2f}  {name}", va="center", fontsize=10, fontweight=weight, **drawn)
        _log_axis(axes, lengths, "context length in tokens")
        # A single length would be a point on the frame.
        axes.set_xlim(lengths[0] / 1.15, lengths[-1] * (1 if len(lengths) > 1 else 1.15))
        axes.set_ylim(0, 1.02)
        axes.set_ylabel(what)
        axes.grid(axis="y")
    return Path(path)


def _log_axis(axes: Any, ticks: Sequence[int], label: str) -> None:
    """A horizontal axis of lengths in which each doubling is as wide as the one before."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, tick_labels(ticks))
    axes.minorticks_off()
    axes.set_xlabel(label)


def _line_colours(names: Sequence[str], highlight: Sequence[str]) -> dict[str, str]:
    """A colour per curve, the same in every picture of a report; the highlighted ones stand out most."""
    ordered = [name for name in reversed(highlight) if name in names]
    ordered += [name for name in names if name not in ordered]
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(ordered)}


def spread(heights: Mapping[str, float], *, gap: float, top: float) -> dict[str, float]:
    """Move labels apart so that neighbours are at least `gap` apart and none is above `top`, in the order of heights.

    >>> {name: round(height, 2) for name, height in spread({"a": 0.5, "b": 0.5, "c": 0.1}, gap=0.1, top=1.0).items()}
    {'a': 0.55, 'b': 0.45, 'c': 0.1}
    """
    # From above: a label that meets the group over it joins it, and the group is centred anew on its members.
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
    panels: Mapping[str, ArrayLike],
    lengths: Sequence[int],
    depths: Sequence[float],
    path: str | Path,
    *,
    title: str,
    reach: Mapping[str, int] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Draw accuracy by depth and length, one panel per model on one colour scale.

    Args:
        panels: float `(depths, lengths)` accuracies from 0 to 1 by name, side by side.
        lengths: context lengths in tokens, one per column.
        depths: place of the fact, 0 at the beginning of the context, 1 at its end, one per row.
        reach: effective length by name, after whose column a line is drawn.
        notes: a line over the panel by name, such as how much further than another model it reaches.

    Raises:
        ValueError: a panel that is not one accuracy per depth and length.
    """
    size, no_frame = (4.2 * len(panels) + 0.9, 3.6), {"axes.spines.left": False, "axes.spines.bottom": False}
    with _canvas(path, size, title, **no_frame) as figure:
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for index, (axes, (name, values)) in enumerate(zip(all_axes, panels.items(), strict=True)):
            accuracy = _checked(name, values, (len(depths), len(lengths)))
            # From 0 to 1 in every panel, or equal scores would differ in colour.
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
            reached = (reach or {}).get(name)
            if reached is not None:
                axes.axvline(bisect_right(list(lengths), reached) - 0.5, color=COLOURS[1], linewidth=2.5)
            shown = "" if reached is None else f", reaches {reached:,}" if reached else ", reaches none"
            note = (notes or {}).get(name)
            axes.set_title(name + shown + (f"\n{note}" if note else ""), fontsize=11)
        figure.colorbar(image, ax=list(all_axes), label="accuracy", shrink=0.9).outline.set_visible(False)
    return Path(path)


def plot_perplexity(
    curves: Mapping[str, Sequence[float | None]], edges: Sequence[int], path: str | Path, *, title: str
) -> Path:
    """Draw perplexity against position, one labelled curve per model.

    Args:
        curves: perplexity by bin and name, `None` where a bin has no token.
        edges: `(bins + 1,)` positions, ascending; bin i holds those from `edges[i]` to `edges[i + 1] - 1`.

    Raises:
        ValueError: a curve that is not one value per bin.
    """
    colours = _line_colours(list(curves), list(curves))
    with _canvas(path, (8.4, 3.8), title) as figure:
        from matplotlib.ticker import LogLocator

        axes = figure.subplots()
        for name, values in curves.items():
            heights = np.array([np.nan if value is None else value for value in values], dtype=float)
            if heights.shape != (len(edges) - 1,):
                raise ValueError(f"`{name}` must hold {len(edges) - 1} values, got {values!r}. Give one per bin.")
            axes.stairs(heights, edges, baseline=None, color=colours[name], linewidth=2, label=name)
        ticks = [edge for edge in edges if edge > 0]
        axes.set_yscale("log", subs=[])  # matplotlib's own marks of a log axis are powers of ten: here, mostly none
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        _log_axis(axes, ticks, "tokens before the predicted one")
        axes.set_xlim(edges[0] or ticks[0] / 2, edges[-1])
        axes.set_ylabel("perplexity, lower is better")
        axes.grid(axis="y")
        axes.legend(frameon=False)
    return Path(path)


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


def plot_coverage(coverage: CoverageRecord, path: str | Path, *, evaluated_lengths: Sequence[int] = ()) -> Path:
    """Draw how often training met each distance between two tokens, and which distances it met at all.

    Args:
        coverage: what a run covered, as `longalign_config.json` holds it.
        evaluated_lengths: context lengths in tokens, drawn as lines.

    Raises:
        ValueError: a coverage without a histogram.
    """
    histogram, target = coverage.histogram, coverage.target_length
    if not histogram.pairs:
        raise ValueError("`coverage` must hold a histogram, got none. Give the record's own.")
    edges, pairs = np.asarray(histogram.edges), np.asarray(histogram.pairs, dtype=float)
    with _canvas(path, (8.4, 4.6), "Relative distances covered in training") as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        heights = pairs / np.diff(edges)  # bins at the end may be narrower: a mean per distance compares
        # Bins without a pair lie below a logarithmic axis.
        upper.stairs(heights, edges, baseline=0.5, fill=True, color=COLOURS[0], alpha=0.75)
        upper.set_yscale("log", subs=[])  # ticks between powers of ten are most of the drawing's time
        upper.set_ylim(0.5, 2 * max(1, heights.max()))
        upper.set_ylabel("pairs of tokens\nper distance")
        upper.grid(axis="y")
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
    return Path(path)


def _mark_lengths(panels: Sequence[Any], lengths: Sequence[int], target: int) -> None:
    """A line per length, each named in the highest row in which its name meets no other."""
    low, high = panels[0].get_xlim()
    taken: list[list[tuple[float, float]]] = []  # by row from above: where names begin and end
    for length in sorted(set(lengths), reverse=True):
        colour = COLOURS[1] if length > target else INK
        for panel in panels:
            panel.axvline(length, color=colour, linestyle=(0, (3, 2)), linewidth=1.1)
        gap, width = 0.006 * (high - low), (0.012 * len(f"{length:,}") + 0.012) * (high - low)
        # Beside the vertical axis there is room only to the right of the line.
        left = length - width > low
        begin, end = (length - width, length) if left else (length, length + width)
        row = next((n for n, names in enumerate(taken) if all(end <= b or begin >= e for b, e in names)), len(taken))
        taken += [[]] if row == len(taken) else []
        taken[row].append((begin, end))
        panels[0].text(
            length - gap if left else length + gap,
            0.97 - 0.075 * row,
            f"{length:,}",
            transform=panels[0].get_xaxis_transform(),
            ha="right" if left else "left",
            va="top",
            fontsize=9,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    # Names stand above the bars, however many rows of them there are.
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(top=bottom * (top / bottom) ** (1 / max(0.25, 1 - 0.075 * len(taken))))


def plot_lengths(lengths: Sequence[int], depths: Sequence[float], path: str | Path, *, unit: str = "tokens") -> Path:
    """Draw the lengths of the rows in `unit`, and beside them the depths of the gold contexts where there are any.

    A depth is the share of the distractors before the gold context, 0 to 1; rows without distractors have none.
    """
    with _canvas(path, (8.4 if depths else 4.6, 2.9)) as figure:
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplots(1, 2 if depths else 1, squeeze=False)[0]
        panels[0].hist(lengths, bins=30, color=COLOURS[0], alpha=0.8)
        panels[0].set_xlabel(f"length of a row in {unit}")
        panels[0].xaxis.set_major_formatter("{x:,.0f}")
        panels[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[0].set_ylabel("rows")
        if depths:
            panels[1].hist(depths, bins=20, range=(0, 1), color=COLOURS[3], alpha=0.8)
            panels[1].set_xlim(0, 1)
            panels[1].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
            panels[1].set_xlabel("depth of the context that answers")
        for axes in panels:
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(axis="y")
            axes.set_axisbelow(True)
    return Path(path)


def plot_distances(
    curves: Mapping[str, Sequence[float]],
    lengths: Sequence[int],
    path: str | Path,
    *,
    title: str,
    ordinary: float | None = None,
) -> Path:
    """Draw the loss of stretched rows against the distance that they reach, one labelled curve per model.

    Args:
        curves: mean loss by length and name.
        lengths: distances in positions, ascending.
        ordinary: loss of the same rows as they are, drawn as a line across.
    """
    colours = _line_colours(list(curves), list(curves))
    with _canvas(path, (6.4, 3.2), title) as figure:
        axes = figure.subplots()
        for name, values in curves.items():
            axes.plot(lengths, values, marker="o", color=colours[name], linewidth=2, label=name)
        if ordinary is not None:
            axes.axhline(ordinary, color=INK, linestyle=(0, (3, 2)), linewidth=1.1, label="rows as they are")
        _log_axis(axes, lengths, "distance that the rows reach, in positions")
        axes.set_ylabel("loss, lower is better")
        axes.grid(axis="y")
        axes.legend(frameon=False)
    return Path(path)


def draw_training(record: TrainingRecord, folder: Path) -> None:
    """Draw what a training record has numbers for: `coverage.png` and `distances.png`."""
    drawn = TrainingRecord(record.rope, coverage=record.coverage, distances=record.distances)
    for name, picture in _training_pictures(json.dumps(drawn.to_json())).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)


@lru_cache(maxsize=1)  # a checkpoint, the folder above it and a push show the same; drawing takes a third of a second
def _training_pictures(record: str) -> dict[str, bytes]:
    given = TrainingRecord.from_json(json.loads(record))
    with TemporaryDirectory() as folder:
        if given.coverage is not None and given.coverage.documents:
            plot_coverage(given.coverage, Path(folder, "coverage.png"))
        found = given.distances
        curves = {"before training": found.before, "after training": found.after} if found else {}
        known = {name: losses for name, losses in curves.items() if losses is not None}
        if found and known and len(found.lengths) > 1:
            title = f"Loss by distance, {found.rows} rows moved apart"
            plot_distances(known, found.lengths, Path(folder, "distances.png"), title=title)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
