"""One fused attention for what FlashAttention has no kernel for: windows over skips, softcap, sinks, float32.

A query sees the keys from some first token up to itself: documents, causality and a window that counts positions all
say no more than that, for positions rise within a document. So one int32 number per token is the whole mask:

    positions  0 1 2 90 91 | 0 1        with a window of 3
    first      0 0 0  3  3 | 5 5

`flex_attention` reads it in blocks of 128 tokens; which blocks hold anything follows from the numbers at their ends,
so nothing of the size (tokens, tokens) is ever built. It is compiled once per run, for any number of documents.
Where torch's own choice of tiles would not fit into a card's shared memory, `flex_blocks` makes a smaller one.
Source: https://arxiv.org/abs/2412.05496
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hf_longalign.attention.packing import Segments


BLOCK = 128
# Triton's matrix product takes no fewer columns.
LEAST_WIDTH = 16
VERSIONS = 128
# Shared memory in bytes: of H100, H200 and B200, and what torch's own tiles for heads of at most 256 bytes take. All
# numbers are what Triton 3.7 says when it compiles the templates of torch 2.13, forward and backward, for sm_86; on
# cards up to 1 KB more has been seen.
LARGE_CARD = 232_448
OWN_TILES = 98_304
MARGIN = 1024
_NARROW = (32, 32, 16, 36_864)
# By bytes of a number and width of a head, rounded up to a power of two as the kernels do: tiles of queries and of
# keys, all four tiles of the backward pass, and what the larger pass takes.
_SMALL_TILES = {
    (2, 64): _NARROW,
    (2, 128): _NARROW,
    (2, 256): (32, 32, 32, 70_016),
    (2, 512): (32, 16, 16, 65_536),
    (4, 64): _NARROW,
    (4, 128): _NARROW,
    (4, 256): (32, 16, 16, 66_560),
}
_BACKWARD_TILES = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")


@dataclass(frozen=True)
class Scoring:
    """How scores become weights: what a layer sets once.

    Args:
        scale: factor on query-key products.
        dropout: probability of dropping a weight.
        softcap: scores pass through `softcap * tanh(score / softcap)`; None for no cap. Not together with sinks.
        sinks: (heads,) logits of a key that every query sees and that carries no value; None for none.
    """

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def first_visible(segments: Segments, device: torch.device) -> torch.Tensor:
    """Say for each token of a packed row which token is the first that it sees; it sees all from there to itself.

    Args:
        segments: the stretches to keep apart, with their window.
        device: where the answer goes; positions, if the segments hold any, must lie there.

    Returns:
        int32 (tokens,).

    >>> from hf_longalign.attention.packing import documents_of_rows, window_segments
    >>> positions = torch.tensor([0, 1, 4, 5, 6, 0, 1, 2])
    >>> first_visible(window_segments(documents_of_rows(1, 5), positions[:5], 5), positions.device)
    tensor([0, 0, 0, 1, 2], dtype=torch.int32)
    """
    bounds, tokens = segments.cumulative(device).long(), segments.bounds[-1]
    # The size is known here; a repeat that had to ask the device for it would wait for all work under way.
    begin = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=tokens)
    if segments.window is None or all(segments.plain):
        return begin.int()
    if segments.positions is None:
        return torch.maximum(begin, torch.arange(tokens, device=device) - segments.window + 1).int()
    # One rising number per token: its position in its stretch, and stretches further apart than any window.
    apart = max(segments.spans) + segments.window
    stretch = torch.repeat_interleave(
        torch.arange(len(segments.lengths), device=device), bounds.diff(), output_size=tokens
    )
    within = segments.positions - segments.positions[begin]
    oldest = (within - segments.window + 1).clamp(min=0)
    return torch.searchsorted(stretch * apart + within, stretch * apart + oldest, out_int32=True)


def block_mask(first: torch.Tensor) -> BlockMask:
    """Lay the mask out in blocks, of which only those that hold anything are visited.

    Args:
        first: int32 (tokens,), as `first_visible` gives it: it never falls.
    """
    tokens, device = first.shape[0], first.device
    own = torch.arange(-(-tokens // BLOCK), device=device)
    start = first[::BLOCK] // BLOCK
    last = first[(own * BLOCK + BLOCK - 1).clamp(max=tokens - 1)]
    # Blocks from here to the query's own are seen whole, the ones before in part, its own up to the diagonal.
    whole = torch.minimum((last + BLOCK - 1) // BLOCK, own)
    before = whole - start
    columns = own[None]
    partly = torch.where(columns < before[:, None], start[:, None] + columns, own[:, None])
    wholly = (whole[:, None] + columns).clamp(max=own.shape[0] - 1)

    def visible(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key >= first[query])

    counts = [(before + 1).int()[None, None], (own - whole).int()[None, None]]
    return BlockMask.from_kv_blocks(
        counts[0], partly.int()[None, None], counts[1], wholly.int()[None, None],
        BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(tokens, tokens),
    )  # fmt: skip


def flex_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scoring: Scoring
) -> torch.Tensor:
    """Attend within each segment of a packed row, by one call whatever the number of segments.

    Args:
        query: (tokens, heads, width); key and value accordingly, with as many heads or fewer.
        segments: the stretches to keep apart, with their window.
        scoring: how scores become weights; nothing is dropped.

    Returns:
        (tokens, heads, value width).
    """
    value_width, softcap, sinks = value.shape[-1], scoring.softcap, scoring.sinks
    rows = [widened(states.transpose(0, 1)[None], LEAST_WIDTH) for states in (query, key, value)]
    mask = segments.once(("blocks", query.device), lambda: block_mask(first_visible(segments, query.device)))
    options: dict[str, Any] = {
        "score_mod": None if softcap is None else _softcap(softcap),
        "block_mask": mask,
        "scale": scoring.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        # Short rows would take a kernel made for decoding, compiled apart.
        "kernel_options": {"FORCE_USE_FLEX_ATTENTION": True},
    }
    if query.is_cuda:
        width = max(query.shape[-1], value_width)
        options["kernel_options"] |= flex_blocks(width, query.dtype.itemsize, shared_memory(query.device)) or {}
    attend: Any = _compiled() if query.is_cuda else flex_attention
    if sinks is None:
        out = attend(*rows, **options)
    else:
        out, aux = attend(*rows, **options, return_aux=AuxRequest(lse=True))
        # The weights add up to exp(lse); with the sink among them, to exp(lse) + exp(sink).
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
        out = (out * share[..., None]).to(query.dtype)
    return out[0, ..., :value_width].transpose(0, 1)


def flex_blocks(width: int, itemsize: int, memory: int | None) -> dict[str, int] | None:
    """Choose the tiles of the compiled kernels so that the backward pass too fits into the card's shared memory.

    It would fail in the first step of training, after a preflight without gradients. Tiles too large are known faults
    of torch: https://github.com/pytorch/pytorch/issues/180278, /198224, /133254.

    Args:
        width: of the heads, the widest of queries, keys and values.
        itemsize: bytes of a number.
        memory: shared memory of the card, in bytes, as `shared_memory` tells it.

    Returns:
        Options for `flex_attention`; none where torch's own serve; None where no tiles are known to fit.

    >>> flex_blocks(128, 2, 101_376), flex_blocks(1024, 2, 232_448)
    ({}, None)
    >>> flex_blocks(256, 2, 101_376)["bwd_BLOCK_M1"]
    32
    """
    if memory is None:  # an AMD card, for which torch has tiles of its own
        return {} if width <= 256 else None
    rounded = max(64, 1 << (width - 1).bit_length())
    own = OWN_TILES + MARGIN if itemsize * rounded <= 256 else LARGE_CARD
    if itemsize * rounded <= 512 and memory >= own:
        return {}
    if (itemsize, rounded) not in _SMALL_TILES:
        return None
    queries, keys, backward, needed = _SMALL_TILES[itemsize, rounded]
    if needed + MARGIN > memory:
        return None
    tiles = {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": keys} | dict.fromkeys(_BACKWARD_TILES, backward)
    # Two stages read the next tile while one is computed; only the backward pass over tiles of 32 has room for that.
    return tiles | {"fwd_num_stages": 1, "bwd_num_stages": 2 if backward == 32 else 1, "num_warps": 4}


@lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a kernel may take on a card; None for an AMD card, which does not say."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """Without compilation `flex_attention` writes out all scores."""
    compiled: Any = torch.compile(flex_attention)

    def attend(*states: torch.Tensor, **options: Any) -> Any:
        # Precisions, shapes, softcaps, training and evaluation are versions of one function. Past eight of them torch
        # goes on uncompiled, with a line in its log (seen on an H100 with Gemma 2).
        with torch._dynamo.config.patch(recompile_limit=VERSIONS):
            return compiled(*states, **options)

    return attend


@lru_cache(maxsize=8)
def _softcap(bound: float) -> Callable[..., torch.Tensor]:
    # Kept: a function made anew in every layer would look new to the compiler.
    def cap(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return bound * torch.tanh(score / bound)

    return cap


def widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Pad with zeros to at least a width; zeros change no product."""
    # F.pad copies the tensor even where it adds nothing: three copies per layer for nearly every model.
    return states if states.shape[-1] >= width else F.pad(states, (0, width - states.shape[-1]))
