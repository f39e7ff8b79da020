"""The effective length: the rule by hand, and its interval by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.evaluation.reach import RULER_THRESHOLD, effective_length, reaches
from hf_longalign.records.report import Reach


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
        found = reaches({"base": drawn(rng, [0.95, 0.93, 0.9, 0.2])}, draws=400)["base"]
        missed += not found.low <= 4096 <= found.high
    assert missed <= 20


def test_the_share_is_of_the_models_own_short_score():
    scores = {
        "base": {length: np.full(50, value) for length, value in zip(LENGTHS, [0.5, 0.45, 0.43, 0.2], strict=True)}
    }
    assert reaches(scores)["base"] == Reach(4096, 4096, 4096)
    assert reaches(scores, threshold=RULER_THRESHOLD)["base"] == Reach(0, 0, 0)


def test_who_fails_short_text_reaches_nowhere():
    assert reaches({"base": {1024: np.zeros(9), 2048: np.zeros(9)}}) == {"base": Reach(0, 0, 0)}


def test_models_are_drawn_the_same_samples():
    rng = np.random.default_rng(1)
    scores = drawn(rng, [0.9, 0.8, 0.78, 0.7])
    found = reaches({"base": scores, "adapter": scores})
    assert found["base"] == found["adapter"] and found["base"].low < found["base"].high
    with pytest.raises(ValueError, match="`scores` must hold the same lengths and samples for all models"):
        reaches({"base": scores, "adapter": {1024: np.ones(3)}})
