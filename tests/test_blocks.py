"""Blocks against naive loops; marks survive what TRL's preparation does to labels."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from trl.data_utils import _pack_bfd

from hf_longalign.blocks import (
    as_lengths,
    block_response,
    blocks_from_labels,
    blocks_from_offsets,
    mark_blocks,
    unmark_labels,
)


def naive_marks(labels, lengths, response):
    marked, token = list(labels), 0
    for length, is_response in zip(lengths, response, strict=True):
        first = labels[token]
        if first == -100:
            marked[token] = -102 if is_response else -101
        else:
            marked[token] = -(1001 + 2 * first) if is_response else -(1000 + 2 * first)
        token += length
    return marked


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


@settings(max_examples=200, deadline=None)
@given(documents)
def test_marked_labels_give_back_labels_and_blocks(documents):
    row, marked, seq_lengths, every_length, every_response = [], [], [], [], []
    for document in documents:
        labels = [value for block, _ in document for value in block]
        lengths, response = [len(block) for block, _ in document], [role for _, role in document]
        marks = mark_blocks(labels, lengths, np.array(response))
        assert marks.tolist() == naive_marks(labels, lengths, response)
        assert unmark_labels(marks).tolist() == labels
        assert_blocks(blocks_from_labels(marks), lengths, response)
        row += labels
        marked += marks.tolist()
        seq_lengths.append(len(labels))
        every_length += lengths
        every_response += response
    assert unmark_labels(np.array(marked)).tolist() == row
    assert_blocks(blocks_from_labels(np.array(marked), np.array(seq_lengths)), every_length, every_response)


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


def test_marks_of_one_document_do_not_touch_the_next():
    marked = mark_blocks([-100, 5, 6], [3], np.array([False])).tolist()
    # The first document has one block, although its labels change; the second has runs.
    blocks = blocks_from_labels(np.array([*marked, -100, 7, 8]), np.array([3, 3]))
    assert_blocks(blocks, [3, 1, 2], [False, False, True])


@pytest.mark.parametrize(
    ("cut", "lengths", "response"),
    [
        (1, [1, 1, 2], [False, False, True]),  # in the first instruction block
        (2, [1, 2], [False, True]),  # at a block
        (4, [1], [True]),  # in the response: what is left is one
    ],
)
def test_a_cut_document_keeps_the_marks_it_has(cut, lengths, response):
    marked = mark_blocks([-100, -100, -100, 7, 8], [2, 1, 2], np.array([False, False, True]))
    assert_blocks(blocks_from_labels(marked[cut:]), lengths, response)


def test_marks_survive_packing():
    labels = [[-100, -100, -100, 7, 8], [-100, 9, 10], [-100, -100, 11, 12, 13, 14, 15]]
    lengths, response = [[2, 1, 2], [1, 2], [1, 1, 5]], [[False, False, True], [False, True], [False, False, True]]
    marked = [
        mark_blocks(row, blocks, np.array(roles)).tolist()
        for row, blocks, roles in zip(labels, lengths, response, strict=True)
    ]
    table = pa.table({"input_ids": labels, "labels": marked})
    packed = _pack_bfd(table, 6, "split").to_pydict()
    found = [
        (unmark_labels(np.array(row)).tolist(), blocks_from_labels(np.array(row), np.array(documents)))
        for row, documents in zip(packed["labels"], packed["seq_lengths"], strict=True)
    ]
    assert packed["labels"] != packed["input_ids"]
    assert [row for row, _ in found] == packed["input_ids"]
    by_row = {tuple(row): (blocks.lengths.tolist(), blocks.response.tolist()) for row, blocks in found}
    assert by_row[-100, -100, 11, 12, 13, 14] == ([1, 1, 4], [False, False, True])
    assert by_row[-100, -100, -100, 7, 8, 15] == ([2, 1, 2, 1], [False, False, True, True])
    assert by_row[-100, 9, 10] == ([1, 2], [False, True])


def test_labels_without_marks_come_back_as_they_are():
    labels = np.array([-100, 3, 0])
    assert unmark_labels(labels) is labels


@pytest.mark.parametrize("value", [-103, -500, -999])
def test_a_label_that_is_no_mark_is_refused(value):
    with pytest.raises(ValueError, match=f"`labels` must be token ids, -100 or block marks, got {value}"):
        unmark_labels(np.array([-100, value, -101]))


def test_marking_twice_is_refused():
    marked = mark_blocks([-100, 5], [2], np.array([False]))
    with pytest.raises(ValueError, match=r"`labels` must be token ids or -100, got -101\. Unmark"):
        mark_blocks(marked, [2], np.array([False]))


@pytest.mark.parametrize(
    ("lengths", "response", "message"),
    [
        ([2, 2], [False, True], r"`block_lengths` must add up to the 5 tokens of the sample, got \[2, 2\] \(4\)"),
        ([], [], "`block_lengths` must be a list of at least one length"),
        ([2, 3], [True], r"`response` must be one bool per block, 2 here"),
    ],
)
def test_bad_blocks_are_named(lengths, response, message):
    with pytest.raises(ValueError, match=message):
        mark_blocks([-100, -100, 5, 6, 7], lengths, np.array(response, dtype=bool))


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


def naive_offsets(offsets, cuts):
    begins = {0: 0}
    for number, cut in enumerate(cuts, start=1):
        for token, (start, end) in enumerate(offsets):
            if end > start and end > cut:
                begins[token] = number
                break
    starts = sorted(begins)
    lengths = [after - start for start, after in zip(starts, [*starts[1:], len(offsets)], strict=True)]
    return lengths, [begins[start] for start in starts]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=1, max_size=12),
    st.lists(st.integers(0, 40), max_size=6).map(sorted),
)
def test_cuts_between_characters_become_blocks(widths, cuts):
    offsets, cursor = [], 0
    for width in widths:  # None: a special token, without characters
        offsets.append((0, 0) if width is None else (cursor, cursor + width))
        cursor += width or 0
    lengths, kept = blocks_from_offsets(offsets, cuts)
    assert (lengths.tolist(), kept.tolist()) == naive_offsets(offsets, cuts)
    assert lengths.sum() == len(offsets)


@pytest.mark.parametrize("text", ["Town: Ardel. What?", "Stadt: Zürich 漢字 🙂 — was?"])
def test_offsets_of_a_real_tokenizer(text):
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(text, return_offsets_mapping=True)
    cut = text.index(" ", 7)
    lengths, kept = blocks_from_offsets(encoded["offset_mapping"], [cut])
    assert kept.tolist() == [0, 1]
    assert tokenizer.decode(encoded["input_ids"][: lengths[0]]) == text[:cut]
    assert tokenizer.decode(encoded["input_ids"][lengths[0] :]) == text[cut:]


def test_bad_offsets_are_refused():
    with pytest.raises(ValueError, match="`token_offsets` must hold at least one token"):
        blocks_from_offsets([], [1])
    with pytest.raises(ValueError, match=r"`cuts` must be ascending, got \[3, 2\]"):
        blocks_from_offsets([(0, 4)], [3, 2])
