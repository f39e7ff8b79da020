"""The study's report: every pair of arms compared on the same questions, gains and losses alike, and two pictures."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hf_longalign.cards.page import table
from hf_longalign.evaluation.intervals import cluster_means, mean_interval, paired_difference
from hf_longalign.plots import plot_accuracy_by_length, plot_heatmap


class Group(NamedTuple):
    """Questions that are told of together: a title, their tasks, and where in the text their needle stands.

    Of one key exact match counts, of several the share of values found.
    """

    title: str
    tasks: tuple[str, ...]
    depths: tuple[float, float] = (0.0, 1.0)

    def holds(self, key: "Key") -> bool:
        """Whether a question is one of them; some have no depth."""
        return key[0] in self.tasks and (key[3] is None or self.depths[0] <= key[3] < self.depths[1])


GROUPS = {
    "needles": Group("Needles (one key or several, among as many as the text holds)", ("multi_key", "multi_query")),
    "one key": Group("One key", ("multi_key",)),
    "one key, first half": Group("One key in the first half of the text", ("multi_key",), (0.0, 0.5)),
    "one key, second half": Group("One key in the second half of the text", ("multi_key",), (0.5, 1.0)),
    "several keys": Group("Several keys at once", ("multi_query",)),
    "passages": Group("Questions about passages, F1", ("passages",)),
}
PICTURES = {"accuracy_by_length.png": "Accuracy by length", "heatmap.png": "Accuracy by depth and length"}
DEPTHS = 4
ALL = 0  # stands for all lengths together

Key = tuple[str, int, str, float | None, int]


class Mean(NamedTuple):
    """A mean over samples with its 95 % interval."""

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Comparison:
    """By how much `arm` is ahead of `reference` on the questions that both were asked."""

    group: str
    length: int
    arm: str
    reference: str
    value: float
    low: float
    high: float
    samples: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.samples > 1 and (self.low > 0 or self.high < 0)


class Found:
    """What is there of a study's folder: the score of each question by arm, seeds averaged, losses and training."""

    def __init__(self, folder: Path, arms: Sequence[str], split: str) -> None:
        self.scores: dict[str, dict[Key, float]] = {}
        # By arm, seed and document: the sum of losses and their number.
        self.losses: dict[str, list[list[list[float]]]] = defaultdict(list)
        # By arm and the positions of a bin: the sum of losses and their number.
        self.positions: dict[str, dict[tuple[int, int], np.ndarray]] = defaultdict(dict)
        self.training: list[dict[str, Any]] = []
        self.asking: dict[str, float] = defaultdict(float)
        # Of each trained model and length: the loss of short rows stretched to it, and the share of needles found.
        self.watched: list[dict[str, Any]] = []
        for arm in arms:
            gathered: dict[Key, list[float]] = defaultdict(list)
            for place in sorted((folder / "arms").glob(f"{arm}-*")):
                seed = int(place.name.rpartition("-")[2])
                own: dict[int, list[float]] = defaultdict(list)
                if (place / "training.json").exists():
                    self.training.append({"arm": arm, "seed": seed, **_read(place / "training.json")})
                for file in sorted((place / split).glob("*.json")):
                    result = _read(file)
                    self.asking[arm] += result["seconds"]
                    if "losses" in result:
                        self.losses[arm].append(result["losses"])
                    for between, *loss in _bins(result.get("positions")):
                        self.positions[arm][between] = self.positions[arm].get(between, 0) + np.array(loss)
                    for number, key in _keys(result.get("scores", [])):
                        gathered[key].append(result["scores"][number]["score"])
                        if GROUPS["needles"].holds(key):
                            own[key[1]].append(gathered[key][-1])
                for length, loss in _distances(place / "adapter" / "longalign_config.json"):
                    if own[length]:
                        needles = float(np.mean(own[length]))
                        self.watched.append(
                            {"arm": arm, "seed": seed, "length": length, "loss": loss, "needles": needles}
                        )
            if gathered:
                self.scores[arm] = {key: float(np.mean(values)) for key, values in gathered.items()}

    @property
    def lengths(self) -> list[int]:
        """Every length that some arm was asked at."""
        return sorted({key[1] for scores in self.scores.values() for key in scores})

    def keys(self, arms: Iterable[str], group: str, length: int) -> list[Key]:
        """Return the questions of a group at a length that all of some arms were asked, in order."""
        shared = set.intersection(*({*self.scores[arm]} for arm in arms))
        return sorted((key for key in shared if GROUPS[group].holds(key) and length in (ALL, key[1])), key=str)

    def means(self, arm: str, keys: Sequence[Key]) -> np.ndarray:
        """Return the mean of each sample: needles that are asked for together, or a pair at all lengths."""
        return cluster_means([self.scores[arm][key] for key in keys], [key[2] for key in keys])

    def mean(self, arm: str, group: str, length: int) -> Mean | None:
        """Return an arm's mean; `None` where it was not asked."""
        keys = self.keys([arm], group, length)
        if not keys:
            return None
        values = self.means(arm, keys)
        return Mean(float(values.mean()), *mean_interval(values), len(values))

    def compare(self, group: str, length: int) -> list[Comparison]:
        """Return every later arm against every earlier one."""
        found = []
        for reference, arm in combinations(self.scores, 2):
            keys = self.keys([reference, arm], group, length)
            if keys:
                difference = paired_difference(self.means(reference, keys), self.means(arm, keys))
                samples = len({key[2] for key in keys})
                found.append(Comparison(group, length, arm, reference, *difference, samples))
        return found

    def agreement(self) -> list[dict[str, Any]]:
        """Return how well the loss at a distance ranks the models as needles do: Spearman, -1 at best."""
        if not self.watched:
            return []
        frame = pd.DataFrame(self.watched)
        return [
            {
                "length": int(length),
                "models": len(own),
                "spearman": float(own[["loss", "needles"]].corr("spearman").iloc[0, 1]),
            }
            for length, own in frame.groupby("length")
            if len(own) > 2 and own["needles"].nunique() > 1
        ]

    def perplexity(self, arm: str) -> float:
        """Return the perplexity over all documents and seeds."""
        total, tokens = np.sum(self.losses[arm], axis=(0, 1))
        return exp(total / tokens)

    def by_position(self, arm: str) -> dict[str, float]:
        """Return the perplexity between two positions, without those below 512."""
        own = sorted(self.positions[arm].items())
        return {f"{low:,} to {high:,}": exp(total / tokens) for (low, high), (total, tokens) in own if low >= 512}

    def regression(self, arm: str, reference: str) -> tuple[float, float, float]:
        """Return by which share an arm's perplexity is above another's, with its interval over documents."""
        by_document = [
            np.divide(*np.moveaxis(np.array(self.losses[name]), -1, 0)).mean(0) for name in (reference, arm)
        ]
        value, low, high = (float(np.expm1(number)) for number in paired_difference(*by_document))
        return value, low, high


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _bins(found: Mapping[str, Sequence[float]] | None) -> Iterable[tuple[tuple[int, int], float, float]]:
    """First and last edge of each bin of positions, sum of losses, their number."""
    found = found or {"edges": [], "sums": [], "counts": []}
    return zip(zip(found["edges"], found["edges"][1:], strict=False), found["sums"], found["counts"], strict=True)


