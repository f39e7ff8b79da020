"""One flex attention for windows over skips, softcap, sinks and float32, against the formula written out in full.

On a CPU flex attention runs forward alone, and slowly; gradients and block tables are held against `read_blocks`,
which reads the blocks as the kernels do. A GPU runs the same comparisons compiled, forward and backward.
"""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from attention.test_kernels import (
    DOCUMENTS,
    HEADS,
    POSITIONS,
    WIDTH,
    assert_equal_with_gradients,
    naive,
    naive_visible,
    random_states,
)
from hf_longalign.attention import flex, kernels
from hf_longalign.attention.flex import Scoring, block_mask, first_visible, flex_packed
from hf_longalign.attention.packing import Documents, Segments, documents_of_rows, window_segments


CPU = torch.device("cpu")


def random_row(rng, documents, longest, largest_step=3):
    """Documents of any length whose positions jump, and bounds of them."""
    lengths = rng.integers(1, longest, documents)
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    steps = [rng.integers(1, largest_step + 1, length) for length in lengths]
    return Documents(bounds), torch.from_numpy(np.concatenate([np.cumsum(step) for step in steps]))


def dense(first):
    keys = torch.arange(len(first))
    return (keys <= keys[:, None]) & (keys >= first[:, None])


@pytest.mark.parametrize("window", [None, 1, 2, 6, 9, 41])
def test_the_first_visible_token_is_the_whole_mask(window):
    segments = DOCUMENTS.segments if window is None else window_segments(DOCUMENTS, POSITIONS, window)
    first = first_visible(segments, CPU)
    assert first.dtype == torch.int32
    assert torch.equal(dense(first), naive_visible(DOCUMENTS.bounds, POSITIONS, window))


def test_padding_of_constant_positions_sees_itself():
    documents = Documents((0, 3, 6))
    segments = window_segments(documents, torch.tensor([0, 7, 8, 0, 0, 0]), 2)
    assert first_visible(segments, CPU).tolist() == [0, 1, 1, 3, 3, 3]


def visible_by_blocks(mask):
    """Read the tables as the kernels do: whole blocks unasked, others through the mask, the rest not at all."""
    tokens = mask.seq_lengths[0]
    places = torch.arange(tokens)
    asked = mask.mask_mod(0, 0, places[:, None], places)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for counts, blocks, whole in [
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ]:
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in blocks[0, 0, row, :count].tolist():
                q, k = (slice(index * flex.BLOCK, (index + 1) * flex.BLOCK) for index in (row, column))
                assert not seen[q, k].any(), "no block is listed twice"
                seen[q, k] = True if whole else asked[q, k]
                assert whole or asked[q, k].any(), "no block is visited in vain"
    return seen


def read_blocks(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options, return_aux=None):
    """`flex_attention` by its documentation, with gradients."""
    assert query.shape[-1] >= flex.LEAST_WIDTH and value.shape[-1] >= flex.LEAST_WIDTH
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    scores = scores if score_mod is None else score_mod(scores, 0, 0, 0, 0)
    scores = scores.masked_fill(~visible_by_blocks(block_mask), -torch.inf)
    out = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    if return_aux is None:
        return out
    return out, type("Aux", (), {"lse": scores.logsumexp(-1)})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 3, 150, 700])
def test_blocks_hold_what_is_visible_and_nothing_else(window, seed):
    documents, positions = random_row(np.random.default_rng(seed), documents=3 + seed, longest=400)
    segments = documents.segments if window is None else window_segments(documents, positions, window)
    first = first_visible(segments, CPU)
    mask = block_mask(first)
    assert torch.equal(visible_by_blocks(mask), dense(first))
    # Each key's block knows its queries too: the backward pass reads these.
    visited = mask.to_dense()[0, 0]
    q_counts = mask.q_num_blocks + mask.full_q_num_blocks
    assert torch.equal(visited.sum(0), q_counts[0, 0])


@pytest.mark.parametrize("window", [None, 6, 1])
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks", "narrow values", "wide values"])
def test_flex_equals_the_formula_with_gradients(feature, window, monkeypatch):
    monkeypatch.setattr(flex, "flex_attention", read_blocks)
    width = {"narrow values": 5, "wide values": 21}.get(feature, WIDTH)
    query, key, value, sinks = random_states(26, width)
    softcap, sinks = (1.5 if feature == "softcap" else None), (sinks if feature == "sinks" else None)
    segments = DOCUMENTS.segments if window is None else window_segments(DOCUMENTS, POSITIONS, window)
    actual = flex_packed(query, key, value, segments, Scoring(0.3, softcap=softcap, sinks=sinks))
    expected = naive(query, key, value, naive_visible(DOCUMENTS.bounds, POSITIONS, window), 0.3, softcap, sinks)
    inputs = [query, key, value] if sinks is None else [query, key, value, sinks]
    assert_equal_with_gradients(actual, expected, inputs)


