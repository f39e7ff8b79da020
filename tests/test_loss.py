import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longalign.loss import sequence_weights, target_counts


def _naive_weights(rows):
    """1 / N_i on each target token but the first of a row, 0 elsewhere."""
    weights = []
    for row in rows:
        targets = [label != -100 for label in row[1:]]
        weights.append([1 / sum(targets) if target else 0.0 for target in targets])
    return weights


rows = st.lists(st.lists(st.sampled_from([-100, 3, 4]), min_size=6, max_size=6), min_size=1, max_size=5)


@given(rows)
@settings(max_examples=50, deadline=None)
def test_padded_weights_equal_the_naive_ones(batch):
    torch.testing.assert_close(sequence_weights(torch.tensor(batch)), torch.tensor(_naive_weights(batch)))


@given(rows)
@settings(max_examples=50, deadline=None)
def test_packed_weights_equal_the_naive_ones(batch):
    documents = [[-100, *row[1:]] for row in batch]  # the collator ignores each document's first label
    labels = torch.tensor(documents).reshape(1, -1)
    seq_idx = torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int32), 6)[None]
    naive = torch.tensor([[0.0, *row] for row in _naive_weights(documents)]).reshape(1, -1)[:, 1:]
    torch.testing.assert_close(sequence_weights(labels, seq_idx), naive)
    assert target_counts(labels, seq_idx).tolist() == [sum(v != -100 for v in row[1:]) for row in documents]


def test_weights_of_a_sequence_sum_to_one():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, -100], [5, -100, -100, 7]])
    assert sequence_weights(labels).sum(1).tolist() == [1.0, 0.0, 1.0]
