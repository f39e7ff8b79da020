"""How far a model reaches: the longest length at which it still does what it does on short text. Only NumPy.

Two rules are in use. RULER's (https://arxiv.org/abs/2404.06654) asks for a fixed score, that of Llama-2-7B at 4k,
which says nothing of a small model that fails short questions too. The other asks for a share of the model's own short
score.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hf_longalign.records.report import Reach


# Llama-2-7B (chat) at 4,096 tokens.
RULER_THRESHOLD = 0.856
SHARE = 0.85
DRAWS = 2000


def effective_length(lengths: Sequence[int], scores: Sequence[float], threshold: float) -> int:
    """Return the longest length up to which all scores are at or above a threshold; 0 where the first is not.

    Args:
        lengths: ascending, in tokens.
        scores: mean score at each, 0 to 1.
        threshold: score to keep.

    Example:

    >>> effective_length([1024, 2048, 4096, 8192], [0.9, 0.88, 0.5, 0.9], 0.85)
    2048
    """
    kept = np.asarray(scores) >= threshold
    passed = len(kept) if kept.all() else int(kept.argmin())
    return int(lengths[passed - 1]) if passed else 0


def reaches(
    scores: Mapping[str, Mapping[int, np.ndarray]],
    *,
    threshold: float | None = None,
    share: float = SHARE,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Reach]:
    """Return the effective length of each model with its interval.

    The interval comes from a bootstrap over samples, drawn anew at each length, and alike for all models: they were
    asked the same prompts. A sample that was asked at several depths is one value, the mean of its depths, because
    its depths are not independent.

    Args:
        scores: by label of the model and length, float `(samples,)`: the score of each sample, 0 to 1.
        threshold: score to keep, such as `RULER_THRESHOLD`; `None`: `share` of the model's own score at the shortest
            length.
        share: see `threshold`.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: models that were not asked the same number of samples at the same lengths.

    Example:

    >>> scores = {"base": {1024: np.ones(20), 2048: np.zeros(20)}, "adapter": {1024: np.ones(20), 2048: np.ones(20)}}
    >>> reaches(scores)
    {'base': Reach(length=1024, low=1024, high=1024), 'adapter': Reach(length=2048, low=2048, high=2048)}
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
    rng = np.random.default_rng(seed)
    picks = {length: rng.integers(first[length], size=(draws, first[length])) for length in lengths}
    found = {}
    for label, by_length in scores.items():
        means = [float(np.mean(by_length[length])) for length in lengths]
        drawn = np.stack([np.asarray(by_length[length])[picks[length]].mean(1) for length in lengths], axis=1)
        reached = [effective_length(lengths, row, _kept(row, threshold, share)) for row in drawn]
        low, high = np.quantile(reached, (0.025, 0.975), method="nearest")
        found[label] = Reach(effective_length(lengths, means, _kept(means, threshold, share)), int(low), int(high))
    return found


def _kept(scores: Sequence[float] | np.ndarray, threshold: float | None, share: float) -> float:
    if threshold is not None:
        return threshold
    # Who answers nothing on short text keeps all of it at any length, and reaches nowhere.
    return share * float(scores[0]) if scores[0] > 0 else np.inf
