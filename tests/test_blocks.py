"""Blocks against naive loops; their column survives what TRL's preparation does to the tokens."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import _pack_bfd

from hf_longalign.blocks import (
    Blocks,
    as_lengths,
    block_response,
    blocks_at,
    blocks_from_column,
    blocks_from_labels,
    blocks_to_column,
)


def naive_runs(labels):
    lengths, response = [], []
    for index, label in enumerate(labels):
        if index == 0 or (label == -100) != (labels[index - 1] == -100):
            lengths.append(0)
            response.append(label != -100)
        lengths[-1] += 1
    if len(lengths) > 1 and not response[-1]:  # ignored text after the last target
        lengths[-2:], response = [lengths[-2] + lengths[-1]], response[:-1]
    return lengths, response


def assert_blocks(blocks, lengths, response):
    assert blocks.lengths.tolist() == list(lengths)
    assert blocks.response.tolist() == list(response)
    assert blocks.lengths.dtype == np.int64
    assert blocks.response.dtype == bool


label = st.one_of(st.just(-100), st.integers(0, 300_000))
documents = st.lists(
    st.lists(
        st.tuples(st.lists(label, min_size=1, max_size=6), st.booleans()),  # blocks: labels and role
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=4,
)


def column_of(lengths, response):
    return blocks_to_column(Blocks(np.array(lengths), np.array(response)))


@settings(max_examples=200, deadline=None)
@given(documents, st.data())
def test_a_column_gives_back_its_blocks_wherever_documents_are_cut(documents, data):
    columns, seq_lengths, lengths, response = [], [], [], []
    for document in documents:
        own_lengths, own_response = [len(block) for block, _ in document], [role for _, role in document]
        column = column_of(own_lengths, own_response)
        assert column.dtype == np.int8
        owners = np.repeat(np.arange(len(document)), own_lengths)
        start = data.draw(st.integers(0, column.size - 1))
        end = data.draw(st.integers(start + 1, column.size))
        columns += column[start:end].tolist()
        seq_lengths.append(end - start)
        for block in sorted(set(owners[start:end].tolist())):
            lengths.append(int((owners[start:end] == block).sum()))
            response.append(own_response[block])
    assert_blocks(blocks_from_column(np.array(columns), np.array(seq_lengths)), lengths, response)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(label, min_size=1, max_size=12), min_size=1, max_size=4))
def test_runs_of_ignored_labels_are_blocks(documents):
    lengths, response = [], []
    for document in documents:
        assert_blocks(blocks_from_labels(np.array(document)), *naive_runs(document))
        for blocks, all_blocks in zip(naive_runs(document), (lengths, response), strict=True):
            all_blocks += blocks
    row = np.array([value for document in documents for value in document])
    assert_blocks(blocks_from_labels(row, np.array([len(document) for document in documents])), lengths, response)


@pytest.mark.parametrize("strategy", ["truncate", "split"])
def test_the_column_goes_through_packing(strategy):
    ids = [[1, 2, 3, 7, 8], [4, 9, 10], [5, 6, 11, 12, 13, 14, 15]]
    columns = [
        column_of([2, 1, 2], [False, False, True]),
        column_of([1, 2], [False, True]),
        column_of([1, 1, 5], [False, False, True]),
    ]
    table = pa.table({"input_ids": ids, "blocks": columns})
    packed = _pack_bfd(table, 6, strategy).to_pydict()
    found = {}
    for row, column, documents in zip(packed["input_ids"], packed["blocks"], packed["seq_lengths"], strict=True):
        blocks = blocks_from_column(np.array(column), np.array(documents))
        found[tuple(row)] = blocks.lengths.tolist(), blocks.response.tolist()
    assert found.pop((5, 6, 11, 12, 13, 14)) == ([1, 1, 4], [False, False, True])
    if strategy == "split":
        # Of the third document's answer one token is left, which still is an answer.
        assert found.pop((1, 2, 3, 7, 8, 15)) == ([2, 1, 2, 1], [False, False, True, True])
    else:
        assert found.pop((1, 2, 3, 7, 8)) == ([2, 1, 2], [False, False, True])
    assert found == {(4, 9, 10): ([1, 2], [False, True])}


@pytest.mark.parametrize("value", [-100, -1, 4])
def test_a_column_of_something_else_is_refused(value):
    with pytest.raises(ValueError, match=r"`blocks` must be numbers from 0 to 3, got .* `block_lengths`"):
        blocks_from_column(np.array([0, value, 1]))


def test_as_lengths_names_documents():
    with pytest.raises(ValueError, match=r"`seq_lengths` must add up to the 3 tokens .* one document\."):
        as_lengths("seq_lengths", [2, 2], total=3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.sampled_from([-100, 5]), min_size=1, max_size=4), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    )
)
def test_a_block_that_ends_with_a_target_is_a_response(documents):
    expected = []
    for blocks in documents:
        if any(-100 in block for block in blocks):
            expected += [block[-1] != -100 for block in blocks]
        else:
            expected += [index % 2 == 1 for index in range(len(blocks))]
    labels = [value for blocks in documents for block in blocks for value in block]
    lengths = np.array([len(block) for blocks in documents for block in blocks])
    seq_lengths = np.array([sum(map(len, blocks)) for blocks in documents])
    assert block_response(labels, lengths, seq_lengths).tolist() == expected
    if len(documents) == 1:
        assert block_response(labels, lengths).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 14), st.booleans()), max_size=6).map(lambda cuts: sorted(cuts)),
)
def test_blocks_begin_at_tokens(total, cuts):
    owner = {0: False}
    for token, response in cuts:  # of two at one token the later stays
        if token < total:
            owner[token] = response
    starts = sorted(owner)
    lengths = [after - start for start, after in zip(starts, [*starts[1:], total], strict=True)]
    tokens, response = zip(*cuts, strict=True) if cuts else ((), ())
    assert_blocks(blocks_at(tokens, response, total), lengths, [owner[start] for start in starts])
