"""Where the documents of a batch begin and end, and where a sliding window cuts them.

Every batch becomes one packed row of tokens before attention is computed:

    padded    [a b c . .]          packed row  a b c d e f g h
              [d e f g h]          bounds      0     3         8

    positions  0 1 2 | 0 1 90 91 92    a window of 8 cannot reach over the jump from 1 to 90,
    segments   0     3     5      8    so layers with that window see three stretches, all others two documents
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import torch


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Documents:
    """The tokens of a batch as one packed row.

    Args:
        bounds: document i is the tokens `bounds[i]:bounds[i + 1]` of the packed row.
        indices: int64 (tokens,), the place of each token in the flattened batch; None when the batch has no padding.
    """

    bounds: tuple[int, ...]
    indices: torch.Tensor | None = None

    @cached_property
    def segments(self) -> "Segments":
        """The documents, uncut: what a layer without a window sees."""
        return Segments(self.bounds, tuple(np.diff(self.bounds).tolist()))

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Bring (batch, heads, length, width) into the packed row (tokens, heads, width)."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.indices is None else flat[self.indices]

    def unpack(self, states: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """Bring (tokens, heads, width) back into (batch, length, heads, width), zero where there is padding."""
        if self.indices is not None:
            padded = states.new_zeros(batch * length, *states.shape[1:])
            states = padded.index_copy(0, self.indices, states)
        return states.unflatten(0, (batch, length))


@dataclass(frozen=True, eq=False)
class Segments:
    """The stretches of a packed row that attention treats as independent, all causal.

    Args:
        bounds: segment i is the tokens `bounds[i]:bounds[i + 1]`.
        spans: the positions each segment covers, last - first + 1.
        window: how many positions a query sees, itself included; None for all.
        positions: (tokens,); None if positions rise by one wherever the window matters, so that a kernel may count
            the window in tokens.
    """

    bounds: tuple[int, ...]
    spans: tuple[int, ...]
    window: int | None = None
    positions: torch.Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]

    @cached_property
    def plain(self) -> list[bool]:
        """Whether the window reaches over the whole segment, so that plain causal attention is the same."""
        return [self.window is None or span <= self.window for span in self.spans]

    @cached_property
    def uniform(self) -> bool:
        """Whether all segments are plain and of one length: a batch of rows."""
        return all(self.plain) and len(set(self.lengths)) == 1

    def places(self, i: int) -> torch.Tensor | None:
        """Positions of segment i, (tokens of it,)."""
        return None if self.positions is None else self.positions[self.bounds[i] : self.bounds[i + 1]]

    def cumulative(self, device: torch.device) -> torch.Tensor:
        """`bounds` as the int32 tensor that variable-length kernels want, copied to the device once."""
        return self.once(("bounds", device), lambda: torch.tensor(self.bounds, dtype=torch.int32, device=device))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make what the kernels want of these segments once for all layers, and keep it."""
        if key not in self._made:
            # Else what was made while generating could not be kept for a backward pass.
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]


