"""Intervals: against values by hand, and by simulation of models that are equal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_longalign.evaluation.intervals import (
    RULER_THRESHOLD,
    cluster_means,
    effective_length,
    mean_interval,
    paired_difference,
    reaches,
    student_quantile,
)
from hf_longalign.records.report import Difference, Reach


DEPTHS = 5


def answers(rng, share, together, samples):
    """Right and wrong answers `(samples, depths)`; those of a sample go together by the intraclass correlation."""
    scale = (1 - together) / together
    chance = rng.beta(share * scale, (1 - share) * scale, samples)
    return (rng.random((samples, DEPTHS)) < chance[:, None]).astype(float)


def by_sample(grid):
    return cluster_means(grid.ravel(), [sample for sample in range(len(grid)) for _ in range(DEPTHS)])


@pytest.mark.parametrize("samples", [10, 20, 40])
@pytest.mark.parametrize(("share", "together"), [(0.5, 0.2), (0.5, 0.9), (0.8, 0.6), (0.7, 0.4)])
def test_equal_models_are_told_apart_as_often_as_promised(samples, share, together):
    rng = np.random.default_rng(samples)
    told = 0
    for _ in range(1500):
        one, other = (answers(rng, share, together, samples) for _ in range(2))
        _, low, high = paired_difference(by_sample(one), by_sample(other))
        told += low > 0 or high < 0
    assert 0.02 <= told / 1500 <= 0.07


def test_answers_taken_for_samples_would_break_the_promise():
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(500):
        one, other = (answers(rng, 0.5, 0.9, 20) for _ in range(2))
        _, low, high = paired_difference(one.ravel(), other.ravel())
        told += low > 0 or high < 0
    assert told / 500 > 0.25


@pytest.mark.parametrize("samples", [10, 20, 40])
@pytest.mark.parametrize(("share", "together"), [(0.5, 0.2), (0.5, 0.9), (0.8, 0.6), (0.95, 0.3)])
def test_the_interval_of_a_mean_holds_the_truth(samples, share, together):
    rng = np.random.default_rng(samples)
    missed = 0
    for _ in range(1000):
        low, high = mean_interval(by_sample(answers(rng, share, together, samples)))
        missed += not low <= share <= high
    assert missed / 1000 <= 0.09


def test_one_answer_a_sample_is_wilsons_interval():
    right = [1.0] * 7 + [0.0] * 3
    wilson = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert mean_interval(right) == pytest.approx((wilson.low, wilson.high), abs=0.03)
    alike = stats.binomtest(10, 10).proportion_ci(method="wilson")
    assert mean_interval([1.0] * 10) == pytest.approx((alike.low, alike.high))


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 29, 500])
def test_quantiles_are_students(freedom):
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def test_samples_are_averaged_in_their_order():
    assert cluster_means([1, 0, 0.5, 1], ["b", "a", "b", "a"]).tolist() == [0.75, 0.5]


def test_nothing_is_known_from_one_sample():
    assert paired_difference([0.2], [0.9]) == (pytest.approx(0.7), -1.0, 1.0)
    assert paired_difference([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0, 0.0)


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match="`scores` must be scores from 0 to 1"):
        cluster_means([1.5], ["a"])
    with pytest.raises(ValueError, match="`second` must be one score per sample, 2, got 1"):
        paired_difference([1, 0], [1])


LENGTHS = [1024, 2048, 4096, 8192]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_the_rule_is_the_loop(scores, threshold):
    reached = 0
    for length, score in zip(LENGTHS, scores, strict=True):
        if score < threshold:
            break
        reached = length
    assert effective_length(LENGTHS, scores, threshold) == reached


def drawn(rng, rates, samples=40):
    return {length: (rng.random(samples) < rate).astype(float) for length, rate in zip(LENGTHS, rates, strict=True)}


def test_intervals_hold_the_true_reach():
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        found = reaches({"base": drawn(rng, [0.95, 0.93, 0.9, 0.2])}, draws=400).reach["base"]
        missed += not found.low <= 4096 <= found.high
    assert missed <= 20


def test_the_share_is_of_the_models_own_short_score():
    scores = {
        "base": {length: np.full(50, value) for length, value in zip(LENGTHS, [0.5, 0.45, 0.43, 0.2], strict=True)}
    }
    assert reaches(scores).reach["base"] == Reach(4096, 4096, 4096)
    assert reaches(scores, threshold=RULER_THRESHOLD).reach["base"] == Reach(0, 0, 0)


def test_who_fails_short_text_reaches_nowhere():
    assert reaches({"base": {1024: np.zeros(9), 2048: np.zeros(9)}}).reach == {"base": Reach(0, 0, 0)}


def test_models_are_drawn_the_same_samples():
    rng = np.random.default_rng(1)
    scores = drawn(rng, [0.9, 0.8, 0.78, 0.7])
    found = reaches({"base": scores, "adapter": scores})
    assert found.reach["base"] == found.reach["adapter"] and found.reach["base"].low < found.reach["base"].high
    assert found.differences == [Difference("adapter", "base", 0, 0, 0)]
    with pytest.raises(ValueError, match="`scores` must hold the same lengths and samples for all models"):
        reaches({"base": scores, "adapter": {1024: np.ones(3)}})


def test_how_much_further_is_of_the_same_samples():
    rng = np.random.default_rng(2)
    base, adapter = drawn(rng, [0.95, 0.9, 0.8, 0.3]), drawn(rng, [0.95, 0.93, 0.9, 0.7])
    found = reaches({"base": base, "adapter": adapter}, draws=300)
    rng, draws = np.random.default_rng(0), []
    picks = [rng.integers(40, size=(300, 40)) for _ in LENGTHS]
    for draw in range(300):
        reached = []
        for by_length in (base, adapter):
            means = [by_length[length][picks[at][draw]].mean() for at, length in enumerate(LENGTHS)]
            reached.append(effective_length(LENGTHS, means, 0.85 * means[0]))
        draws.append(reached[1] - reached[0])
    draws.sort()
    (difference,) = found.differences
    assert difference.value == found.reach["adapter"].length - found.reach["base"].length
    # The 2.5 and 97.5 % quantiles of 300 numbers, the nearest ones.
    assert (difference.low, difference.high) == (draws[round(0.025 * 299)], draws[round(0.975 * 299)])


def test_models_of_one_reach_are_seldom_told_apart_and_of_two_mostly():
    rng, apart, found = np.random.default_rng(3), 0, 0
    for _ in range(100):
        same = {label: drawn(rng, [0.95, 0.93, 0.82, 0.2]) for label in ("base", "adapter")}
        other = {"base": drawn(rng, [0.97, 0.97, 0.3, 0.1]), "adapter": drawn(rng, [0.97, 0.97, 0.96, 0.95])}
        apart += reaches(same, draws=200).differences[0].significant
        found += reaches(other, draws=200).differences[0].significant
    assert apart <= 5 and found >= 80
