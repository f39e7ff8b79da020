"""What the CUDA path does, as far as a CPU can tell: which kernel is called, and what it is handed.

CUDA tensors are fake ones: they have device, dtype, shape and strides, and no numbers. Kernels are recorded.
"""

import inspect
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from batches import ATOL, batch_logits, make_documents, packed_batch, reference_logits
from families import WINDOW, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import GptOssConfig, LlamaConfig, MistralConfig
from transformers.integrations import hub_kernels
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from attention.test_compile import like_a_gpu, new_model  # noqa: F401
from hf_longalign.attention import ATTENTION_NAME, exactness_problem, flex, interface, kernels, register_attention
from hf_longalign.attention.packing import Documents, window_segments


register_attention()

# --- longalign_varlen on fake CUDA tensors ---

BOUNDS = (0, 5, 150, 300)
TOKENS = BOUNDS[-1]
ORDINARY = torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDS)])[None]
SKIPPED = ORDINARY + 90 * (ORDINARY > 60)


class Calls(list):
    """The kernels that were called, as (name, arguments)."""

    def record(self, name, result):
        def kernel(*args, **kwargs):
            self.append((name, args, kwargs))
            return result(*args, **kwargs)

        return kernel

    @property
    def names(self):
        return [name for name, *_ in self]


def fake_flex(query, key, value, *, return_aux=None, **_):
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out if return_aux is None else (out, SimpleNamespace(lse=query.new_empty(query.shape[:-1]).float()))


# torch 2.11 and before: heads are repeated for its variable-length attention.
GROUPED = {"enable_gqa": True} if "enable_gqa" in kernels._FLASH_PARAMETERS else {}
HEADS = (4, 2, 2) if GROUPED else (4, 4, 4)


def listed(counts, blocks, full_counts, full_blocks, **options):
    """The block mask without the transposed tables, whose making asks for the card's driver."""
    return SimpleNamespace(tables=[counts, blocks, full_counts, full_blocks], **options)


