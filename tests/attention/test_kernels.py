"""The arithmetic of attention against the formula written out in full, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longalign.attention import kernels
from hf_longalign.attention.flex import Scoring
from hf_longalign.attention.kernels import cached_attention, packed_attention
from hf_longalign.attention.packing import Documents, documents_of_rows, window_segments


HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# Jumps of less than a window of 6, of just a window, and of more.
POSITIONS = torch.tensor([0, 1, 4, 5, 9, *range(15, 27), 28, 40, 0, 1, 2, 3, 9, 0, 0])
DOCUMENTS = Documents((0, 19, 24, 26))


def naive(query, key, value, visible, scale, softcap=None, sinks=None):
    """Attention of (tokens, heads, width) under a full (tokens, tokens) mask, head by head."""
    out = []
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        scores = query[:, head] @ key[:, group].T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].expand(len(scores), 1)], dim=1)
        out.append(scores.softmax(-1)[:, : len(key)] @ value[:, group])
    return torch.stack(out, dim=1)


def naive_visible(bounds, positions, window):
    """Who sees whom, pair by pair."""
    tokens = bounds[-1]
    document = [sum(bound <= token for bound in bounds[1:]) for token in range(tokens)]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        for k in range(q + 1):
            near = window is None or positions[q] - positions[k] < window
            visible[q, k] = bool(document[q] == document[k] and near)
    return visible


def random_states(tokens, value_width=WIDTH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, HEADS, WIDTH), (tokens, KEY_HEADS, WIDTH), (tokens, KEY_HEADS, value_width), (HEADS,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def assert_equal_with_gradients(actual, expected, inputs):
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((actual * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("window", [None, 6, 1])
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks", "narrow values", "wide values"])
def test_packed_attention_equals_the_formula(feature, window, block, monkeypatch):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", block)
    width = {"narrow values": 5, "wide values": 11}.get(feature, WIDTH)
    query, key, value, sinks = random_states(26, width)
    inputs = [query, key, value]
    softcap = 1.5 if feature == "softcap" else None
    if feature == "sinks":
        inputs.append(sinks)
    else:
        sinks = None
    segments = DOCUMENTS.segments if window is None else window_segments(DOCUMENTS, POSITIONS, window)
    actual = packed_attention(query, key, value, segments, Scoring(0.3, softcap=softcap, sinks=sinks))
    expected = naive(query, key, value, naive_visible(DOCUMENTS.bounds, POSITIONS, window), 0.3, softcap, sinks)
    assert_equal_with_gradients(actual, expected, inputs)


def test_documents_of_one_length_are_one_batch(monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or kernel(*a, **k))
    query, key, value, _ = random_states(12)
    documents = Documents((0, 4, 8, 12))
    out = packed_attention(query, key, value, documents.segments, Scoring(0.3))
    assert calls == [(3, HEADS, 4, WIDTH)]
    expected = naive(query, key, value, naive_visible(documents.bounds, None, None), 0.3)
    assert_equal_with_gradients(out, expected, [query, key, value])


def fake_varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=None):
    """torch's variable-length attention as its documentation says it: windows count tokens."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.shape[-1] % 8 == 0 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert cu_q.dtype == torch.int32 and cu_q is cu_k and max_q == max_k == int(cu_q.diff().max())
    left, right = window_size
    assert right == 0
    window = None if left == -1 else left + 1
    visible = naive_visible(cu_q.tolist(), torch.arange(len(query)), window)
    return naive(query, key, value, visible, scale)


@pytest.mark.parametrize("width", [5, WIDTH, 11])
@pytest.mark.parametrize("window", [None, 6, 50])
def test_flash_is_called_so_that_it_gives_the_same(window, width, monkeypatch):
    monkeypatch.setattr(kernels, "varlen_attn", fake_varlen_attn)
    positions = torch.tensor([*range(16), 90, 91, 95, 0, 1, 2, 3, 9, 0, 0])
    query, key, value, _ = random_states(26, width)
    segments = DOCUMENTS.segments if window is None else window_segments(DOCUMENTS, positions, window)
    assert segments.positions is None
    monkeypatch.setattr(kernels, "flash_serves", lambda *_: True)
    actual = packed_attention(query, key, value, segments, Scoring(0.3))
    expected = naive(query, key, value, naive_visible(DOCUMENTS.bounds, positions, window), 0.3)
    torch.testing.assert_close(actual, expected)
    assert actual.shape[-1] == width