@torch.no_grad()  # flex attention has no backward on CPU
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks"])
def test_torchs_own_flex_attention_gives_the_same(feature, window):
    documents, positions = random_row(np.random.default_rng(0), documents=4, longest=120)
    query, key, value, sinks = (state.detach() for state in random_states(documents.bounds[-1], dtype=torch.float32))
    softcap, sinks = (1.5 if feature == "softcap" else None), (sinks if feature == "sinks" else None)
    segments = documents.segments if window is None else window_segments(documents, positions, window)
    actual = flex_packed(query, key, value, segments, Scoring(0.3, softcap=softcap, sinks=sinks))
    expected = naive(query, key, value, naive_visible(documents.bounds, positions, window), 0.3, softcap, sinks)
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [False, True])
def test_flex_is_not_compiled_again_whatever_the_documents(sinks, monkeypatch):
    """Once for a row of one block (a preflight), once for the first longer one, once for all others."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex.flex_attention, backend=counter)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    rng, counts = np.random.default_rng(0), []
    for step in range(6):
        documents, positions = random_row(rng, documents=2 if step == 0 else 4 + step, longest=60 if step == 0 else 90)
        query, key, value, bias = random_states(documents.bounds[-1], dtype=torch.float32)
        for window in (None, 5):  # Gemma 2 and gpt-oss change from layer to layer
            segments = documents.segments if window is None else window_segments(documents, positions, window)
            scoring = Scoring(0.3, softcap=None if sinks else 2.0, sinks=bias if sinks else None)
            flex_packed(query, key, value, segments, scoring)
        counts.append(counter.frame_count)
    assert counts[2] <= 4 and counts[2:] == [counts[2]] * 4
    torch._dynamo.reset()


def test_the_mask_is_made_once_for_all_layers(monkeypatch):
    made = []
    monkeypatch.setattr(flex, "block_mask", lambda first: made.append(first) or block_mask(first))
    monkeypatch.setattr(flex, "flex_attention", read_blocks)
    states = random_states(26)[:3]
    segments = window_segments(DOCUMENTS, POSITIONS, 6)
    for _ in range(3):
        flex_packed(*states, segments, Scoring(0.3))
    assert len(made) == 1


def test_what_was_made_while_generating_serves_training():
    segments = documents_of_rows(1, 5).segments
    with torch.inference_mode():
        starts = segments.cumulative(CPU)
    assert not starts.is_inference()


def test_memory_of_the_mask_is_that_of_the_blocks():
    tokens = 64 * flex.BLOCK
    segments = Segments((0, tokens), (tokens,))
    mask = block_mask(first_visible(segments, CPU))
    assert mask.kv_indices.numel() == mask.full_kv_indices.numel() == 64**2
    assert mask.full_kv_num_blocks.sum() == 64 * 63 // 2 and mask.kv_num_blocks.sum() == 64


def test_all_versions_are_compiled(monkeypatch):
    """As many as a process meets that trains and evaluates several models; torch alone keeps eight."""
    real, graphs = torch.compile, []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attention(states, scale):
        return states * 2 if scale == 0 else states + scale

    monkeypatch.setattr(flex, "flex_attention", attention)
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=counting, dynamic=False))
    flex._compiled.cache_clear()
    try:
        attend = flex._compiled()
        for scale in range(20):
            attend(torch.ones(4), scale=scale)
    finally:
        flex._compiled.cache_clear()
        torch._dynamo.reset()
    assert len(graphs) == 20


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [8, 64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("feature", ["window", "softcap", "sinks"])
def test_cuda_flex_equals_the_formula_with_gradients(feature, width, dtype):
    torch._dynamo.reset()  # each case is compiled anew, and only so many versions are kept
    documents, positions = random_row(np.random.default_rng(0), documents=5, longest=200)
    tokens = documents.bounds[-1]
    states = [torch.randn(tokens, heads, width).to(dtype) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    if feature == "sinks":
        states.append(torch.randn(HEADS).to(dtype))
    softcap = 1.5 if feature == "softcap" else None
    rounded = [state.double().requires_grad_() for state in states]
    visible = naive_visible(documents.bounds, positions, 50)
    expected = naive(*rounded[:3], visible, 0.1, softcap, *rounded[3:])
    device = [state.cuda().requires_grad_() for state in states]
    segments = window_segments(documents, positions.cuda(), 50)
    scoring = kernels.Scoring(0.1, softcap=softcap, sinks=device[3] if feature == "sinks" else None)
    fits = flex.flex_blocks(width, dtype.itemsize, flex.shared_memory(device[0].device)) is not None
    assert kernels._flex_serves(device[0], device[2], segments, scoring) == fits
    actual = kernels.packed_attention(*device[:3], segments, scoring)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((actual.double() * weights.cuda()).sum(), device)
    theirs = torch.autograd.grad((expected * weights).sum(), rounded)
    for one, other in zip(ours, theirs, strict=True):
        # Sinks add up over all tokens, and so does their rounding: it is measured by the largest of them.
        allowed = 5 * tolerance * max(1.0, other.abs().max().item() if other.ndim == 1 else 1.0)
        torch.testing.assert_close(one.double().cpu(), other, atol=allowed, rtol=5 * tolerance)