@pytest.fixture
def calls(monkeypatch):
    """A machine with an H100, as far as this package asks."""
    calls = Calls()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(kernels, "_runs_triton", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    for module in (flex, kernels):
        monkeypatch.setattr(module, "shared_memory", lambda _: 232_448)
    monkeypatch.setattr(kernels, "varlen_attn", calls.record("flash", kernels.varlen_attn))
    monkeypatch.setattr(flex, "BlockMask", SimpleNamespace(from_kv_blocks=listed))
    monkeypatch.setattr(flex, "_compiled", lambda: calls.record("flex", fake_flex))
    monkeypatch.setattr(F, "scaled_dot_product_attention", calls.record("sdpa", F.scaled_dot_product_attention))
    return calls


class Indexing(TorchFunctionMode):
    """Brackets by operators: those of Python ask for the card's driver even where tensors are fake."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__setitem__, torch.Tensor.copy_):
            return args[0]  # there are no numbers to write
        if func is torch.Tensor.contiguous:
            return torch.ops.aten.clone(args[0], memory_format=torch.contiguous_format)
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        index = list(index) if isinstance(index, tuple) else [index]
        if any(part is Ellipsis for part in index):
            at = next(place for place, part in enumerate(index) if part is Ellipsis)
            given = sum(part is not None for part in index) - 1
            index[at : at + 1] = [slice(None)] * (tensor.ndim - given)
        dim, chosen = 0, {}
        for part in index:
            if part is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(part, int):
                tensor, dim = tensor.select(dim, part), dim - 1
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            else:
                chosen[dim] = part
            dim += 1
        return torch.ops.aten.index(tensor, [chosen.get(d) for d in range(max(chosen) + 1)]) if chosen else tensor


@contextmanager
def on_fake_cuda(monkeypatch, positions):
    """Boundaries and positions are read on the host, where fake tensors have none: they are given."""
    documents = Documents(BOUNDS)
    prepared = {window: window_segments(documents, positions[0], window) for window in (40, 90, 100, 128, 4000)}
    monkeypatch.setattr(interface, "documents_of_boundaries", lambda *_: documents)

    def cut(_, fake, window):
        segments = prepared[window]
        if segments.positions is not None:
            object.__setattr__(segments, "positions", fake)
        return segments

    monkeypatch.setattr(interface, "window_segments", cut)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.device("cuda:0"), Indexing():
        yield


def fake_batch():
    return {
        "input_ids": torch.zeros(1, TOKENS, dtype=torch.long),
        "position_ids": torch.zeros(1, TOKENS, dtype=torch.long),
        "cu_seq_lens_q": torch.zeros(len(BOUNDS), dtype=torch.int32),
        "cu_seq_lens_k": torch.zeros(len(BOUNDS), dtype=torch.int32),
        "use_cache": False,
    }


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def fake_model(config, dtype=torch.bfloat16):
    with torch.device("cpu"):  # random numbers would be asked of the card
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation=ATTENTION_NAME)
    return move(model, dtype).eval()


def move(model, dtype, device="cuda:0"):
    """`Module.to` cannot exchange fake parameters, nor can gradients of a card that is not there be asked for."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(device, dtype if parameter.is_floating_point() else None)
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 72, 80, 96, 112, 128, 160, 192, 224, 256])
def test_flash_is_handed_the_packed_row(width, dtype, calls, monkeypatch):
    with on_fake_cuda(monkeypatch, SKIPPED):
        logits = fake_model(LlamaConfig(**SIZES, head_dim=width), dtype)(**fake_batch()).logits
    assert calls.names == ["flash"]
    (query, key, value, starts, key_starts, longest, key_longest), options = calls[0][1:]
    assert [tensor.shape for tensor in (query, key, value)] == [(TOKENS, heads, width) for heads in HEADS]
    assert {tensor.dtype for tensor in (query, key, value)} == {dtype}
    # The kernel wants the last dimension in one piece, the others as they lie: no copy is made for it.
    assert all(tensor.stride(-1) == 1 and tensor.device.type == "cuda" for tensor in (query, key, value))
    assert starts is key_starts and starts.dtype == torch.int32 and starts.shape == (len(BOUNDS),)
    assert starts.is_contiguous() and starts.device.type == "cuda"
    assert longest == key_longest == 150 and type(longest) is int
    assert options == {"scale": width**-0.5, "window_size": (-1, 0)} | GROUPED
    assert logits.shape == (1, TOKENS, 64) and logits.dtype == dtype


@pytest.mark.parametrize(("width", "value_width"), [(192, 128), (64, 40), (40, 36)])
def test_unequal_widths_are_padded_to_one_and_cut_again(width, value_width, calls, monkeypatch):
    """Multi-head latent attention: DeepSeek's 192 and 128."""
    with on_fake_cuda(monkeypatch, SKIPPED):
        query, key = (torch.zeros(TOKENS, heads, width, dtype=torch.bfloat16) for heads in (4, 2))
        value = torch.zeros(TOKENS, 2, value_width, dtype=torch.bfloat16)
        out = kernels.packed_attention(query, key, value, Documents(BOUNDS).segments, kernels.Scoring(0.1))
    assert calls.names == ["flash"] and out.shape == (TOKENS, 4, value_width)
    assert [tensor.shape for tensor in calls[0][1][:3]] == [(TOKENS, heads, width) for heads in HEADS]


@pytest.mark.parametrize(
    ("positions", "window", "kernel"),
    [
        (ORDINARY, 100, "flash"),  # tokens and positions are the same
        (SKIPPED, 40, "flex"),  # and here they are not
        (SKIPPED, 90, "flash"),  # a skip of a window and more is the end of a document
        (SKIPPED, 4000, "flash"),
    ],
)
def test_windows(positions, window, kernel, calls, monkeypatch):
    if (window, kernel) == (40, "flex"):
        positions = ORDINARY * 2
    with on_fake_cuda(monkeypatch, positions):
        fake_model(MistralConfig(**SIZES, sliding_window=window))(**fake_batch())
    assert calls.names == [kernel]
    if kernel == "flash":
        reached = window == 4000
        assert calls[0][2]["window_size"] == ((-1, 0) if reached or window == 90 else (window - 1, 0))


