"""Positions against naive loops, exact distributions of tiny cases, and properties of every strategy."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longalign.positions import STRATEGIES, composition, document_rng, sample_positions


BOUNDARY = ("skip_inner", "skip_outer", "skip_all")


def chi_square_limit(categories):
    """The 99.9% quantile of chi-square by Wilson and Hilferty."""
    k = categories - 1
    return k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


def is_uniform(draws, categories):
    counts = Counter(draws)
    assert set(counts) <= set(categories), f"outside the range: {set(counts) - set(categories)}"
    expected = len(draws) / len(categories)
    statistic = sum((counts[category] - expected) ** 2 / expected for category in categories)
    return statistic < chi_square_limit(len(categories))


def allowed_boundaries(strategy, response):
    """Naive: the blocks before which a strategy may skip."""
    allowed = []
    for block in range(1, len(response)):
        between_turns = response[block - 1] and not response[block]
        if strategy == "skip_all" or (strategy == "skip_outer") == between_turns:
            allowed.append(block)
    return allowed


samples = st.lists(st.integers(1, 12), min_size=1, max_size=8).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths),
        st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)),
        st.integers(sum(lengths), sum(lengths) + 200),
        st.integers(0, 2**32),
    )
)


def places(positions):
    """The tokens before which positions skip."""
    return set((np.flatnonzero(np.diff(positions) > 1) + 1).tolist())


def drawn(sample, strategy):
    lengths, response, target, seed = sample
    rng = np.random.default_rng(seed)
    return sample_positions(lengths, strategy=strategy, target_length=target, rng=rng, response=np.array(response))


@settings(max_examples=60, deadline=None)
@given(samples)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_positions_increase_strictly_from_0_below_the_target(strategy, sample):
    lengths, _, target_length, _ = sample
    positions = drawn(sample, strategy)
    assert positions.dtype == np.int64
    assert positions.shape == (sum(lengths),)
    assert positions[0] == 0
    assert all(a < b for a, b in itertools.pairwise(positions.tolist()))
    assert positions[-1] < target_length
    if target_length == sum(lengths):
        assert positions.tolist() == list(range(sum(lengths)))


@settings(max_examples=200, deadline=None)
@given(samples)
def test_skip_context_skips_before_what_is_no_response_and_else_once_inside_the_first_block(sample):
    lengths, response, *_ = sample
    positions = drawn(sample, "skip_context")
    skipped = places(positions)
    allowed = {sum(lengths[:block]) for block in range(1, len(lengths)) if not response[block]}
    if allowed:
        assert skipped <= allowed
    else:
        assert len(skipped) <= 1 and skipped <= set(range(1, lengths[0]))


@settings(max_examples=100, deadline=None)
@given(samples)
@pytest.mark.parametrize("strategy", BOUNDARY)
def test_blocks_stay_contiguous_and_skip_only_where_allowed(strategy, sample):
    lengths, response, *_ = sample
    positions = drawn(sample, strategy).tolist()
    allowed = allowed_boundaries(strategy, response)
    token = 0
    for block, length in enumerate(lengths):
        for _ in range(length):
            first_of_block = token == sum(lengths[:block])
            if token > 0 and not (first_of_block and block in allowed):
                assert positions[token] == positions[token - 1] + 1
            token += 1
    if not allowed:
        assert positions == list(range(sum(lengths)))


@pytest.mark.parametrize(
    ("strategy", "boundaries"), [("skip_inner", {2, 7}), ("skip_outer", {5}), ("skip_all", {2, 5, 7})]
)
def test_blocks_alternate_by_default(strategy, boundaries):
    # instruction 2, response 3, instruction 2, response 1
    rng, seen = np.random.default_rng(0), set()
    for _ in range(30):
        seen |= places(sample_positions([2, 3, 2, 1], strategy=strategy, target_length=100, rng=rng))
    assert seen == boundaries


def test_a_turn_ends_after_a_response_that_an_instruction_follows():
    # context, question, two response blocks, question, response
    response = np.array([False, False, True, True, False, True])
    assert allowed_boundaries("skip_outer", response) == [4]
    seen = {"skip_inner": set(), "skip_outer": set()}
    rng = np.random.default_rng(0)
    for strategy, _ in itertools.product(seen, range(30)):
        seen[strategy] |= places(
            sample_positions([1] * 6, strategy=strategy, target_length=500, rng=rng, response=response)
        )
    assert seen == {"skip_inner": {1, 2, 3, 5}, "skip_outer": {4}}


def test_skip_context_never_skips_before_a_response():
    # context, context, question, response, question, response
    response = np.array([False, False, False, True, False, True])
    seen, cuts = set(), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        lengths = [2, 3, 2, 1, 2, 2]
        seen |= places(
            sample_positions(lengths, strategy="skip_context", target_length=500, rng=rng, response=response)
        )
        # One turn without contexts: its instruction is cut.
        cuts |= places(sample_positions([4, 3], strategy="skip_context", target_length=500, rng=rng))
    assert seen == {2, 5, 8}
    assert cuts == {1, 2, 3}
    rng = np.random.default_rng(0)
    assert sample_positions([1, 3], strategy="skip_context", target_length=50, rng=rng).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("total", "parts"), [(0, 1), (5, 1), (0, 4), (4, 3), (6, 2)])
def test_composition_is_uniform(total, parts):
    rng = np.random.default_rng(1)
    every = [c for c in itertools.product(range(total + 1), repeat=parts) if sum(c) == total]
    draws = [tuple(composition(total, parts, rng).tolist()) for _ in range(200 * len(every))]
    assert len(every) == math.comb(total + parts - 1, parts - 1)
    assert set(draws) == set(every)
    assert len(every) == 1 or is_uniform(draws, every)


def relative_distances(lengths, strategy, first, second, target_length, draws=20_000):
    rng = np.random.default_rng(7)
    every = (sample_positions(lengths, strategy=strategy, target_length=target_length, rng=rng) for _ in range(draws))
    return [int(positions[second] - positions[first]) for positions in every]


@pytest.mark.parametrize("strategy", ["skip_inner", "skip_all"])
def test_distance_from_instruction_to_response_is_uniform_over_the_span(strategy):
    # 30 instruction tokens, 10 response tokens: token 4 and token 33 are 29 to 29 + (296 - 40) positions apart.
    distances = relative_distances([30, 10], strategy, 4, 33, target_length=296)
    assert is_uniform(distances, range(29, 29 + 257))


def test_distance_from_first_to_last_block_is_uniform_over_the_span():
    distances = relative_distances([8, 8, 8, 8], "skip_all", 0, 31, target_length=160)
    assert is_uniform(distances, range(31, 31 + 129))


def test_a_front_loaded_sampler_is_not_uniform():
    """The counterexample: s_1 ~ U{0..budget}, s_2 ~ U{what is left}; so the tests above can fail."""
    rng = np.random.default_rng(7)
    distances = []
    for _ in range(20_000):
        budget = 160 - 32
        skips = []
        for _ in range(3):
            skips.append(int(rng.integers(0, budget - sum(skips), endpoint=True)))
        distances.append(31 + sum(skips))
    assert not is_uniform(distances, range(31, 31 + 129))


def test_pose_splits_and_shifts_uniformly():
    rng = np.random.default_rng(3)
    splits, shifts = [], []
    for _ in range(20_000):
        positions = sample_positions([4, 4], strategy="pose", target_length=24, rng=rng)
        skips = np.diff(positions) - 1
        assert (skips > 0).sum() <= 1
        shifts.append(int(skips.sum()))
        if shifts[-1]:
            splits.append(int(skips.argmax()) + 1)
    assert is_uniform(splits, range(1, 8))
    assert is_uniform(shifts, range(17))


def test_randpos_is_a_uniform_subset():
    rng = np.random.default_rng(4)
    draws = [
        tuple(sample_positions([3], strategy="randpos", target_length=6, rng=rng).tolist()) for _ in range(10_000)
    ]
    # Every subset of 3 out of 6 shifted to start at 0, as often as subsets lead to it.
    subsets = [tuple(p - subset[0] for p in subset) for subset in itertools.combinations(range(6), 3)]
    counts, expected = Counter(draws), Counter(subsets)
    assert set(counts) == set(expected)
    statistic = sum(
        (counts[s] - 500 * expected[s]) ** 2 / (500 * expected[s]) for s in expected
    )  # 10,000 draws of 20 subsets
    assert statistic < chi_square_limit(len(expected))


def test_cream_holds_head_and_tail_and_favours_the_middle():
    rng = np.random.default_rng(5)
    heads, shifts = Counter(), []
    for _ in range(4000):
        positions = sample_positions([30], strategy="cream", target_length=130, rng=rng)
        assert positions[-1] == 129
        skips = np.diff(positions) - 1
        if (skips > 0).sum() == 2:
            first, second = (np.flatnonzero(skips) + 1).tolist()
            assert first == 30 - second
            heads[first] += 1
        shifts.append(int(skips[: len(skips) // 2].sum()))
    # A third of 30 tokens, and 4 times the factor of extension (130 // 30 = 4) capped at that third.
    assert set(heads) == {10}
    assert abs(np.mean(shifts) - 50) < 1
    assert 18 < np.std(shifts) < 22  # 3/14 of 100, a little less for the truncation
    assert min(shifts) >= 0 and max(shifts) <= 100


def test_cream_takes_a_short_head_half_of_the_time():
    rng = np.random.default_rng(6)
    heads = Counter()
    for _ in range(1000):
        positions = sample_positions([300], strategy="cream", target_length=3000, rng=rng)
        heads[int(np.flatnonzero(np.diff(positions) > 1)[0]) + 1] += 1
    assert set(heads) == {40, 100}
    assert 430 < heads[40] < 570


@pytest.mark.parametrize("strategy", ["pose", "cream", *BOUNDARY])
@pytest.mark.parametrize("length", [1, 2])
def test_shortest_samples(strategy, length):
    for seed in range(10):
        positions = sample_positions([length], strategy=strategy, target_length=9, rng=np.random.default_rng(seed))
        assert positions[0] == 0 and positions.size == length


def test_a_callable_gets_blocks_target_and_rng():
    rng = np.random.default_rng(0)

    def spread(block_lengths, target_length, given_rng):
        assert given_rng is rng
        assert block_lengths.tolist() == [2, 1]
        return np.array([0, 4, target_length - 1], dtype=np.int32)

    positions = sample_positions([2, 1], strategy=spread, target_length=9, rng=rng)
    assert positions.tolist() == [0, 4, 8]
    assert positions.dtype == np.int64


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ([0.0, 1.0, 2.0], "float64"),
        ([0, 1], "shape (2,)"),
        ([[0, 1, 2]], "shape (1, 3)"),
        ([1, 2, 3], "array([1, 2, 3])"),
        ([0, 2, 2], "array([0, 2, 2])"),
        ([0, 2, 1], "array([0, 2, 1])"),
        ([0, 1, 9], "array([0, 1, 9])"),
        (np.array([0, 2, 1], dtype=np.uint8), "array([0, 2, 1])"),
        (None, "object"),
    ],
)
def test_a_callable_that_returns_no_positions_is_refused(returned, found):
    with pytest.raises(ValueError, match=f"`strategy` must return 3 whole numbers.*9.*{re.escape(found)}"):
        sample_positions([3], strategy=lambda *_: returned, target_length=9, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_lengths": []}, r"`block_lengths` must be a list of at least one length, got \[\]"),
        ({"block_lengths": 4}, r"`block_lengths` must be a list of at least one length, got 4"),
        ({"block_lengths": [3, 0]}, r"`block_lengths` must be whole numbers of at least 1, got \[3, 0\]"),
        ({"block_lengths": [0]}, r"`block_lengths` must be whole numbers of at least 1, got \[0\]"),
        ({"block_lengths": [3, -1]}, r"at least 1, got \[3, -1\]"),
        ({"block_lengths": [2.0]}, r"whole numbers of at least 1, got \[2.0\]"),
        ({"block_lengths": [float("nan")]}, r"whole numbers of at least 1, got \[nan\]"),
        ({"block_lengths": [True]}, r"whole numbers of at least 1, got \[True\]"),
        ({"block_lengths": ["3"]}, r"whole numbers of at least 1, got \['3'\]"),
        ({"block_lengths": [None]}, r"whole numbers of at least 1, got \[None\]"),
        ({"target_length": 4}, r"`target_length` must be at least .* sample, 5 tokens, got 4\. Set"),
        ({"target_length": 8.0}, r"`target_length` must be a whole number, got 8.0"),
        ({"target_length": True}, r"`target_length` must be a whole number, got True"),
        (
            {"strategy": "skip"},
            r"must be one of \['none', 'skip_inner'.*'cream'\] or a callable, got 'skip'",
        ),
        ({"strategy": None}, r"`strategy` must be one of .* got None"),
        ({"response": [True]}, r"`response` must be one bool per block, 2 here, got \[True\]"),
        ({"response": [0, 1]}, r"`response` must be one bool per block, 2 here, got \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"block_lengths": [3, 2], "strategy": "skip_all", "target_length": 9, "rng": np.random.default_rng(0)}
    good.update(arguments)
    with pytest.raises(ValueError, match=message):
        sample_positions(good.pop("block_lengths"), **good)


def test_document_rng_gives_these_very_numbers_on_every_platform():
    rng = document_rng(np.array([1, 2, 3]), seed=42, epoch=1)
    assert rng.integers(0, 2**32, 3).tolist() == [4285059067, 2778146130, 4223675764]


def test_document_rng_depends_on_seed_epoch_and_content_alone():
    ids = np.arange(20)

    def first(ids, seed=0, epoch=0):
        return int(document_rng(ids, seed=seed, epoch=epoch).integers(2**62))

    same = [first(ids), first(ids.astype(np.int32)), first(np.arange(40)[::2] // 2), first(ids.astype(">i8"))]
    assert len(set(same)) == 1
    other = [first(ids, seed=1), first(ids, epoch=1), first(ids[:-1]), first(ids[::-1]), first(ids, seed=-1)]
    assert len({same[0], *other}) == 6