def _distances(record: Path) -> Iterable[tuple[int, float]]:
    """Distances and the losses after training, of a trained model that was watched."""
    watched = (_read(record) if record.exists() else {}).get("distances") or {}
    return zip(watched.get("lengths", []), watched.get("after") or [], strict=False)


def _keys(scores: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, Key]]:
    """What tells a question: task, length, sample, depth, and its number among those alike."""
    seen: dict[tuple, int] = defaultdict(int)
    for number, score in enumerate(scores):
        own = score["task"], score["length"], score["sample"], score["depth"]
        yield number, (*own, seen[own])
        seen[own] += 1


def write_study(
    folder: Path, titles: Mapping[str, str], split: str, settings: Mapping[str, Any], *, complete: bool = True
) -> Path:
    """Write `report.json`, `report.md` and two pictures into the folder, and return the path of `report.md`.

    Args:
        folder: the study's.
        titles: of the arms, in order; the default comes last of what is highlighted.
        split: whose questions.
        settings: what a reader must know to do the same again.
        complete: whether all that was asked for is done.
    """
    found = Found(folder, list(titles), split)
    compared = [one for group in GROUPS for length in (*found.lengths, ALL) for one in found.compare(group, length)]
    images = draw(found, titles, folder)
    (folder / "report.json").write_text(json.dumps(as_json(found, compared, settings, complete), indent=1) + "\n")
    path = folder / "report.md"
    path.write_text(render(found, compared, titles, settings, images, complete), encoding="utf-8")
    return path


def as_json(
    found: Found, compared: Sequence[Comparison], settings: Mapping[str, Any], complete: bool
) -> dict[str, Any]:
    """Return the report as JSON; `length` 0 stands for all lengths."""
    scores = [
        {"arm": arm, "group": group, "length": length, **mean._asdict()}
        for group in GROUPS
        for arm in found.scores
        for length in (*found.lengths, ALL)
        if (mean := found.mean(arm, group, length))
    ]
    return {
        "complete": complete,
        "settings": dict(settings),
        "training": found.training,
        "seconds of asking": {arm: round(seconds, 1) for arm, seconds in found.asking.items()},
        "scores": _rounded(scores),
        "differences": _rounded([asdict(one) for one in compared]),
        "distances": _rounded(found.watched),
        "agreement of distances with needles": _rounded(found.agreement()),
        "perplexity below 2,048": {arm: round(found.perplexity(arm), 4) for arm in found.losses},
        "perplexity by position": _rounded([{"arm": arm, **found.by_position(arm)} for arm in found.positions]),
    }