class Paddings(TorchDispatchMode):
    """Counts the copies that padding makes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "pad" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["documents", "one length", "window", "softcap", "cache", "flash"])
def test_nothing_is_copied_where_nothing_is_padded(path, monkeypatch):
    monkeypatch.setattr(kernels, "varlen_attn", fake_varlen_attn)
    query, key, value, _ = (state.detach() for state in random_states(26))
    scoring = Scoring(0.3, softcap=2.0 if path == "softcap" else None)
    segments = Documents((0, 13, 26)).segments if path == "one length" else DOCUMENTS.segments
    if path == "window":
        segments = window_segments(DOCUMENTS, POSITIONS, 6)

    def attend(value):
        if path == "cache":
            rows = [states.transpose(0, 1)[None] for states in (query, key, value)]
            return cached_attention(rows[0][:, :, -1:], rows[1], rows[2], scoring)
        return packed_attention(query, key, value, segments, scoring)

    monkeypatch.setattr(kernels, "flash_serves", lambda *_: path == "flash")

    with Paddings() as paddings:
        attend(value)
    assert paddings.count == 0
    with Paddings() as paddings:
        attend(value[..., :5])
    assert (paddings.count > 0) == (path != "softcap")  # the formula takes values of any width


def test_flash_does_not_serve_where_tokens_and_positions_differ():
    assert torch.equal(window_segments(DOCUMENTS, POSITIONS, 6).positions, POSITIONS)
    assert window_segments(DOCUMENTS, POSITIONS, 41).positions is None


def test_softcap_keeps_no_scores_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SCORES", HEADS * 64 * 16)
    kept = []
    states = [state.detach().float().requires_grad_() for state in random_states(64)[:3]]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        packed_attention(*states, documents_of_rows(1, 64).segments, Scoring(0.3, softcap=2.0))
    assert max(kept) <= 64 * HEADS * WIDTH


def test_window_needs_memory_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 16)
    masks = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: masks.append(a[3]) or kernel(*a, **k))
    segments = window_segments(documents_of_rows(1, 128), torch.arange(128) * 2, 8)
    packed_attention(*random_states(128)[:3], segments, Scoring(0.3))
    assert len(masks) == 8 and all(mask.shape[0] == 16 and mask.shape[1] <= 16 + 7 for mask in masks)


def test_padding_queries_do_not_become_nan():
    query, key = torch.randn(1, HEADS, 2, WIDTH), torch.randn(1, KEY_HEADS, 5, WIDTH)
    padding = torch.tensor([[True, False, False, False, False]])
    for softcap in (None, 2.0):
        out = cached_attention(query, key, key, Scoring(0.3, softcap=softcap), window=2, padding=padding)
        assert out.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_drops_weights_and_keeps_the_mean(softcap):
    tokens = 40
    query, key = torch.zeros(tokens, HEADS, WIDTH), torch.randn(tokens, KEY_HEADS, WIDTH)
    value = torch.ones(tokens, KEY_HEADS, 1)
    torch.manual_seed(0)
    scoring = Scoring(0.3, dropout=0.5, softcap=softcap)
    segments = Documents((0, 10, tokens)).segments
    sums = torch.stack([packed_attention(query, key, value, segments, scoring) for _ in range(200)])
    assert sums.std() > 0.1
    # The first token has one key: its weight is 0 or 2.
    assert set(sums[:, 0].unique().tolist()) == {0.0, 2.0}
    assert abs(sums.mean() - 1) < 0.02


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 6, 50])
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks", "narrow values"])
def test_cuda_equals_the_formula(feature, window, dtype):
    torch._dynamo.reset()  # each case is compiled anew, and only so many versions are kept
    width = 5 if feature == "narrow values" else WIDTH
    states = [state.detach() for state in random_states(26, width, torch.float32)]
    softcap = 1.5 if feature == "softcap" else None
    rounded = [state.to(dtype).float().requires_grad_() for state in states[: 4 if feature == "sinks" else 3]]
    visible = naive_visible(DOCUMENTS.bounds, POSITIONS, window)
    expected = naive(*rounded[:3], visible, 0.3, softcap, *rounded[3:])
    device = [state.detach().to("cuda", dtype).requires_grad_() for state in rounded]
    positions = POSITIONS.cuda()
    segments = DOCUMENTS.segments if window is None else window_segments(DOCUMENTS, positions, window)
    scoring = Scoring(0.3, softcap=softcap, sinks=device[3] if feature == "sinks" else None)
    flash = segments.positions is None and kernels.flash_serves(device[0], device[2], scoring)
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert flash == (feature in ("plain", "narrow values") and dtype != torch.float32 and window != 6 and capable)
    actual = packed_attention(*device[:3], segments, scoring)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((actual.float() * weights.cuda()).sum(), device)
    theirs = torch.autograd.grad((expected * weights).sum(), rounded)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float().cpu(), other, atol=5 * tolerance, rtol=5 * tolerance)
