"""Compiled models: the same losses, and nothing compiled again after the third step, whatever the documents.

On a GPU packed FlashAttention is part of the compiled graph. A CPU has no such kernel; an operator with its signature
stands in for it, and the graphs are those of a GPU.
"""

import numpy as np
import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from batches import make_documents, packed_batch
from families import FAMILIES, tiny_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers.masking_utils import create_causal_mask

from hf_longalign import SkipPositionDataCollator
from hf_longalign.attention import ATTENTION_NAME, interface, kernels, mark_boundaries, register_attention


register_attention()


def run_varlen(query, key, value, starts, scale):
    """Causal attention document by document; empty documents are nothing."""
    lengths = starts.diff().tolist()
    pieces = []
    for q, k, v in zip(*(states.split(lengths) for states in (query, key, value)), strict=True):
        rows = (states.transpose(0, 1)[None] for states in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


@torch.library.custom_op("longalign_test::varlen", mutates_args=())
def varlen_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    assert starts.dtype == torch.int32 and longest >= int(starts.diff().max())
    return run_varlen(query, key, value, starts, scale)


@torch.library.custom_op("longalign_test::varlen_backward", mutates_args=())
def varlen_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float
) -> list[torch.Tensor]:
    gradients = [[], [], []]
    lengths = starts.diff().tolist()
    for g, q, k, v in zip(*(states.split(lengths) for states in (grad, query, key, value)), strict=True):
        groups = q.shape[1] // k.shape[1]
        keys, values = (states.repeat_interleave(groups, 1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
        weights = scores.masked_fill(~torch.ones(scores.shape[1:]).bool().tril(), -torch.inf).softmax(-1)
        ahead = torch.einsum("qhd,khd->hqk", g, values)
        slope = weights * (ahead - (ahead * weights).sum(-1, keepdim=True)) * scale
        gradients[0].append(torch.einsum("hqk,khd->qhd", slope, keys))
        gradients[1].append(torch.einsum("hqk,qhd->khd", slope, q).unflatten(1, (-1, groups)).sum(2))
        gradients[2].append(torch.einsum("hqk,qhd->khd", weights, g).unflatten(1, (-1, groups)).sum(2))
    return [torch.cat(pieces) for pieces in gradients]


varlen_op.register_fake(lambda query, key, value, starts, longest, scale: torch.empty_like(query))
varlen_backward.register_fake(lambda grad, *states: [torch.empty_like(tensor) for tensor in states[:3]])


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[5]


varlen_op.register_autograd(
    lambda ctx, grad: (*varlen_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None), setup_context=keep
)


def varlen_attn(query, key, value, starts, _, longest, __, *, scale, window_size, enable_gqa):
    assert window_size == (-1, 0) and enable_gqa
    return varlen_op(query, key, value, starts, longest, scale)


@pytest.fixture
def like_a_gpu(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(kernels, "_FLASH_PARAMETERS", kernels._FLASH_PARAMETERS | {"enable_gqa"})
    monkeypatch.setattr(kernels, "varlen_attn", varlen_attn)
    for module in (kernels, interface):
        monkeypatch.setattr(module, "flash_serves", lambda query, value, scoring: scoring.softcap is None)
    yield
    torch._dynamo.reset()


def attention_breaks():
    """Where graphs end because attention is not part of them."""
    return [reason for reason in counters["graph_break"] if "longalign" in reason or "_attend" in reason]


def new_model(family):
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")
    return model_class._from_config(tiny_config(family), attn_implementation=ATTENTION_NAME).train()


def batches(steps, few_shapes, multiple=None):
    """Packed rows of one to forty documents with skipped positions."""
    rng = np.random.default_rng(0)
    collator = SkipPositionDataCollator(
        0, 512, skip_probability=1.0, padding_free=True, few_shapes=few_shapes, pad_to_multiple_of=multiple
    )
    for step in range(steps):
        rows = []
        for _ in range([3, 1, 7, 20, 2, 40][step % 6]):
            ids = rng.integers(3, 32, int(rng.integers(4, 30))).tolist()
            rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:]})
        yield collator(rows)