def _rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]


def render(
    found: Found,
    compared: Sequence[Comparison],
    titles: Mapping[str, str],
    settings: Mapping[str, Any],
    images: Sequence[str],
    complete: bool,
) -> str:
    """Return `report.md`."""
    parts = [f"# {settings.get('model', 'The model')}: arms that differ in one thing"]
    if not complete:
        parts.append("Not all that was planned is done: what follows is what is there.")
    parts.append(verdict(compared, titles))
    parts += [f"![{PICTURES[name]}]({name})" for name in images]
    for group, (title, *_) in GROUPS.items():
        parts += [f"## {title}", _means(found, group, titles), _differences(compared, group, found.lengths, titles)]
    if found.losses:
        parts += ["## Perplexity below 2,048 tokens", _perplexity(found, titles)]
    if any(map(found.by_position, found.positions)):
        parts += ["## Perplexity by position", _positions(found, titles)]
    if found.watched:
        parts += ["## Loss at a distance, watched while training", _watched(found, titles)]
    rows = [
        (
            titles[one["arm"]],
            one["seed"],
            one["steps"],
            one["tokens"],
            f"{one['seconds']:,.0f}",
            one["loss_first"],
            one["loss_last"],
        )
        for one in found.training
    ]
    head = ("arm", "seed", "steps", "tokens", "seconds", "loss, first 3 steps", "loss, last 3")
    parts += ["## Training", table(head, rows, right=range(1, 7))]
    parts += ["## Settings", table(("setting", "value"), list(settings.items())), NOTE]
    return "\n\n".join(part for part in parts if part) + "\n"


NOTE = (
    "Scores are percentages with 95 % intervals. A sample is what is asked together: the needles of one question "
    "for several, or a pair at all lengths; intervals are over samples, seeds averaged before, and so hold for "
    "these texts and seeds. Differences are paired: the same questions of both arms, in the last column over the "
    "lengths that both were asked. Where all samples agree (+0 to +0) there are too few to know. Of twenty "
    "comparisons of equal arms one leaves out 0 by chance."
)


def verdict(compared: Sequence[Comparison], titles: Mapping[str, str]) -> str:
    """Say of all lengths together, and of the longest, which arms can be told apart, and which way, or that none can.

    Example:

    >>> one = Comparison("needles", 0, "b", "a", -0.1, -0.15, -0.05, 20)
    >>> print(verdict([one], {"a": "A", "b": "B"}))
    - Needles, all lengths: of 1 pairs of arms 1 can be told apart: A is ahead of B by 10.0 points (5.0 to 15.0).
    """
    longest = max((one.length for one in compared), default=ALL)
    lines, level = [], []
    for group, (title, *_) in GROUPS.items():
        for length in dict.fromkeys((ALL, longest)):
            own = [one for one in compared if one.group == group and one.length == length]
            apart = sorted((one for one in own if one.told_apart), key=lambda one: -abs(one.value))
            where = f"{title.split(' (')[0].split(',')[0]}, {f'{length:,} tokens' if length else 'all lengths'}"
            if apart:
                told = "; ".join(_ahead(one, titles) for one in apart)
                lines.append(f"- {where}: of {len(own)} pairs of arms {len(apart)} can be told apart: {told}.")
            elif own:
                level.append(where)
    lines += ["- No two arms can be told apart by: " + "; ".join(level) + "."] if level else []
    return "\n".join(lines)


def _ahead(one: Comparison, titles: Mapping[str, str]) -> str:
    first, second, (low, high) = one.arm, one.reference, (one.low, one.high)
    if one.value < 0:
        first, second, (low, high) = one.reference, one.arm, (-one.high, -one.low)
    points = f"{100 * abs(one.value):.1f} points ({100 * low:.1f} to {100 * high:.1f})"
    return f"{titles[first]} is ahead of {titles[second]} by {points}"


def _columns(lengths: Sequence[int]) -> list[str]:
    return [*(f"{length:,}" for length in lengths), "all"]


def _means(found: Found, group: str, titles: Mapping[str, str]) -> str:
    rows = []
    for arm in found.scores:
        means = [found.mean(arm, group, length) for length in (*found.lengths, ALL)]
        told = [f"{100 * m.value:.1f} ({100 * m.low:.0f}–{100 * m.high:.0f})" if m else "" for m in means]
        rows.append((titles[arm], *told))
    samples = [
        max((m.samples for arm in found.scores if (m := found.mean(arm, group, n))), default=0)
        for n in (*found.lengths, ALL)
    ]
    return table(("arm", *_columns(found.lengths)), [*rows, ("samples", *samples)])