def gemma2(**sizes):
    return transformers.Gemma2Config(**SIZES, head_dim=64, attn_logit_softcapping=50.0, sliding_window=40, **sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("feature", ["softcap", "sinks", "float32", "window"])
def test_nothing_is_called_document_by_document(feature, dtype, calls, monkeypatch):
    if feature == "float32":
        config, dtype = LlamaConfig(**SIZES, head_dim=8), torch.float32
    elif feature == "window":
        config = MistralConfig(**SIZES, head_dim=64, sliding_window=40)
    elif feature == "sinks":
        dtype = torch.bfloat16  # its experts' grouped product knows no other on a card
        config = GptOssConfig(**SIZES, head_dim=64, num_local_experts=2, num_experts_per_tok=1, sliding_window=40)
    else:
        config = gemma2()
    with on_fake_cuda(monkeypatch, ORDINARY * 2):
        fake_model(config, dtype)(**fake_batch())
    assert calls.names == ["flex"]
    (query, key, value), options = calls[0][1:]
    width = 16 if feature == "float32" else 64
    assert [tensor.shape for tensor in (query, key, value)] == [(1, heads, TOKENS, width) for heads in (4, 2, 2)]
    assert {tensor.dtype for tensor in (query, key, value)} == {dtype}
    mask = options["block_mask"]
    assert options["enable_gqa"] and mask.seq_lengths == (TOKENS, TOKENS)
    assert {(table.device.type, table.dtype) for table in mask.tables} == {("cuda", torch.int32)}
    assert [table.shape for table in mask.tables] == [(1, 1, 3), (1, 1, 3, 3)] * 2
    assert ("return_aux" in options) == (feature == "sinks")


def test_rows_of_one_length_in_float32_are_one_batched_call(calls, monkeypatch):
    with on_fake_cuda(monkeypatch, ORDINARY):
        monkeypatch.setattr(interface, "check_rows_are_single_documents", lambda _: None)
        model = fake_model(LlamaConfig(**SIZES), torch.float32)
        model(torch.zeros(3, 40, dtype=torch.long), use_cache=False)
    assert calls.names == ["sdpa"] and calls[0][1][0].shape == (3, 4, 40, 16)


@pytest.mark.parametrize("why", ["old card", "no CUDA version of torch", "wide heads", "dropout"])
def test_where_flash_cannot_run(why, calls, monkeypatch):
    if why == "old card":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    elif why == "no CUDA version of torch":
        monkeypatch.setattr(torch.version, "cuda", None)
    width, dropout = (264, 0.0) if why == "wide heads" else (64, 0.1 if why == "dropout" else 0.0)
    with on_fake_cuda(monkeypatch, SKIPPED):
        model = fake_model(LlamaConfig(**SIZES, head_dim=width, attention_dropout=dropout))
        model.train()(**fake_batch())
    # No kernel drops weights over documents: they are called one by one.
    assert calls.names == (["sdpa"] * 3 if why == "dropout" else ["flex"])


# --- cards with less shared memory than an H100 ---

SMALL_CARD = 101_376


@pytest.fixture
def loops(calls, monkeypatch):
    """Attention segment by segment, recorded and not computed."""
    monkeypatch.setattr(kernels, "causal_attention", calls.record("loop", lambda query, *_: query))
    kernels._warn_of_the_loop.cache_clear()
    return calls


def attend_on(monkeypatch, memory, width, dtype, **scoring):
    for module in (flex, kernels):
        monkeypatch.setattr(module, "shared_memory", lambda _: memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    with on_fake_cuda(monkeypatch, ORDINARY):
        states = [torch.zeros(TOKENS, heads, width, dtype=dtype) for heads in (4, 2, 2)]
        kernels.packed_attention(*states, Documents(BOUNDS).segments, kernels.Scoring(0.1, **scoring))


@pytest.mark.parametrize("memory", [SMALL_CARD, 166_912, 232_448])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(64, torch.float32), (128, torch.bfloat16), (80, torch.float32), (256, torch.bfloat16), (192, torch.float32),
     (512, torch.bfloat16), (512, torch.float32), (576, torch.bfloat16)],
)  # fmt: skip
def test_flex_is_handed_tiles_that_fit_or_not_called(width, dtype, memory, loops, monkeypatch, caplog):
    attend_on(monkeypatch, memory, width, dtype, softcap=9.0)
    attend_on(monkeypatch, memory, width, dtype, softcap=9.0)
    bytes_of_a_head = dtype.itemsize * 2 ** (width - 1).bit_length()
    if bytes_of_a_head > 1024:
        assert loops.names == ["loop"] * 6 and len(caplog.records) == 1
        assert (
            f"heads {width} wide in {dtype} needs more shared memory than NVIDIA GeForce RTX 4090 has" in caplog.text
        )
        return
    assert loops.names == ["flex"] * 2 and not caplog.records
    given = {name: size for name, size in loops[0][2]["kernel_options"].items() if name != "FORCE_USE_FLEX_ATTENTION"}
    if bytes_of_a_head <= 256 or (memory == 232_448 and bytes_of_a_head <= 512):
        assert not given  # torch's own tiles
        return
    rounded, size = 2 ** (width - 1).bit_length(), dtype.itemsize
    queries, keys = given["fwd_BLOCK_M"], given["fwd_BLOCK_N"]
    # What stays and what is read at once: queries, keys, values and weights; the backward pass adds gradients.
    assert size * (rounded * (queries + 2 * keys) + queries * keys) <= SMALL_CARD
    (tile,) = {given[f"bwd_BLOCK_{name}"] for name in ("M1", "N1", "M2", "N2")}
    assert size * (rounded * 4 * tile + 2 * tile * tile) <= SMALL_CARD
    # Triton multiplies no smaller ones, and the table of blocks must be cut evenly.
    assert all(block >= 16 and flex.BLOCK % block == 0 for block in (queries, keys, tile))
    assert given["fwd_num_stages"] == 1 and given["bwd_num_stages"] <= 2