def train(model, step_model, steps=6, compiled=None, **options):
    """Losses, and how many graphs there were after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, graphs = [], []
    for batch in batches(steps, **options):
        if compiled:
            mark_boundaries(batch)
        loss = step_model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(compiled.frame_count if compiled else 0)
    return losses, graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_flash_is_part_of_one_graph_that_is_compiled_once(backend, like_a_gpu):
    model, twin = new_model("llama"), new_model("llama")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    options = {"few_shapes": True, "multiple": 1024}
    losses, graphs = train(model, compiled, compiled=counter, **options)
    assert graphs[2:] == [graphs[2]] * 4
    expected, _ = train(twin, twin, few_shapes=False)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "olmo3"])
def test_layers_are_compiled_once_per_kind_however_many_there_are(family):
    """As `accelerate launch --dynamo_use_regional_compilation` has it.

    With a graph for each layer those past the eighth, dynamo's limit, would run uncompiled.
    """
    graphs = {}
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        config = tiny_config(family)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * layers)[:layers]
        model_class = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")
        model = model_class._from_config(config, attn_implementation=ATTENTION_NAME).train()
        called = compile_regions(model, backend="aot_eager")
        train(model, called, steps=2, few_shapes=True, multiple=1024)
        graphs[layers] = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs[4] == graphs[2] > 0


@pytest.mark.parametrize("given", [{"or_mask_function": lambda b, h, q, k: q >= 0}, {"block_sequence_ids": "ids"}])
def test_a_compiled_model_is_refused_a_mask_that_is_not_causal_too(given):
    config = tiny_config("llama")
    config._attn_implementation = ATTENTION_NAME
    states, ids = torch.zeros(1, 8, config.hidden_size), torch.zeros(1, 8, dtype=torch.long)
    given = {name: ids if value == "ids" else value for name, value in given.items()}
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def mask(states):
        return create_causal_mask(config, states, None, None, position_ids=torch.arange(8)[None], **given)

    with pytest.raises(ValueError, match="is causal attention with or without a sliding window, got a mask by"):
        mask(states)
    torch._dynamo.reset()


def test_rows_of_any_length_are_compiled_a_few_times_at_first(like_a_gpu):
    model, twin = new_model("llama"), new_model("llama")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    losses, graphs = train(model, compiled, compiled=counter, few_shapes=True)
    assert graphs[2:] == [graphs[2]] * 4 and not attention_breaks()
    torch.testing.assert_close(losses, train(twin, twin, few_shapes=False)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_attention_outside_the_graph_is_not_compiled_again_either(family):
    """On a CPU, and on a GPU where windows, softcap or sinks ask for flex attention."""
    torch._dynamo.reset()
    model, twin = new_model(family), new_model(family)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    losses, graphs = train(model, compiled, compiled=counter, few_shapes=True, multiple=1024)
    assert graphs[2:] == [graphs[2]] * 4
    torch.testing.assert_close(losses, train(twin, twin, few_shapes=False)[0], atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_uneven_boundaries_of_a_compiled_model_reach_the_kernel_as_they_are(like_a_gpu):
    model = new_model("llama").eval()
    batch = packed_batch(make_documents("mixed"))
    longest = int(batch["cu_seq_lens_q"].diff().max())
    batch |= {"max_length_q": longest, "max_length_k": longest}
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        actual = torch.compile(model, backend="eager")(**batch, use_cache=False).logits
        assert not attention_breaks()
        torch.testing.assert_close(actual, expected)
        padded = torch.cat([batch["cu_seq_lens_q"], batch["cu_seq_lens_q"][-1:].expand(5)])
        batch |= {"cu_seq_lens_q": padded, "cu_seq_lens_k": padded}
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected)