def _differences(compared: Sequence[Comparison], group: str, lengths: Sequence[int], titles: Mapping[str, str]) -> str:
    own = {(one.arm, one.reference, one.length): one for one in compared if one.group == group}
    pairs = dict.fromkeys((arm, reference) for arm, reference, _ in own)
    rows = []
    for arm, reference in pairs:
        cells = []
        for length in (*lengths, ALL):
            one = own.get((arm, reference, length))
            text = f"{100 * one.value:+.1f} ({100 * one.low:+.0f} to {100 * one.high:+.0f})" if one else ""
            cells.append(f"**{text}**" if one and one.told_apart else text)
        rows.append((f"{titles[arm]} − {titles[reference]}", *cells))
    return table(("difference in points", *_columns(lengths)), rows)


def _perplexity(found: Found, titles: Mapping[str, str]) -> str:
    reference = next(iter(found.losses)) if "plain" not in found.losses else "plain"
    rows = []
    for arm in found.losses:
        value, low, high = found.regression(arm, reference)
        change = "" if arm == reference else f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append((titles[arm], f"{found.perplexity(arm):.2f}", change))
    return table(("arm", "perplexity", f"against {titles[reference]}"), rows)


def _positions(found: Found, titles: Mapping[str, str]) -> str:
    told = {arm: found.by_position(arm) for arm in found.positions}
    between = list(dict.fromkeys(name for own in sorted(told.values(), key=len, reverse=True) for name in own))
    rows = [
        (titles[arm], *(f"{own[name]:.2f}" if name in own else "" for name in between)) for arm, own in told.items()
    ]
    return table(("arm", *between), rows, right=range(1, 1 + len(between)))


def _watched(found: Found, titles: Mapping[str, str]) -> str:
    lengths = sorted({one["length"] for one in found.watched})
    told: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for one in found.watched:
        told[one["arm"], one["seed"]][one["length"]] = f"{one['loss']:.3f} ({100 * one['needles']:.0f} %)"
    rows = [(titles[arm], seed, *(own.get(n, "") for n in lengths)) for (arm, seed), own in told.items()]
    ranks = {one["length"]: f"{one['spearman']:+.2f}" for one in found.agreement()}
    rows.append(("Spearman", "", *(ranks.get(length, "") for length in lengths)))
    text = (
        "The loss of short rows whose blocks are moved apart to the distance, after training, and beside it the share "
        "of needles found in real texts of that length. Were the one to rank the models as the other does, their rank "
        "correlation would be -1."
    )
    return text + "\n\n" + table(("arm", "seed", *(f"{n:,}" for n in lengths)), rows, right=range(1, 2 + len(lengths)))


def draw(found: Found, titles: Mapping[str, str], folder: Path) -> list[str]:
    """Draw needles by length and, for at most four arms, by depth; return the names of the pictures.

    Drawn are the arms that were asked at the longest length, at the lengths that all of them were asked at.
    """
    arms = [arm for arm in found.scores if found.lengths and found.mean(arm, "needles", found.lengths[-1])]
    if not arms:
        return []
    lengths = [length for length in found.lengths if all(found.mean(arm, "needles", length) for arm in arms)]
    shown = sorted(arms, key=lambda arm: arm not in ("ordinary", "pose", "skip_parts", "skip_context"))[:4]
    means = {arm: [found.mean(arm, "needles", length) for length in lengths] for arm in arms}
    plot_accuracy_by_length(
        {titles[arm]: [mean.value for mean in own if mean] for arm, own in means.items()},
        lengths,
        folder / "accuracy_by_length.png",
        title="Needles among passages",
        highlight=[titles[arm] for arm in arms if arm == "ordinary" or arm.startswith("skip_context")],
        intervals={titles[arm]: [[mean.low, mean.high] for mean in own if mean] for arm, own in means.items()},
        what="share found",
    )
    plot_heatmap(
        {titles[arm]: _by_depth(found, arm, lengths) for arm in shown},
        lengths,
        [(row + 0.5) / DEPTHS for row in range(DEPTHS)],
        folder / "heatmap.png",
        title="One key among many, by its place and the length",
    )
    return list(PICTURES)


def _by_depth(found: Found, arm: str, lengths: Sequence[int]) -> np.ndarray:
    """Exact match of one key, `(depths, lengths)`, depths in quarters."""
    cells = np.zeros((DEPTHS, len(lengths)))
    for row, column in np.ndindex(cells.shape):
        own = [
            score
            for (task, length, _, depth, _), score in found.scores[arm].items()
            if task == "multi_key" and length == lengths[column] and int(depth * DEPTHS) == row
        ]
        cells[row, column] = np.mean(own) if own else 0.0
    return cells
