"""How far a mean score may lie from what endless samples would give: 95 % intervals by sample. Only NumPy.

A sample that is asked at five depths is one sample: its answers rise and fall together. Taken for five, equal models
are told apart in up to 40 % of all runs. So scores are averaged within a sample (a cluster) first, and what the
averages vary by makes the interval. Student's quantile over the clusters keeps the 5 % that it promises, also with ten
of them; a bootstrap over clusters, which was tried beside it, exceeds it with few and is not the same in every run.
"""

from collections.abc import Hashable, Sequence
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike


Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def cluster_means(scores: ArrayLike, clusters: Sequence[Hashable]) -> np.ndarray:
    """Return the mean score of each sample, float `(samples,)`, in the order in which samples first occur.

    Args:
        scores: float `(answers,)`, 0 to 1.
        clusters: the sample that each answer belongs to.

    Raises:
        ValueError: no scores, or one that is not from 0 to 1.

    Example:

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
    """Return a 95 % interval of the mean over samples: Wilson's, with as many answers as the samples are worth.

    Wilson's interval (1927, https://doi.org/10.1080/01621459.1927.10502953) stays within 0 and 1 and does not collapse
    where all answers are right. How many right-or-wrong answers would vary as much as the samples do takes the place
    of their number: fewer where answers of a sample go together, more where scores are shares such as F1.

    Args:
        means: float `(samples,)`, see [`cluster_means`].

    Example:

    >>> [round(end, 3) for end in mean_interval([1, 1, 1, 1, 1, 1, 1, 1, 1, 0])]
    [0.577, 0.983]
    >>> [round(end, 3) for end in mean_interval([1.0] * 10)]
    [0.722, 1.0]
    """
    values = np.asarray(means, dtype=np.float64)
    number, mean = values.size, float(values.mean())
    variance = float(values.var(ddof=1)) / number if number > 1 else 0.0
    worth = mean * (1 - mean) / variance if variance else float(number)
    centre = (mean + Z * Z / (2 * worth)) / (1 + Z * Z / worth)
    half = Z * sqrt(mean * (1 - mean) / worth + Z * Z / (4 * worth * worth)) / (1 + Z * Z / worth)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Return by how much the second model is better on the same samples, and the 95 % interval of that.

    Where the interval leaves out 0, the change is larger than chance. With a single sample nothing is known: the
    interval is then -1 to 1.

    Args:
        first: float `(samples,)`, the first model's mean score of each sample.
        second: float `(samples,)`, the second model's on the same ones.

    Returns:
        The mean difference, the lower and the upper end.

    Raises:
        ValueError: another number of samples for each model.

    Example:

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
    half = student_quantile(differences.size - 1) * float(differences.std(ddof=1)) / sqrt(differences.size)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution: exact for 1 and 2, else Fisher's expansion, to 1 %.

    >>> [round(student_quantile(freedom), 2) for freedom in (1, 2, 4, 9, 30, 1000)]
    [12.71, 4.3, 2.77, 2.26, 2.04, 1.96]
    """
    if freedom == 1:
        return 12.706204736
    if freedom == 2:
        return 4.30265273
    terms = ((Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384)
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))
