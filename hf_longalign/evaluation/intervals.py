"""How far a mean score may lie from what endless samples would give: 95 % intervals without resampling. Only NumPy."""

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike


Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def mean_interval(scores: ArrayLike) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a mean.

    Exact match is what it is made for (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953): it stays within 0
    and 1 and does not collapse where all answers are right. Shares such as recall or F1 vary less than right and
    wrong with the same mean, so for them it is wider than need be.

    Args:
        scores: float `(samples,)`, 0 to 1.

    Raises:
        ValueError: no scores, or one that is not from 0 to 1.

    Example:

    >>> [round(end, 3) for end in mean_interval([1, 1, 1, 1, 1, 1, 1, 1, 1, 0])]
    [0.596, 0.982]
    """
    values = _checked("scores", scores)
    n, mean = values.size, float(values.mean())
    centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Return by how much the second model is better on the same prompts, and the 95 % interval of that.

    Where the interval does not hold 0, the change is larger than chance: two equal models that disagree on up to 60 %
    of the prompts seem to differ with a chance of about 5 % at most (5 to 100 prompts, enumerated). The interval is
    Bonett and Price's adjusted Wald interval for paired proportions (2012, https://doi.org/10.3102/1076998611411915):
    one prompt is added that only the first model answers and one that only the second does, so that it does not
    collapse where both agree on all. For shares such as recall these two prompts make it a little wider.

    Args:
        first: float `(samples,)`, scores of the first model, 0 to 1.
        second: float `(samples,)`, scores of the second model on the same prompts.

    Returns:
        The mean difference, the lower and the upper end.

    Raises:
        ValueError: no scores, another number for each model, or one that is not from 0 to 1.

    Example:

    >>> [round(float(value), 3) for value in paired_difference([0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1, 1])]
    [0.625, 0.084, 0.916]
    """
    one, other = _checked("first", first), _checked("second", second)
    if one.size != other.size:
        raise ValueError(
            f"`second` must be one score per prompt, {one.size}, got {other.size}. Score the same prompts."
        )
    differences = other - one
    n = differences.size + 2
    centre = float(differences.sum()) / n
    half = Z * sqrt(max(0.0, (float((differences**2).sum()) + 2) / n - centre**2) / n)
    return float(differences.mean()), max(-1.0, centre - half), min(1.0, centre + half)


def _checked(name: str, scores: ArrayLike) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"`{name}` must be scores from 0 to 1, at least one, got {scores!r}. Score some prompts.")
    return values
