"""The "longalign_varlen" attention: exact over packed and padded batches with skipped positions, without flash-attn.

A document whose positions skip means the long sequence in which every skipped position holds a masked token. Rotary
embeddings see to that in layers of full attention; layers with a sliding window must count the window in positions,
which kernels that count tokens do not. Document boundaries come from `cu_seq_lens_q` (one packed row), from the 2-D
`attention_mask` (padded rows), or are the rows themselves; never from positions.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from hf_longalign.attention import register_attention
>>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
>>> model = LlamaForCausalLM._from_config(config, attn_implementation=register_attention()).eval()
>>> ids, positions = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[0, 70, 0, 1, 90]])
>>> starts = torch.tensor([0, 2, 5], dtype=torch.int32)
>>> packed = model(ids, position_ids=positions, cu_seq_lens_q=starts, cu_seq_lens_k=starts).logits
>>> alone = model(ids[:, 2:], position_ids=positions[:, 2:]).logits
>>> torch.allclose(packed[:, 2:], alone, atol=1e-6)
True
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import causal_mask_function

from hf_longalign.attention.flex import Scoring
from hf_longalign.attention.kernels import cached_attention, flash_attention, flash_serves, packed_attention
from hf_longalign.attention.packing import (
    Documents,
    Segments,
    check_rows_are_single_documents,
    documents_of_boundaries,
    documents_of_mask,
    documents_of_rows,
    remembered,
    window_segments,
)
from hf_longalign.attention.support import ATTENTION_NAME, SUPPORTED_LAYERS


# The parts of transformers' mask functions that say "causal", "window" or "packed"; this attention does those itself.
_CAUSAL_PARTS = {
    "and_masks",
    "causal_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "sliding_window_overlay",
}
_REFUSED_ARGUMENTS = {
    "position_bias": "a position bias added to the scores",
    "cache": "a paged cache",
    "output_attentions": "returning attention weights",
    "indices": "sparse attention by an indexer",
    "block_indices": "sparse attention by an indexer",
    "sinks": "sinks that differ from query to query",
}


def register_attention() -> str:
    """Make `attn_implementation="longalign_varlen"` known to transformers, and return that name.

    Call it before the model is built or loaded; calling it again changes nothing.

    >>> register_attention()
    'longalign_varlen'
    """
    AttentionInterface.register(ATTENTION_NAME, longalign_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, longalign_mask)
    return ATTENTION_NAME


def mark_boundaries(batch: dict[str, Any]) -> None:
    """Tell `torch.compile` that the number of documents differs from batch to batch, before it has seen two.

    Args:
        batch: as it is handed to the compiled model; `cu_seq_lens_q` and `cu_seq_lens_k` are marked if it holds them.

    >>> mark_boundaries({"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)})
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if batch.get(name) is not None:
            torch._dynamo.maybe_mark_dynamic(batch[name], 0)


def longalign_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each document: the function transformers calls in every attention layer.

    Args:
        module: the attention layer, for its `config`, `layer_idx` and `is_causal`.
        query: (batch, heads, length, width).
        key: (batch, key heads, keys, width); more keys than queries come from a cache.
        value: (batch, key heads, keys, value width).
        attention_mask: bool (batch, keys) or (batch, 1, 1, keys), false on padding; None without padding.
        dropout: probability of dropping a weight.
        scaling: factor on query-key products; None for 1 / sqrt(width).
        softcap: bound of the scores (Gemma 2).
        s_aux: (heads,) sink logits (gpt-oss).
        is_causal: must not be False.
        position_ids: (batch or 1, length); needed by layers with a sliding window.
        cu_seq_lens_q: int32 (documents + 1,), where documents begin in the one packed row, and its end.
        cu_seq_lens_k: the same for keys; must equal `cu_seq_lens_q`.
        kwargs: `sliding_window`, the positions a query sees, itself included; whatever else the model passes.

    Returns:
        (batch, length, heads, value width), and None in place of weights.

    Raises:
        ValueError: boundaries are missing or contradict the mask, or the layer asks for what would not be exact.
    """
    if "sliding_window" in kwargs:
        window = kwargs["sliding_window"]
    else:  # a few models (Qwen2-MoE, PhiMoE) write it into their mask alone and do not pass it
        window = getattr(module.config, "sliding_window", None)
        if window is not None and _layer_kind(module) not in (None, "sliding_attention"):
            window = None
    _refuse_unsupported(module, attention_mask, is_causal, softcap, s_aux, kwargs)
    # Norms kept in float32 (PEFT, quantised models) leave queries and keys in it, and no flash kernel takes them.
    mixed = query.is_cuda and query.dtype == torch.float32
    dtype = _precision(query, module) if mixed else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, softcap, s_aux)
    longest: Any = kwargs.get("max_length_q")
    one_row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if (
        torch.compiler.is_compiling()
        and one_row
        and attention_mask is None
        and window is None
        and cu_seq_lens_q is not None
        and longest is not None
        and not isinstance(longest, torch.Tensor)
        and flash_serves(query, value, scoring)
    ):
        # Part of the compiled graph. Nothing is read on the host here, so boundaries are taken as they come.
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return flash_attention(q, k, v, cu_seq_lens_q, longest, scoring.scale)[None], None
    out = _attend(query, key, value, attention_mask, scoring, window, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    return out, None


def _precision(query: torch.Tensor, module: torch.nn.Module) -> torch.dtype:
    """The precision that a layer computes in whose queries came in float32: autocast's, or that of its weights."""
    known = torch.is_autocast_enabled(query.device.type) or hasattr(module.config, "_is_quantized")
    if known or any(isinstance(layer, torch.nn.Linear) for layer in module.modules()):
        return get_target_dtype(query, module)
    # It would look for a linear layer and raise a bare StopIteration: GPT-2's projections are another class.
    return next((weight.dtype for weight in module.parameters() if weight.ndim > 1), query.dtype)


@torch.compiler.disable
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scoring: Scoring,
    window: int | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
) -> torch.Tensor:
    """Attend outside compiled graphs: how documents lie is read on the host, and decides what is called."""
    batch, _, length, _ = query.shape
    if attention_mask is not None:
        # A static cache holds room for tokens to come; the mask ends where they begin.
        key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
    if key.shape[2] != length:
        if cu_seq_lens_q is not None:
            raise ValueError("`cu_seq_lens_q` cannot be used with a filled cache. Generate from padded rows instead.")
        padding = None if attention_mask is None else attention_mask.flatten(1)
        return cached_attention(query, key, value, scoring, window, padding).transpose(1, 2).contiguous()
    documents = _documents(batch, length, attention_mask, cu_seq_lens_q, cu_seq_lens_k, position_ids)
    segments = _segments(documents, batch, position_ids, window)
    row = packed_attention(documents.pack(query), documents.pack(key), documents.pack(value), segments, scoring)
    return documents.unpack(row, batch, length).contiguous()


def longalign_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Hand on the padding mask, or None when nothing is padded: the mask transformers builds for this attention.

    Args:
        batch_size: rows.
        q_length: tokens of this forward.
        kv_length: keys, those of a cache included.
        q_offset: tokens seen before this forward.
        kv_offset: tokens that a sliding cache has dropped.
        mask_function: transformers' description of who sees whom; must be causal, at most with a window.
        attention_mask: bool (batch, tokens so far), or None.
        device: where to put a mask made here.
        kwargs: what other attentions need.

    Returns:
        bool (batch, 1, 1, at most kv_length), or None.

    Raises:
        ValueError: `mask_function` holds more than causality, a window and document boundaries.
    """
    if torch.compiler.is_compiling():
        # Closures cannot be read there, and trying to ends the graph. What a model brings of its own has `use_vmap`;
        # other kinds of layers are refused by the attention.
        name = getattr(mask_function, "__name__", "a mask without a name")
        foreign = None if name in ("causal_mask_function", "and_mask") and not kwargs.get("use_vmap") else name
    else:
        foreign = next(_foreign_parts(mask_function), None)
    if foreign is not None:
        raise ValueError(
            f'`attn_implementation` "{ATTENTION_NAME}" is causal attention with or without a sliding window, got a '
            f"mask by `{foreign}` ({_KNOWN_PATTERNS.get(foreign, 'a pattern of its own')}). "
            'Set attn_implementation="sdpa" and train padded, with skip strategy "none".'
        )
    if attention_mask is None:
        seen = int(q_offset) + q_length - kv_offset
        # Only a static cache has keys that no token has filled yet; the mask says where they begin.
        shape = (batch_size, 1, 1, seen)
        return torch.ones(shape, dtype=torch.bool, device=device) if seen < kv_length else None
    attention_mask = attention_mask[:, -kv_length:]
    if attention_mask.shape[1] == kv_length and attention_mask.all():
        return None
    # Four dimensions, the usual (batch, heads, queries, keys): some models (Gemma 4) slice the queries of their mask.
    return attention_mask[:, None, None]


_KNOWN_PATTERNS = {
    "chunked_overlay": "chunked attention, as in Llama 4",
    "bidirectional_mask_function": "bidirectional attention",
    "sliding_window_bidirectional_overlay": "bidirectional attention",
    "blockwise_overlay": "bidirectional attention within images",
    "or_masks": "tokens that see more than causality allows",
}


def _foreign_parts(mask_function: Callable) -> Iterator[str]:
    """Names of the parts of a mask function that this attention does not know; they are nested in closures."""
    name = mask_function.__qualname__.split(".")[0]
    if mask_function.__module__ != "transformers.masking_utils" or name not in _CAUSAL_PARTS:
        yield name
    for cell in mask_function.__closure__ or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, tuple) else (inner,):
            if callable(part):
                yield from _foreign_parts(part)


def _layer_kind(module: torch.nn.Module) -> str | None:
    """Look up the layer by its index. A graph that has done so serves this layer alone: ask only where it matters."""
    kinds = getattr(module.config, "layer_types", None)
    return None if kinds is None or getattr(module, "layer_idx", None) is None else kinds[module.layer_idx]


def _refuse_unsupported(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    is_causal: bool | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    given = {name for name, argument in kwargs.items() if argument is not None and argument is not False}
    reason = next((what for name, what in _REFUSED_ARGUMENTS.items() if name in given), None)
    kinds = getattr(module.config, "layer_types", None) or ()
    if not SUPPORTED_LAYERS.issuperset(kinds) and _layer_kind(module) not in SUPPORTED_LAYERS:
        reason = f"{_layer_kind(module)} layers"
    if is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        reason = "attention that is not causal"
    if mask is not None and mask.ndim != 2 and mask.shape[1:3] != (1, 1):
        reason = f"an attention mask of shape {tuple(mask.shape)}, which holds more than padding"
    if softcap is not None and sinks is not None:
        reason = "softcap and attention sinks in one layer"
    if reason is not None:
        raise ValueError(
            f'`attn_implementation` "{ATTENTION_NAME}" does not support {reason}, asked for by '
            f'{type(module).__name__}. Set attn_implementation="eager" for this model, or for this part of it by a '
            'dict such as {"text_config": "longalign_varlen", "vision_config": "sdpa"}.'
        )


def _documents(
    batch: int,
    length: int,
    mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> Documents:
    if starts is not None:
        if mask is not None:
            raise ValueError(
                "`attention_mask` with padding and `cu_seq_lens_q` must not both be given: each says where documents "
                "end. Pass no `attention_mask` for a packed row; its padding is a document of its own."
            )
        if batch != 1:
            raise ValueError(f"`cu_seq_lens_q` needs one packed row, got a batch of {batch}. Flatten it to one row.")
        return remembered(starts, length, lambda: documents_of_boundaries(starts, key_starts, length))
    if mask is not None:
        return remembered(mask, "documents", lambda: documents_of_mask(mask))
    if positions is not None and positions.ndim == 2:
        remembered(positions, "single", lambda: check_rows_are_single_documents(positions))
    return documents_of_rows(batch, length)


def _segments(documents: Documents, batch: int, positions: torch.Tensor | None, window: int | None) -> Segments:
    if window is None:
        return documents.segments
    if positions is None or positions.ndim != 2:
        raise ValueError(
            "`position_ids` of shape (batch, length) must reach layers with a sliding window, got "
            f"{None if positions is None else tuple(positions.shape)}. This model does not hand them on; set "
            'attn_implementation="eager" and skip strategy "none" for it.'
        )

    def cut() -> Segments:
        flat = positions.expand(batch, -1).flatten()
        return window_segments(documents, flat if documents.indices is None else flat[documents.indices], window)

    return remembered(positions, (window, documents), cut)
