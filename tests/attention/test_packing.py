"""Documents and segments against examples counted by hand."""

from itertools import pairwise

import pytest
import torch

from attention.test_kernels import DOCUMENTS, POSITIONS
from hf_longalign.attention.packing import (
    documents_of_boundaries,
    documents_of_mask,
    documents_of_rows,
    remembered,
    window_segments,
)


def test_segments_are_cut_where_a_window_cannot_reach():
    segments = window_segments(DOCUMENTS, POSITIONS, 6)
    assert segments.bounds == (0, 5, 18, 19, 23, 24, 26)
    assert segments.spans == (10, 14, 1, 4, 1, 1)
    assert segments.plain == [False, False, True, True, True, True]


def test_positions_must_rise_within_documents():
    with pytest.raises(ValueError, match="got 3 then 2 at token 4"):
        window_segments(documents_of_rows(1, 5), torch.tensor([0, 1, 2, 3, 2]), 8)
    with pytest.raises(ValueError, match="must rise"):
        window_segments(documents_of_rows(1, 4), torch.tensor([0, 1, 1, 2]), 8)


def test_what_is_remembered_is_forgotten_when_the_tensor_changes():
    mask = torch.tensor([[True, True, False]])
    first = remembered(mask, "documents", lambda: documents_of_mask(mask))
    assert remembered(mask, "documents", lambda: documents_of_mask(mask)) is first
    mask[0, 2] = True
    assert remembered(mask, "documents", lambda: documents_of_mask(mask)).bounds == (0, 3)


def test_rows_without_any_token():
    documents = documents_of_mask(torch.tensor([[1, 1], [0, 0], [0, 1]]))
    assert documents.bounds == (0, 2, 3)
    packed = documents.pack(torch.arange(6.0).view(3, 1, 2, 1))
    assert packed.flatten().tolist() == [0, 1, 5]
    assert documents.unpack(packed, 3, 2).flatten().tolist() == [0, 1, 0, 0, 0, 5]


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 6], [0, 3, 2, 5], []])
def test_boundaries_must_cover_the_row(bounds):
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` must rise from 0 to the row's length 5"):
        documents_of_boundaries(torch.tensor(bounds), None, 5)


def test_empty_documents_are_passed_over():
    assert documents_of_boundaries(torch.tensor([0, 2, 2, 5, 5]), None, 5).bounds == (0, 2, 5)


def test_bounds_of_rows():
    for batch, length in [(1, 4), (3, 2)]:
        assert all(stop - start == length for start, stop in pairwise(documents_of_rows(batch, length).bounds))