def test_torch_knows_the_names_of_the_tiles():
    from torch.nn.attention.flex_attention import FlexKernelOptions

    names = {name.removeprefix("fwd_").removeprefix("bwd_") for name in flex.flex_blocks(256, 2, SMALL_CARD)}
    assert names <= set(FlexKernelOptions.__annotations__)


@pytest.mark.parametrize("feature", [{}, {"softcap": 9.0}])
def test_dropout_goes_document_by_document_and_says_so_once(feature, loops, monkeypatch, caplog):
    for _ in range(2):
        with on_fake_cuda(monkeypatch, ORDINARY):
            states = [torch.zeros(TOKENS, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]
            scoring = kernels.Scoring(0.1, dropout=0.25, **feature)
            kernels.packed_attention(*states, Documents(BOUNDS).segments, scoring)
    assert loops.names == ["loop"] * 6 and len(caplog.records) == 1
    assert "document by document" in caplog.text and "`attention_dropout` of 0.25" in caplog.text


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("width", [192, 200, 224, 256])
def test_heads_that_a_small_card_has_no_gradients_for_are_padded(width, capability, calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for training in (True, False):
        with on_fake_cuda(monkeypatch, SKIPPED), torch.set_grad_enabled(training):
            states = [torch.zeros(TOKENS, heads, width, dtype=torch.bfloat16) for heads in (4, 2, 2)]
            out = kernels.packed_attention(*states, Documents(BOUNDS).segments, kernels.Scoring(0.1))
        assert out.shape[-1] == width
    small = capability in ((8, 6), (8, 9)) or capability[0] == 12
    padded = small and width in (200, 224)
    assert [args[0].shape[-1] for _, args, _ in calls] == [256 if padded else width, width]


def test_fresh_cuda_boundaries_are_int32_and_read_once(calls, monkeypatch):
    read = []
    with on_fake_cuda(monkeypatch, SKIPPED):
        monkeypatch.setattr(interface, "documents_of_boundaries", lambda *_: read.append(1) or Documents(BOUNDS))
        fake_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 3}))(**fake_batch())
    assert len(read) == 1
    assert len({id(args[3]) for _, args, _ in calls}) == 1


