"""Pair counts against a double loop over tokens; which tokens of a batch are counted."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longalign.coverage import MAX_RUNS, CoverageCallback, DistanceCoverage
from hf_longalign.positions import STRATEGIES, sample_positions
from hf_longalign.records.base import dumps


def naive_pairs(documents, target_length):
    pairs = [0] * target_length
    for positions in documents:
        for index, query in enumerate(positions):
            for key in positions[: index + 1]:
                if query - key < target_length:
                    pairs[query - key] += 1
    return pairs


document = st.sets(st.integers(0, 59), min_size=1).map(sorted)


@settings(max_examples=150, deadline=None)
@given(st.lists(document, min_size=1, max_size=4), st.integers(1, 60))
def test_pairs_by_distance(documents, target_length):
    coverage, together = DistanceCoverage(target_length), DistanceCoverage(target_length)
    for positions in documents:
        coverage.add(np.array(positions, dtype=np.int32))
    assert coverage.pairs.tolist() == naive_pairs(documents, target_length)
    together.add(np.concatenate(documents), [len(positions) for positions in documents])
    assert together.counts().tolist() == coverage.counts().tolist()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.integers(0, 255), min_size=140).map(sorted), min_size=1, max_size=3))
def test_pairs_of_many_runs(documents):
    """140 of 256 positions break into enough runs for the FFT nearly always; a short document stands beside them."""
    coverage = DistanceCoverage(256)
    documents = [*documents, list(range(0, 256, 2)), [0, 1, 2, 200]]
    assert len(documents[-2]) > MAX_RUNS
    coverage.add(np.concatenate(documents), [len(positions) for positions in documents])
    assert coverage.pairs.tolist() == naive_pairs(documents, 256)
    # Asking turns the spectra into counts; asking again, or adding more, must not count them twice.
    coverage.add([0, 5])
    assert coverage.pairs.tolist() == naive_pairs([*documents, [0, 5]], 256)


def test_large_counts_are_exact():
    coverage = DistanceCoverage(20_000)
    positions = np.arange(0, 20_000, 2)
    for _ in range(50):
        coverage.add(positions)
    expected = np.zeros(20_000, dtype=np.int64)
    expected[::2] = 50 * np.arange(10_000, 0, -1)
    assert (coverage.pairs == expected).all()


def test_positions_past_the_target_length_are_left_out():
    coverage = DistanceCoverage(4)
    coverage.add(np.arange(10))
    assert coverage.pairs.tolist() == [10, 9, 8, 7]
    coverage.add(np.arange(0, 300, 2))
    assert coverage.pairs.tolist() == [160, 9, 157, 7]


def test_metrics_by_hand():
    coverage = DistanceCoverage(8)
    coverage.add([0, 1, 2])
    coverage.add([0, 1, 6])
    assert coverage.metrics() == {
        "skip_share": 0.5,
        "skip_span_mean": 5.0,
        "skip_span_max": 7,
        "skip_distance_max": 6,
        "skip_distance_coverage": 5 / 8,  # 0, 1, 2, 5, 6
    }


def test_spans_are_of_the_window_and_distances_of_the_run():
    coverage = DistanceCoverage(8)
    coverage.add([0, 7])
    coverage.metrics()
    assert coverage.metrics() == {}
    coverage.add([0, 1, 2])
    assert coverage.metrics() == {
        "skip_share": 0.0,
        "skip_span_mean": 3.0,
        "skip_span_max": 3,
        "skip_distance_max": 7,
        "skip_distance_coverage": 4 / 8,  # 0, 1, 2, 7
    }
    assert coverage.record().skip_share == 0.5
    assert coverage.record().documents == 2


def test_state_is_json_with_a_histogram_of_the_run():
    coverage = DistanceCoverage(1000)
    rng = np.random.default_rng(0)
    documents = []
    for strategy in STRATEGIES:
        documents.append(sample_positions([40, 60], strategy=strategy, target_length=1000, rng=rng).tolist())
        coverage.add(documents[-1])
    state = json.loads(dumps(coverage.record()))
    pairs = naive_pairs(documents, 1000)
    histogram = state["histogram"]
    edges = histogram["edges"]
    assert edges[0] == 0 and edges[-1] == 1000 and len(edges) == 65
    for index, (low, high) in enumerate(pairwise(edges)):
        assert histogram["pairs"][index] == sum(pairs[low:high])
        assert histogram["covered"][index] == sum(count > 0 for count in pairs[low:high]) / (high - low)
    assert state["skip_distance_coverage"] == sum(count > 0 for count in pairs) / 1000
    assert state["skip_distance_max"] == max(distance for distance, count in enumerate(pairs) if count)


def test_an_empty_run_has_a_state():
    state = DistanceCoverage(3).record().to_json()
    assert state["documents"] == 0
    assert state["skip_distance_coverage"] == 0
    assert state["histogram"] == {"edges": [0, 1, 2, 3], "pairs": [0, 0, 0], "covered": [0.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("positions", "lengths", "name"),
    [
        ([], None, "lengths"),
        ([], [], "lengths"),
        ([0, 1], [2, 0], "lengths"),
        ([0, 1], [1], "lengths"),
        ([0, 0], None, "positions"),
        ([3, 2], None, "positions"),
        ([3, 4, 2, 2], [2, 2], "positions"),
    ],
)
def test_what_is_no_document_is_refused(positions, lengths, name):
    with pytest.raises(ValueError, match=f"`{name}` must "):
        DistanceCoverage(8).add(positions, lengths)


def counted(batch):
    callback = CoverageCallback(8)
    callback.observe({key: torch.tensor(values) for key, values in batch.items()})
    callback.gather()
    record = callback.record()
    return record.documents, callback.pairs.tolist()


def test_padding_and_documents_without_targets_are_not_counted():
    rows = {
        "position_ids": [[0, 1, 6, 0], [0, 1, 2, 3], [0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
        "labels": [[-100, 5, 6, -100], [7, -100, -100, -100], [-100, -100, -100, -100]],
    }
    assert counted(rows) == (1, naive_pairs([[0, 1, 6]], 8))
    packed = {
        "position_ids": [[0, 1, 6, 0, 1, 0, 1, 2]],
        "seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2]],  # the last one fills up to a multiple of 8
        "labels": [[-100, 5, 6, -100, 4, -100, -100, -100]],
    }
    assert counted(packed) == (2, naive_pairs([[0, 1, 6], [0, 1]], 8))


def test_a_run_goes_on_from_the_counts_of_its_checkpoint_alone(tmp_path):
    saved, other = CoverageCallback(8), CoverageCallback(8)
    saved.add([0, 1, 6])
    saved.save(tmp_path)
    other.add([0, 1, 2, 3])
    other.load(tmp_path)
    assert other.record() == saved.record() and other.metrics() == {}
