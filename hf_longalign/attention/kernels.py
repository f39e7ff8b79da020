"""Exact causal attention over a packed row, by the fastest kernel that gives it.

| what | how |
| --- | --- |
| CUDA, half precision, nothing unusual | torch's variable-length FlashAttention over the whole row |
| CUDA, windows over skips, softcap, sinks, float32, heads wider than 256 | one `flex_attention` (`flex.py`) |
| CUDA where that does not fit into shared memory (float32 past 256, half past 512), dropout | as elsewhere, warned |
| elsewhere | scaled_dot_product_attention, segment by segment (one batched call when all are of one length) |
| a window that counts positions | the same over blocks of queries, each with the keys its window can reach |
| attention sinks | one more key of value zero, so the kernels above serve |
| softcap | the formula itself over blocks of queries, recomputed in the backward pass |

Memory is linear in the length everywhere. Tensors are (tokens, heads, width) for a packed row and (batch, heads,
length, width) otherwise; keys and values may have fewer heads than queries, values another width.
"""

import inspect
import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from hf_longalign.attention.flex import Scoring, flex_blocks, flex_packed, shared_memory, widened
from hf_longalign.attention.packing import Segments


logger = logging.getLogger(__name__)

QUERY_BLOCK = 1024
# Scores held at once by the softcap formula: 2**26 float32 values are 256 MB.
MAX_SCORES = 2**26
FLASH_MAX_WIDTH = 256


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scoring: Scoring
) -> torch.Tensor:
    """Attend within each segment of a packed row.

    Args:
        query: (tokens, heads, width).
        key: (tokens, key heads, width).
        value: (tokens, key heads, value width).
        segments: the stretches to keep apart, with their window.
        scoring: how scores become weights.

    Returns:
        (tokens, heads, value width).
    """
    if segments.positions is None and flash_serves(query, value, scoring):
        starts, window = segments.cumulative(query.device), None if all(segments.plain) else segments.window
        return flash_attention(query, key, value, starts, max(segments.lengths), scoring.scale, window)
    if _flex_serves(query, value, segments, scoring):
        return flex_packed(query, key, value, segments, scoring)
    if segments.uniform:
        rows = [states.unflatten(0, (len(segments.lengths), -1)).transpose(1, 2) for states in (query, key, value)]
        return causal_attention(rows[0], rows[1], rows[2], scoring).transpose(1, 2).flatten(0, 1)
    pieces = []
    # Not by slices: the backward of each would write a gradient of the whole row.
    split = zip(*(states.split(segments.lengths) for states in (query, key, value)), strict=True)
    for i, (q, k, v) in enumerate(split):
        window, places = (None, None) if segments.plain[i] else (segments.window, segments.places(i))
        pieces.append(causal_attention(_row(q), _row(k), _row(v), scoring, window, places)[0].transpose(0, 1))
    return torch.cat(pieces)


def _row(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(0, 1)[None]


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    window: int | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally within each row, as many queries as keys.

    Args:
        query: (batch, heads, length, width); key and value accordingly.
        scoring: how scores become weights.
        window: a query at position p sees the keys at p - window + 1 … p; None for all before it.
        positions: (length,), strictly rising; None for 0, 1, 2 …

    Returns:
        (batch, heads, length, value width).
    """
    if window is None and scoring.softcap is None:
        return _kernel(query, key, value, scoring, causal=True)
    length = query.shape[2]
    places = torch.arange(length, device=query.device) if positions is None else positions
    block, pieces = QUERY_BLOCK, []
    if scoring.softcap is not None:  # the formula writes out its scores
        keys = length if window is None else min(length, window + QUERY_BLOCK)
        block = min(block, max(1, MAX_SCORES // (query.shape[1] * keys)))
    for start, part in zip(range(0, length, block), query.split(block, dim=2), strict=True):
        stop = start + part.shape[2]
        # positions rise by at least one per token, so the window reaches back at most window - 1 tokens
        first = 0 if window is None else max(0, start - window + 1)
        visible = _visible(places[start:stop], places[first:stop], window)
        pieces.append(masked_attention(part, key[:, :, first:stop], value[:, :, first:stop], scoring, visible))
    return torch.cat(pieces, dim=2)


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    window: int | None = None,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from the last tokens to all: generation with a cache, where the window counts tokens.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, key heads, keys, width), the last `queries` of them belonging to the queries.
        value: (batch, key heads, keys, value width).
        scoring: how scores become weights.
        window: keys a query sees, itself included; None for all before it.
        padding: (batch, keys), false for keys to hide; None hides none.

    Returns:
        (batch, heads, queries, value width).
    """
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1 and padding is None and (window is None or keys <= window):
        return masked_attention(query, key, value, scoring, None)
    places = torch.arange(keys, device=query.device)
    visible = _visible(places[keys - queries :], places, window)[None, None]
    if padding is not None:
        visible = visible & padding[:, None, None]
    return masked_attention(query, key, value, scoring, visible)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, visible: torch.Tensor | None
) -> torch.Tensor:
    """Attend where `visible`, bool and broadcastable to (batch, heads, queries, keys), is true; None sees all."""
    if scoring.softcap is None:
        return _kernel(query, key, value, scoring, visible)
    if torch.is_grad_enabled():
        # Kept for the backward pass, the scores of all blocks would be quadratic in the length.
        return checkpoint(_formula, query, key, value, scoring, visible, use_reentrant=False)
    return _formula(query, key, value, scoring, visible)