# --- norms in float32, autocast, adapters, several devices ---


@pytest.fixture
def autocast_on_fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


def test_float32_weights_under_autocast_reach_flash_in_half_precision(calls, autocast_on_fake_cuda, monkeypatch):
    with on_fake_cuda(monkeypatch, SKIPPED):
        model = fake_model(transformers.Qwen3Config(**SIZES, head_dim=64), torch.float32)
        with torch.autocast("cuda", torch.bfloat16):
            model(**fake_batch())
    assert calls.names == ["flash"]
    assert {tensor.dtype for tensor in calls[0][1][:3]} == {torch.bfloat16}


def test_norms_kept_in_float32_reach_flash_in_half_precision(calls, monkeypatch):
    """PEFT keeps them so for 8-bit and 4-bit bases, which say the precision they compute in by their config."""
    for quantised in (False, True):
        with on_fake_cuda(monkeypatch, SKIPPED):
            model = fake_model(transformers.Qwen3Config(**SIZES, head_dim=64))
            for name, module in model.named_modules():
                if name.endswith(("q_norm", "k_norm")):
                    move(module, torch.float32)
            if quantised:
                model.config._is_quantized, model.config.dtype = True, torch.bfloat16
            model(**fake_batch())
    assert calls.names == ["flash"] * 2
    assert {tensor.dtype for _, args, _ in calls for tensor in args[:3]} == {torch.bfloat16}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_float32_queries_of_a_layer_without_linear_maps(weights, calls, monkeypatch):
    """GPT-2's projections are transformers' own `Conv1D`; float32 without autocast is float32 there too."""
    with on_fake_cuda(monkeypatch, SKIPPED):
        model = fake_model(transformers.GPT2Config(n_embd=64, n_head=4, n_layer=1, vocab_size=64), weights)
        layer = model.transformer.h[0].attn
        assert not any(isinstance(module, torch.nn.Linear) for module in layer.modules())
        states = torch.zeros(1, 4, TOKENS, 16)
        starts = torch.zeros(len(BOUNDS), dtype=torch.int32)
        out, _ = interface.longalign_attention(layer, states, states, states, None, cu_seq_lens_q=starts)
    assert out.dtype == weights
    assert calls.names == ["flex" if weights == torch.float32 else "flash"]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointed_adapters_have_the_gradients_of_the_formula(reentrant, like_a_gpu):  # noqa: F811
    documents = make_documents("mixed")
    gradients = {}
    for name in ("eager", ATTENTION_NAME):
        torch.manual_seed(0)
        model = get_peft_model(
            new_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        )
        if name == ATTENTION_NAME and reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if name == "eager":
            model.get_base_model().set_attn_implementation("eager")
        logits = batch_logits(model, documents, packed=name != "eager")
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits.log_softmax(-1) * weights).sum().backward()
        gradients[name] = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert gradients["eager"].keys() == gradients[ATTENTION_NAME].keys()
    for name, expected in gradients["eager"].items():
        torch.testing.assert_close(gradients[ATTENTION_NAME][name], expected, atol=ATOL, rtol=1e-3)


# --- what flash attention is handed by transformers ---


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert dropout_p == 0.0 and alibi_slopes is block_table is None
    return q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    return q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap


def vllm_flash_attn_3(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    return q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap


def flash_attn_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
    seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
):  # fmt: skip
    return q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap


FLASHES = {
    "flash_attention_2": flash_attn_2,
    "flash_attention_3": flash_attn_3,
    "flash_attention_4": flash_attn_4,
    "kernels-community/flash-attn2": flash_attn_2,
    "kernels-community/vllm-flash-attn3": vllm_flash_attn_3,
}


