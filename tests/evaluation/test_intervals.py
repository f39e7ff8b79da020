from math import comb, isclose, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.evaluation.intervals import mean_interval, paired_difference


Z = 1.959964
SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


@pytest.mark.parametrize("right, n, low, high", [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)])
def test_wilson_against_published_values(right, n, low, high):
    assert mean_interval([1] * right + [0] * (n - right)) == pytest.approx((low, high), abs=1e-4)


@given(SCORES)
def test_the_ends_are_the_means_that_the_score_test_just_rejects(scores):
    mean, n = np.mean(scores), len(scores)
    for end in mean_interval(scores):
        assert 0 <= end <= 1
        assert isclose(abs(end - mean), Z * sqrt(end * (1 - end) / n), abs_tol=1e-5)


@given(SCORES, st.randoms())
def test_a_difference_is_in_its_interval_and_has_a_mirror(scores, random):
    other = random.sample(scores, len(scores))
    mean, low, high = paired_difference(scores, other)
    assert -1 <= low <= mean + 1e-9 and mean <= high + 1e-9 and high <= 1
    assert paired_difference(other, scores) == pytest.approx((-mean, -high, -low))


def test_two_pseudo_prompts_are_added():
    differences = np.array([1, 1, 1, 0, 0, -1, 1, -1])  # of two appended prompts, one each way
    half = Z * np.std(differences) / sqrt(8)
    expected = (2 / 6, np.mean(differences) - half, np.mean(differences) + half)
    assert paired_difference([0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("disagreement", [0.05, 0.2, 0.6])
def test_equal_models_seldom_seem_to_differ(disagreement):
    n, chance = 20, 0.0
    for better in range(n + 1):
        for worse in range(n + 1 - better):
            first = [0] * better + [1] * worse + [1] * (n - better - worse)
            second = [1] * better + [0] * worse + [1] * (n - better - worse)
            _, low, high = paired_difference(first, second)
            if low > 0 or high < 0:
                ways = comb(n, better) * comb(n - better, worse)
                chance += ways * (disagreement / 2) ** (better + worse) * (1 - disagreement) ** (n - better - worse)
    assert chance <= 0.05


def test_equal_answers_do_not_prove_equality():
    mean, low, high = paired_difference(np.ones(10), np.ones(10))
    assert mean == 0 and low < -0.1 and high > 0.1


@pytest.mark.parametrize("scores", [[], [1.1], [-0.1], [float("nan")], [[1, 0]]])
def test_what_is_no_score(scores):
    with pytest.raises(ValueError, match="`scores` must be scores from 0 to 1"):
        mean_interval(scores)
    with pytest.raises(ValueError, match="`first` must be"):
        paired_difference(scores, [1])


def test_pairs_need_a_partner():
    with pytest.raises(ValueError, match="`second` must be one score per prompt, 2, got 3"):
        paired_difference([0, 1], [0, 1, 1])