def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    distance = queries[:, None] - keys
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, visible: torch.Tensor | None
) -> torch.Tensor:
    """Softmax in float32 at least, as the models' own eager attention has it."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = query @ key.transpose(2, 3) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, scoring.dropout) @ value


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    visible: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    value_width = value.shape[-1]
    if scoring.sinks is not None:
        query, key, value = _with_sink(query, key, value, scoring.sinks / scoring.scale)
        if causal:
            # The sink is the first key: a first query of its own keeps the triangle aligned.
            query = F.pad(query, (0, 0, 1, 0))
        elif visible is not None:
            visible = F.pad(visible, (1, 0), value=True)
    query, key, value = _same_width(query, key, value)
    # Only the CPU kernel groups heads under a mask too; the others would fall back to quadratic memory.
    grouped = query.device.type == "cpu"
    if not grouped:
        key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    out = F.scaled_dot_product_attention(
        query, key, value, visible, scoring.dropout, causal, scale=scoring.scale, enable_gqa=grouped
    )
    if causal and scoring.sinks is not None:
        out = out[:, :, 1:]
    return out[..., :value_width]


def _with_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put a key before all others whose product with a query is the head's sink, and whose value is zero."""
    batch, heads, queries, width = query.shape
    column = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
    # One more coordinate, and zeros up to the next step of eight, which kernels want.
    wide = width + 8 - width % 8
    query = widened(torch.cat([query, column], dim=-1), wide)
    sink = F.one_hot(torch.tensor(width, device=key.device), wide).to(key.dtype)
    key = torch.cat([sink.expand(batch, key.shape[1], 1, -1), widened(key, wide)], dim=2)
    return query, key, F.pad(value, (0, 0, 1, 0))


def _same_width(*states: torch.Tensor, step: int = 1) -> list[torch.Tensor]:
    """Pad query, key and value with zeros to one width; the fused kernels take no others (MLA)."""
    width = max(tensor.shape[-1] for tensor in states)
    width += -width % step
    return [widened(tensor, width) for tensor in states]


def _repeat(states: torch.Tensor, heads: int, dim: int = 1) -> torch.Tensor:
    groups = heads // states.shape[dim]
    return states if groups == 1 else states.repeat_interleave(groups, dim)


# torch's variable-length attention has gained `window_size` and `enable_gqa` over the versions.
_FLASH_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


def flash_serves(query: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> bool:
    """Whether torch's FlashAttention computes these scores, on this device, in this precision."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(query.shape[-1], value.shape[-1]) <= FLASH_MAX_WIDTH
        and scoring.softcap is None
        and scoring.sinks is None
        and scoring.dropout == 0
        and _runs_flash(query.device)
    )


@torch.compiler.assume_constant_result
def _runs_flash(device: torch.device) -> bool:
    known = {"window_size", "scale"} <= _FLASH_PARAMETERS
    return known and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def _is_small_card(device: torch.device) -> bool:
    """Whether it has 99 KB of shared memory where A100, H100 and B200 have more: RTX 30, 40 and 50, A10, L4, L40S."""
    major, minor = torch.cuda.get_device_capability(device)
    return (major, minor) in ((8, 6), (8, 9)) or major == 12


def _flex_serves(query: torch.Tensor, value: torch.Tensor, segments: Segments, scoring: Scoring) -> bool:
    """Where a launch per segment would be many, and the kernel is known to fit; rows of one length are one already."""
    batched = segments.uniform and scoring.softcap is None and scoring.sinks is None
    if not query.is_cuda or batched:
        return False
    problem = _flex_problem(query, max(query.shape[-1], value.shape[-1]), scoring)
    if problem is not None:
        _warn_of_the_loop(problem)
    return problem is None


def _flex_problem(query: torch.Tensor, width: int, scoring: Scoring) -> str | None:
    if scoring.dropout > 0:
        return f"no kernel drops weights, as `attention_dropout` of {scoring.dropout} asks for"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no fused kernel computes in {query.dtype}"
    if not _runs_triton(query.device):
        return "flex attention needs Triton and a card of compute capability 7.0 or above"
    if flex_blocks(width, query.dtype.itemsize, shared_memory(query.device)) is None:
        return (
            f"flex attention over heads {width} wide in {query.dtype} needs more shared memory than "
            f"{torch.cuda.get_device_name(query.device)} has"
        )
    return None


@lru_cache(maxsize=64)
def _warn_of_the_loop(problem: str) -> None:
    # Once for each reason, not once a layer and step.
    logger.warning("Attention goes document by document, exact but slow where a row holds many: %s.", problem)


@lru_cache(maxsize=8)
def _runs_triton(device: torch.device) -> bool:
    # Windows has none, and cards before Volta cannot run it.
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attend causally within each segment by torch's FlashAttention; nothing is read on the host.

    Args:
        query: (tokens, heads, width), in half precision; key and value accordingly.
        starts: int32 (segments + 1,), where segments begin, and the end of the row; empty segments may end it.
        longest: tokens of the longest segment, or any number above.
        scale: factor on query-key products.
        window: tokens a query sees, itself included; None for all before it.

    Returns:
        (tokens, heads, value width).
    """
    value_width = value.shape[-1]
    between = 192 < max(query.shape[-1], value_width) <= 224
    # Some cards have gradients for heads up to 192 wide and of 256, and none between: torch would raise in step 1.
    full = between and torch.is_grad_enabled() and _is_small_card(query.device)
    query, key, value = _same_width(query, key, value, step=FLASH_MAX_WIDTH if full else 8)
    # (w, 0) lets a query see w keys before its own, (-1, 0) all of them.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _FLASH_PARAMETERS:
        options["enable_gqa"] = True
    else:
        key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    out: Any = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
    return out[..., :value_width]