@pytest.fixture
def flash(request, monkeypatch):
    """A kernel with the signature of the real one, computed by the formula; transformers is told that it is there."""
    from transformers import modeling_flash_attention_utils as utils

    name, signature, calls = request.param, FLASHES[request.param], []

    def varlen(*args, **kwargs):
        query, key, value, starts, key_starts, longest, key_longest, scale, causal, window, _ = signature(
            *args, **kwargs
        )
        calls.append((query, key, value, starts, key_starts, longest, key_longest, causal, window))
        width, pieces = None if window[0] in (None, -1) else window[0] + 1, []
        for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            rows = [states[start:stop].transpose(0, 1)[None] for states in (query, key, value)]
            segments = kernels.Scoring(scale)
            pieces.append(kernels.causal_attention(*rows, segments, width)[0].transpose(0, 1))
        return torch.cat(pieces)

    varlen.__signature__ = inspect.signature(signature)
    kernel = SimpleNamespace(flash_attn_func=None, flash_attn_varlen_func=varlen, flash_attn_with_kvcache=None)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: kernel)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    if not name.startswith("kernels"):
        found = (None, varlen, None, utils._pad_input, utils._unpad_input)
        monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: found)
        monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
        matrix = {version: {**entry, "general_availability_check": lambda **_: True}
                  for version, entry in utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()}  # fmt: skip
        monkeypatch.setattr("transformers.modeling_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX", matrix)
    yield name, calls
    utils._loaded_implementation = None


def flash_model(family, name):
    model = type(tiny_model(family))._from_config(tiny_config(family), attn_implementation="eager").eval()
    model.load_state_dict(tiny_model(family).state_dict())
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    return model


def flash_batch(documents):
    batch = packed_batch(documents)
    longest = int(batch["cu_seq_lens_q"].diff().max())
    return batch | {"max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
@pytest.mark.parametrize("flash", FLASHES, indirect=True)
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3", "mistral_window"])
def test_every_flash_attention_is_handed_the_boundaries(family, flash):
    name, calls = flash
    strategy = "none" if family == "mistral_window" else "mixed"
    assert exactness_problem(tiny_config(family), name, packed=True, skipped=strategy != "none") is None
    documents, model = make_documents(strategy), flash_model(family, name)
    batch = flash_batch(documents)
    logits = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(logits, reference_logits(family, documents), atol=ATOL, rtol=0)
    tokens = batch["input_ids"].shape[1]
    for query, key, value, starts, key_starts, longest, key_longest, causal, window in calls:
        assert query.shape[0] == key.shape[0] == tokens and query.shape[2] == key.shape[2] == value.shape[2]
        assert all(states.stride(-1) == 1 for states in (query, key, value))
        assert starts.dtype == key_starts.dtype == torch.int32 and starts.tolist() == batch["cu_seq_lens_q"].tolist()
        assert type(longest) is type(key_longest) is int and longest == batch["max_length_q"]
        assert causal and (window[0] == WINDOW - 1 if family == "mistral_window" else window[0] in (None, -1))
    assert len(calls) == model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("flash", FLASHES, indirect=True)
def test_empty_documents_at_the_end_change_nothing(flash):
    """Boundaries in a few sizes, for compiled models."""
    name, calls = flash
    documents, model = make_documents("mixed"), flash_model("llama", name)
    batch = flash_batch(documents)
    padded = torch.cat([batch["cu_seq_lens_q"], batch["cu_seq_lens_q"][-1:].expand(4)])
    batch |= {"cu_seq_lens_q": padded, "cu_seq_lens_k": padded, "max_length_q": 64, "max_length_k": 64}
    logits = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(logits, reference_logits("llama", documents), atol=ATOL, rtol=0)
    assert calls[0][5] == 64


@torch.no_grad()
@pytest.mark.parametrize("flash", ["flash_attention_2", "kernels-community/vllm-flash-attn3"], indirect=True)
def test_autocast_hands_flash_half_precision(flash):
    name, calls = flash
    with torch.autocast("cpu", torch.bfloat16):
        flash_model("qwen3", name)(**flash_batch(make_documents("mixed")), use_cache=False)
    assert {states.dtype for call in calls for states in call[:3]} == {torch.bfloat16}