def remembered(tensor: torch.Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """Compute once per tensor and key, and keep the result on the tensor.

    All layers of a forward are handed the same mask, boundaries and positions; reading them on the host once, and not
    in every layer, spares a device synchronisation per layer. The result dies with the tensor, and is computed anew
    when the tensor was written to.
    """
    # Tensors of inference mode count no versions, and raise where they are asked for one.
    version = None if tensor.is_inference() else tensor._version
    memo = tensor.__dict__.setdefault("_longalign", {})
    if key not in memo or memo[key][0] != version:
        memo[key] = version, compute()
    return memo[key][1]


@lru_cache(maxsize=64)
def documents_of_rows(batch: int, length: int) -> Documents:
    """Each row of the batch is one document.

    >>> documents_of_rows(2, 3).bounds
    (0, 3, 6)
    """
    return Documents(tuple(range(0, batch * length + 1, length)))


def documents_of_mask(mask: torch.Tensor) -> Documents:
    """Each row's unmasked tokens are one document: (batch, length) or (batch, 1, 1, length), nonzero for a token.

    >>> documents_of_mask(torch.tensor([[1, 1, 0], [0, 1, 1]])).bounds
    (0, 2, 4)
    """
    kept = mask.flatten(1).bool()
    lengths = kept.sum(1).tolist()
    bounds = tuple(int(bound) for bound in np.cumsum([0, *(length for length in lengths if length)]))
    return Documents(bounds, kept.flatten().nonzero().flatten())


def documents_of_boundaries(starts: torch.Tensor, key_starts: torch.Tensor | None, length: int) -> Documents:
    """The documents of one packed row, from `cu_seq_lens_q` (and `cu_seq_lens_k`, which must be the same).

    Raises:
        ValueError: the boundaries do not rise from 0 to the length of the row, or differ for queries and keys.

    >>> documents_of_boundaries(torch.tensor([0, 2, 5]), None, 5).bounds
    (0, 2, 5)
    """
    # Read at once: on a GPU each read waits for all work under way.
    keys = starts if key_starts is None else key_starts
    read = torch.cat([starts.flatten(), keys.flatten()]).tolist()
    bounds, key_bounds = read[: starts.numel()], read[starts.numel() :]
    if bounds[:1] != [0] or bounds[-1] != length or any(np.diff(bounds) < 0):
        raise ValueError(
            f"`cu_seq_lens_q` must rise from 0 to the row's length {length}, got {_short(bounds)}. Count every token "
            "of the row, padding at its end as a document of its own."
        )
    if key_bounds != bounds:
        raise ValueError(
            f"`cu_seq_lens_k` must equal `cu_seq_lens_q`, got {_short(key_bounds)} and {_short(bounds)}. Pass the "
            "same tensor for both."
        )
    return Documents(tuple(bound for i, bound in enumerate(bounds) if i == 0 or bound > bounds[i - 1]))


def check_rows_are_single_documents(positions: torch.Tensor) -> None:
    """Raise when positions do not rise within a row: a packed row whose boundaries nobody gave.

    Args:
        positions: (batch, length).
    """
    if bool((positions[:, 1:] <= positions[:, :-1]).any()):
        raise ValueError(
            "`position_ids` must rise within a row, got a row that starts anew, and neither `cu_seq_lens_q` nor "
            "`attention_mask` says where its documents end; positions cannot say it once some are skipped. Use "
            "SkipPositionDataCollator(padding_free=True), or pass `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` "
            "and `max_length_k`. If they were passed, the model does not hand them to its attention: train padded "
            "rows."
        )


def window_segments(documents: Documents, positions: torch.Tensor, window: int) -> Segments:
    """Cut the documents wherever the next token lies a window or more ahead: no query can look back over that.

    Args:
        documents: the batch's documents.
        positions: integer (tokens,), rising within each document (constant positions, as of padding, pass too).
        window: positions a query sees, itself included.

    Raises:
        ValueError: positions do not rise within a document.

    >>> documents = documents_of_rows(1, 5)
    >>> window_segments(documents, torch.tensor([0, 1, 90, 91, 95]), 8).bounds
    (0, 2, 5)
    """
    places = positions.cpu().numpy().astype(np.int64)
    bounds = np.asarray(documents.bounds)
    jumps = np.diff(places)
    starts = np.zeros(len(places), dtype=bool)
    starts[bounds[:-1]] = True
    falls = np.flatnonzero((jumps <= 0) & ~starts[1:])
    owner = np.searchsorted(bounds, falls, side="right") - 1
    # Padding has one position throughout, and is no fault.
    falls = falls[places[bounds[owner]] != places[bounds[owner + 1] - 1]]
    if falls.size:
        at = int(falls[0])
        raise ValueError(
            f"`position_ids` must rise within each document, got {places[at]} then {places[at + 1]} at token {at + 1} "
            "of the packed row. If a document begins there, say so in `cu_seq_lens_q`."
        )
    cuts = np.flatnonzero(starts[1:] | (jumps >= window)) + 1
    edges = np.concatenate([[0], cuts, [len(places)]])
    spans = places[edges[1:] - 1] - places[edges[:-1]] + 1
    skips = bool(((spans > window) & (spans != np.diff(edges))).any())
    # A copy: a view would keep its base alive, and with it the result that is remembered there.
    kept = positions.clone() if skips else None
    return Segments(tuple(edges.tolist()), tuple(spans.tolist()), window, kept)


def _short(bounds: list[int]) -> str:
    return str(bounds) if len(bounds) <= 8 else f"[{bounds[0]}, {bounds[1]}, …, {bounds[-1]}]"
