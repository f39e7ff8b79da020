"""How far a score may lie from what endless samples would give, and how far a model reaches: by sample, with NumPy.

A sample that is asked at five depths is one sample: its answers rise and fall together. Taken for five, equal models
are told apart in up to 40 % of all runs. So scores are averaged within a sample (a cluster) first, and what the
averages vary by makes the interval.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from hf_longalign.records.report import Difference, Reach, ReachResult, Score


Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
# Two rules say how far a model reaches. RULER's (https://arxiv.org/abs/2404.06654) asks for a fixed score, that of
# Llama-2-7B (chat) at 4,096 tokens, which says nothing of a small model that fails short questions too. The other asks
# for a share of the model's own short score.
RULER_THRESHOLD = 0.856
SHARE = 0.85


def cluster_means(scores: ArrayLike, clusters: Sequence[Hashable]) -> np.ndarray:
    """Return the mean score of each sample, float `(samples,)`, in the order in which samples first occur.

    `scores`, float `(answers,)`, are 0 to 1; `clusters` tell the sample that each belongs to.

    >>> cluster_means([1, 0, 1, 1], ["a", "a", "b", "b"])
    array([0.5, 1. ])
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"`scores` must be scores from 0 to 1, at least one, got {scores!r}. Score some prompts.")
    order = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    which = np.array([order[cluster] for cluster in clusters])
    return np.bincount(which, values) / np.bincount(which)


def mean_interval(means: ArrayLike) -> tuple[float, float]:
    """Return a 95 % interval of the mean over samples, float `(samples,)`: Wilson's, for what the samples are worth.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.

    >>> [round(end, 3) for end in mean_interval([1, 1, 1, 1, 1, 1, 1, 1, 1, 0])]
    [0.577, 0.983]
    """
    values = np.asarray(means, dtype=np.float64)
    number, mean = values.size, float(values.mean())
    variance = float(values.var(ddof=1)) / number if number > 1 else 0.0
    # How many right-or-wrong answers would vary as much takes the place of the number of samples: fewer where answers
    # of a sample go together, more where scores are shares such as F1. Wilson's, since it stays within 0 and 1 and
    # keeps a width where all answers are right.
    worth = mean * (1 - mean) / variance if variance else float(number)
    centre = (mean + Z * Z / (2 * worth)) / (1 + Z * Z / worth)
    half = Z * sqrt(mean * (1 - mean) / worth + Z * Z / (4 * worth * worth)) / (1 + Z * Z / worth)
    return max(0.0, centre - half), min(1.0, centre + half)


def with_interval(means: np.ndarray) -> Score:
    """Return the mean over samples, float `(samples,)`, with its 95 % interval."""
    return Score(float(means.mean()), *mean_interval(means))


def paired_difference(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Return by how much the second model is better on the same samples, with the lower and upper end of that at 95 %.

    Both are float `(samples,)`, each model's mean score of each sample; of a single one nothing is known: -1 to 1.

    Raises:
        ValueError: another number of samples for each model.

    >>> [round(value, 3) for value in paired_difference([0, 0, 0.5, 1, 1, 0], [1, 1, 1, 1, 1, 0])]
    [0.417, -0.099, 0.932]
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.size != other.size:
        raise ValueError(
            f"`second` must be one score per sample, {one.size}, got {other.size}. Score the same prompts."
        )
    differences = other - one
    mean = float(differences.mean())
    if differences.size == 1:
        return mean, -1.0, 1.0
    # Student's quantile keeps the 5 % that it promises with ten samples too; a bootstrap over samples, which was tried
    # beside it, exceeds it with few and is not the same in every run.
    half = student_quantile(differences.size - 1) * float(differences.std(ddof=1)) / sqrt(differences.size)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution: exact for 1 and 2, else Fisher's expansion, to 1 %.

    >>> [round(student_quantile(freedom), 2) for freedom in (1, 2, 4, 9, 30, 1000)]
    [12.71, 4.3, 2.77, 2.26, 2.04, 1.96]
    """
    if freedom <= 2:
        return (12.706204736, 4.30265273)[freedom - 1]
    terms = ((Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384)
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def effective_length(lengths: Sequence[int], scores: ArrayLike, threshold: float) -> int:
    """Return the longest length up to which all scores are at or above a threshold; 0 where the first is not.

    >>> effective_length([1024, 2048, 4096, 8192], [0.9, 0.88, 0.5, 0.9], 0.85)
    2048
    """
    kept = np.asarray(scores) >= threshold
    passed = len(kept) if kept.all() else int(kept.argmin())
    return int(lengths[passed - 1]) if passed else 0


def reaches(
    scores: Mapping[str, Mapping[int, np.ndarray]],
    *,
    rule: str = "",
    threshold: float | None = None,
    draws: int = 2000,
) -> ReachResult:
    """Return the effective length of each model, and by how much each later model reaches further.

    The intervals are from a bootstrap over samples, which draws the same samples for all models.

    Args:
        scores: by label of the model and length, float `(samples,)`: the score of each sample, 0 to 1.
        rule: in words.
        threshold: score to keep; `None`: `SHARE` of the model's own score at the shortest length.

    Raises:
        ValueError: models that were not asked the same number of samples at the same lengths.

    >>> base = {1024: np.ones(20), 2048: np.zeros(20)}
    >>> found = reaches({"base": base, "adapter": {1024: np.ones(20), 2048: np.ones(20)}})
    >>> found.reach["base"], found.differences[0].value
    (Reach(length=1024, low=1024, high=1024), 1024)
    """
    shapes = {label: {length: len(values) for length, values in sorted(by.items())} for label, by in scores.items()}
    first = next(iter(shapes.values()))
    for label, shape in shapes.items():
        if shape != first or not shape:
            raise ValueError(
                "`scores` must hold the same lengths and samples for all models, got "
                f"{shape} for {label!r} and {first}. Ask all models the same prompts."
            )
    lengths = list(first)
    rng = np.random.default_rng(0)
    # Drawn once for all models: they were asked the same prompts, and so differ by what they answered alone.
    picks = {length: rng.integers(first[length], size=(draws, first[length])) for length in lengths}

    def reached(means: np.ndarray) -> int:
        if threshold is not None:
            return effective_length(lengths, means, threshold)
        # Who answers nothing on short text keeps all of it at any length, and reaches nowhere.
        return effective_length(lengths, means, SHARE * float(means[0]) if means[0] > 0 else np.inf)

    def ends(reached: np.ndarray) -> list[int]:
        return [int(end) for end in np.quantile(reached, (0.025, 0.975), method="nearest")]

    own, drawn = {}, {}
    for label, by_length in scores.items():
        means = np.stack([np.asarray(by_length[length])[picks[length]].mean(1) for length in lengths], axis=1)
        drawn[label] = np.array([reached(row) for row in means])
        own[label] = reached(np.array([np.mean(by_length[length]) for length in lengths]))
    return ReachResult(
        rule,
        {label: Reach(own[label], *ends(drawn[label])) for label in scores},
        [
            Difference(label, reference, own[label] - own[reference], *ends(drawn[label] - drawn[reference]))
            for reference, label in combinations(scores, 2)
        ],
    )
