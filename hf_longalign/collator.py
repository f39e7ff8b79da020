"""`SkipPositionDataCollator`: batches whose position ids skip, padded or packed."""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_longalign.blocks import (
    IGNORE,
    Blocks,
    as_lengths,
    block_response,
    blocks_from_column,
    blocks_from_labels,
)
from hf_longalign.positions import Strategy, check_share, check_target_length, document_rng, get_strategy


logger = logging.getLogger(__name__)

# Boundaries in a few sizes are never for fewer documents.
FEWEST_DOCUMENTS = 16
# Samples without a place to skip that are met before the user is told so.
PATIENCE = 32


class Flat(NamedTuple):
    """The rows of a batch one after the other: int64 `(total,)` ids and labels; rows, documents and blocks of them.

    There are no blocks where no position is skipped.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    row_lengths: np.ndarray
    seq_lengths: np.ndarray
    blocks: Blocks | None


@dataclass
class SkipPositionDataCollator:
    """Data collator that gives a share of the samples skipped position ids.

    It goes wherever TRL's or transformers' collator for language modelling goes, and mirrors TRL's keys and dtypes.
    Each row is a dictionary with

    - `"input_ids"`: list, array or tensor of token ids.
    - `"labels"` (optional, default the input ids): -100 outside the loss.
    - `"block_lengths"` (optional): tokens of each block, adding up to the row.
    - `"blocks"` (optional): the same as one number per token ([`~hf_longalign.blocks.blocks_to_column`]), as
      `LongAlignSFTTrainer` prepares it. Without either, blocks are the runs of ignored and other labels.
    - `"seq_lengths"` (optional): tokens of each document of a packed row, each ending with a block.
    - `"attention_mask"` (optional): tokens it masks are padding and are taken out before anything else.

    Padded, it returns `"input_ids"`, `"labels"`, `"attention_mask"` and `"position_ids"`, int64 `(batch, length)`. The
    position of padding is 0: a larger one could raise the largest position, which "dynamic" RoPE reads. With strategy
    "none" there are no `"position_ids"`, as in TRL's batches: the model gives itself its own.

    Padding-free, it returns `"input_ids"`, `"labels"` and `"position_ids"`, int64 `(1, total)`, `"cu_seq_lens_q"` and
    `"cu_seq_lens_k"`, int32 `(documents + 1,)`, `"max_length_q"` and `"max_length_k"`, int, and `"seq_idx"`, int32
    `(1, total)`. The label of each document's first token is -100. Padding to a multiple is a document of its own.
    With `few_shapes`, for `torch.compile`, the boundaries end in repeated ends, documents without a token, up to a
    power of two, and the longest document counts as long as the whole row, rounded up to one: kernels need no less.

    The positions are a function of (seed, epoch, token ids of the sample): the same for any number of workers and
    processes, after a resume and in any batch order. Call [`~SkipPositionDataCollator.set_epoch`] for new ones.
    A collator skips wherever it is used, so give evaluation its own: `dataclasses.replace(collator, strategy="none")`.
    A plain `Trainer` drops `seq_lengths` and `block_lengths` unless it is told `remove_unused_columns=False`.

    A row without a target after its first token (an empty text, an answer that truncation cut off) trains nothing; it
    is counted in `idle_rows`, and the first one is logged. A batch of nothing else has loss 0 in TRL's trainers, and
    in `transformers.Trainer` with the [`SkipPositionCallback`].

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `int`, *optional*):
            Tokenizer whose pad token is used, or the id of that token.
        target_length (`int`):
            Positions stay below it; the length the model shall learn to reach. Only `"none"` does without.
        strategy (`str` or `Callable`, *optional*, defaults to `"skip_context"`):
            Name or function, see [`~hf_longalign.positions.sample_positions`].
        skip_probability (`float`, *optional*, defaults to `0.5`):
            Share of the samples that are skipped; the others keep ordinary positions.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether to put all documents into one row. The attention must know their boundaries.
        pad_to_multiple_of (`int`, *optional*):
            If set, the length is padded to a multiple of it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the positions.
        pad_token_id (`int`, *optional*):
            Id of the pad token, in place of a tokenizer's.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Kind of the tensors; there is no other.
        few_shapes (`bool`, *optional*, defaults to `False`):
            Whether padding-free boundaries come in a few sizes, so that a compiled model is not compiled again for
            every number of documents.

    Raises:
        ValueError: an argument or a row that is not as said above; among the rows an empty one, and one longer than
            `target_length`.

    Examples:

    >>> collator = SkipPositionDataCollator(0, target_length=32, skip_probability=1.0)
    >>> rows = [
    ...     {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
    ...     {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
    ... ]
    >>> batch = collator(rows)
    >>> batch["input_ids"]
    tensor([[1, 2, 3, 4],
            [5, 6, 7, 0]])
    >>> batch["position_ids"]
    tensor([[ 0, 10, 11, 12],
            [ 0, 21, 22,  0]])

    >>> # Packed rows
    >>> collator = SkipPositionDataCollator(0, target_length=32, skip_probability=1.0, padding_free=True)
    >>> row = {
    ...     "input_ids": [1, 2, 3, 4, 5, 6, 7],
    ...     "labels": [-100, -100, 3, 4, -100, -100, 7],
    ...     "seq_lengths": [4, 3],
    ... }
    >>> batch = collator([row])
    >>> batch["position_ids"]
    tensor([[ 0, 10, 11, 12,  0, 21, 22]])
    >>> batch["cu_seq_lens_q"], batch["max_length_q"]
    (tensor([0, 4, 7], dtype=torch.int32), 4)
    >>> batch["seq_idx"]
    tensor([[0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    tokenizer: PreTrainedTokenizerBase | int | None = None
    target_length: int = None  # type: ignore[assignment] # only "none" does without
    strategy: Strategy = "skip_context"
    skip_probability: float = 0.5
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    seed: int = 0
    pad_token_id: int = None  # type: ignore[assignment] # a number once it is made
    return_tensors: str = "pt"
    few_shapes: bool = False
    # Epoch and count of idle rows. In shared memory, so that they pass to and from the workers of a dataloader that
    # are running already.
    _shared: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, int):
            # A plain `Trainer` saves what it finds under this name with its checkpoints.
            self.pad_token_id, self.tokenizer = self.tokenizer, None
        if self.pad_token_id is None:
            self.pad_token_id = getattr(self.tokenizer, "pad_token_id", None)
        if self.pad_token_id is None:
            raise ValueError(
                f"`tokenizer` must have a pad token, got {type(self.tokenizer).__name__} without one. Set "
                "`tokenizer.pad_token = tokenizer.eos_token`, or give a `pad_token_id`."
            )
        get_strategy(self.strategy)
        check_share("skip_probability", self.skip_probability)
        if self.strategy != "none":
            check_target_length(self.target_length)
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"`pad_to_multiple_of` must be at least 1, got {self.pad_to_multiple_of!r}. Set None for none."
            )
        if self.return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {self.return_tensors!r}. Leave it out.")
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._without_place = 0

    @property
    def idle_rows(self) -> int:
        """How many rows so far, in all workers, had no target after their first token."""
        return int(self._shared[1])

    def set_epoch(self, epoch: int) -> None:
        """Draw new positions from now on, in this process and in the workers that were started from it."""
        self._shared[0] = epoch

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows into a batch; see the class."""
        flat = flatten_rows(rows, with_blocks=self.strategy != "none")
        if not self.padding_free and flat.seq_lengths.size > flat.row_lengths.size:
            raise ValueError(
                "`seq_lengths` must hold one document per row in a padded batch, got packed rows. "
                "Set `padding_free=True`."
            )
        if self.strategy != "none":
            check_target_length(self.target_length, int(flat.seq_lengths.max()))
        self._count_idle(flat)
        positions = self._positions(flat)
        return self._packed(flat, positions) if self.padding_free else self._padded(flat, positions)

    def _count_idle(self, flat: Flat) -> None:
        targets = flat.labels != IGNORE
        row_starts = np.cumsum(flat.row_lengths) - flat.row_lengths
        # Nothing comes before the first token that could predict it.
        targets[row_starts] = False
        idle = (~np.logical_or.reduceat(targets, row_starts)).nonzero()[0]
        if not idle.size:
            return
        if not self.idle_rows:
            logger.warning(
                "Row %d of a batch, with %d tokens, has no target after its first token: it trains nothing, and so do "
                "others like it. Leave out empty samples, and raise `max_length` where it cuts off the answers.",
                *(idle[0], flat.row_lengths[idle[0]]),
            )
        self._shared[1] += idle.size

    def _positions(self, flat: Flat) -> np.ndarray:
        """Position ids `(total,)` of all documents, each from 0."""
        starts = np.cumsum(flat.seq_lengths) - flat.seq_lengths
        steps = np.ones(flat.input_ids.size, dtype=np.int64)
        steps[starts] = 0
        if flat.blocks is not None:
            sampler, epoch = get_strategy(self.strategy), int(self._shared[0])
            lengths, response = flat.blocks
            first = [*np.searchsorted(np.cumsum(lengths) - lengths, starts).tolist(), lengths.size]
            for document, (start, length) in enumerate(zip(starts.tolist(), flat.seq_lengths.tolist(), strict=True)):
                rng = document_rng(flat.input_ids[start : start + length], seed=self.seed, epoch=epoch)
                if rng.random() >= self.skip_probability:
                    continue
                own = slice(first[document], first[document + 1])
                skips = sampler(lengths[own], response[own], self.target_length, rng)
                steps[skips.tokens + start] += skips.sizes
                self._watch(skips.tokens.size > 0)
        # Back to 0 where the next document begins, so that one sum serves all of them.
        ends = np.add.reduceat(steps, starts)
        steps[starts[1:]] = -ends[:-1]
        return np.cumsum(steps, out=steps)

    def _watch(self, found: bool) -> None:
        """Warn once if the first samples to be skipped have no place to skip at."""
        if self._without_place < 0:
            return
        self._without_place = -1 if found else self._without_place + 1
        if self._without_place == PATIENCE:
            self._without_place = -1
            logger.warning(
                "No position was skipped: strategy %r found no place to skip at in the first %d samples. Plain text is"
                ' one block, which of those by blocks only "skip_context" cuts; "skip_outer" needs two turns: set'
                ' `strategy="pose"`, or give the rows `block_lengths`.',
                self.strategy,
                PATIENCE,
            )

    def _length(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def _padded(self, flat: Flat, positions: np.ndarray) -> dict[str, torch.Tensor]:
        kept = np.arange(self._length(flat.row_lengths.max())) < flat.row_lengths[:, None]

        def padded(values: np.ndarray, fill: int) -> torch.Tensor:
            rows = np.full(kept.shape, fill, dtype=np.int64)
            rows[kept] = values
            return torch.from_numpy(rows)

        batch = {
            "input_ids": padded(flat.input_ids, self.pad_token_id),
            "labels": padded(flat.labels, IGNORE),
            "attention_mask": torch.from_numpy(kept.astype(np.int64)),
        }
        if self.strategy != "none":  # without them the model gives itself its own: RoBERTa's begin at 2
            batch["position_ids"] = padded(positions, 0)
        return batch

    def _packed(self, flat: Flat, positions: np.ndarray) -> dict[str, Any]:
        total = flat.input_ids.size
        padding = self._length(total) - total
        lengths = np.append(flat.seq_lengths, padding) if padding else flat.seq_lengths
        boundaries = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        labels = np.concatenate((flat.labels, np.full(padding, IGNORE)))
        # It would be predicted from the last token of the document before.
        labels[boundaries[:-1]] = IGNORE
        max_length = int(lengths.max())
        if self.few_shapes:
            # The kernels' memory grows by 128 tokens per document, empty or not: no large size for all.
            missing = max(FEWEST_DOCUMENTS, _power_of_two(lengths.size)) - lengths.size
            boundaries = np.append(boundaries, np.full(missing, boundaries[-1]))
            # Kernels need no less than the longest document, and the row's length is the same for all full rows.
            max_length = _power_of_two(int(boundaries[-1]))
        cu_seq_lens = torch.from_numpy(boundaries)
        return {
            "input_ids": _row(np.concatenate((flat.input_ids, np.full(padding, self.pad_token_id)))),
            "labels": _row(labels),
            "position_ids": _row(np.concatenate((positions, np.arange(padding)))),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max_length,
            "max_length_k": max_length,
            "seq_idx": _row(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)),
        }


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)[None]


def flatten_rows(rows: Sequence[dict[str, Any]], *, with_blocks: bool) -> Flat:
    """Put the rows one after the other, checked and without the padding they came with."""
    input_ids, labels, seq_lengths, blocks = [], [], [], []
    for index, row in enumerate(rows):
        ids, targets, kept = _tokens(row, index)
        given = row.get("seq_lengths")
        documents = np.array([ids.size]) if given is None else as_lengths("seq_lengths", given, total=ids.size)
        input_ids.append(ids)
        labels.append(targets)
        seq_lengths.append(documents)
        if with_blocks:
            blocks.append(_blocks(row, index, targets, kept, documents))
    return Flat(
        np.concatenate(input_ids),
        np.concatenate(labels),
        np.array([ids.size for ids in input_ids]),
        np.concatenate(seq_lengths),
        Blocks(*(np.concatenate(parts) for parts in zip(*blocks, strict=True))) if with_blocks else None,
    )


def _tokens(row: dict[str, Any], index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Input ids and labels of a row, int64 `(n,)`, without what its attention mask hides, and that mask if any."""
    if "input_ids" not in row:
        raise ValueError(f"`input_ids` must be in every row, got a row of {sorted(row)}. Tokenise the data set first.")
    ids = _integers(row, "input_ids", index)
    labels = ids if row.get("labels") is None else _integers(row, "labels", index, ids.size)
    kept = None
    if row.get("attention_mask") is not None:
        kept = _integers(row, "attention_mask", index, ids.size) != 0
        ids, labels = ids[kept], labels[kept]
    if not ids.size:
        raise ValueError(
            f"`input_ids` must hold tokens, got none in row {index} of the batch. Leave empty samples out."
        )
    if labels.min() < IGNORE:
        raise ValueError(
            f"`labels` must be token ids or {IGNORE}, got {labels.min()} in row {index} of the batch. Set {IGNORE} "
            "where nothing is to be learned."
        )
    return ids, labels, kept


def _integers(row: dict[str, Any], name: str, index: int, size: int | None = None) -> np.ndarray:
    """A column as int64 `(size,)`; lists, the common case, take the fastest way that refuses floats."""
    values = row[name]
    if isinstance(values, list):
        try:
            found = np.frombuffer(array("q", values), dtype=np.int64)
        except (TypeError, OverflowError):
            bad = next((value for value in values if not isinstance(value, int)), values)
            raise _not_integers(name, bad, index) from None
    else:
        found = np.asarray(values)
        if found.dtype.kind not in "iu" or found.ndim != 1:
            raise _not_integers(name, found, index)
        found = found.astype(np.int64, copy=False)
    if size is not None and found.size != size:
        raise ValueError(
            f"`{name}` must be as many as `input_ids`, {size} in row {index} of the batch, got {found.size}. Give one "
            "for each token."
        )
    return found


def _not_integers(name: str, bad: Any, index: int) -> ValueError:
    return ValueError(
        f"`{name}` must be a flat list of whole numbers, got {bad!r} in row {index} of the batch. "
        "Tokenise the samples first."
    )


def _blocks(
    row: dict[str, Any], index: int, labels: np.ndarray, kept: np.ndarray | None, documents: np.ndarray
) -> Blocks:
    """The blocks of a row: its `block_lengths` or `blocks` where it has them, else from its labels."""
    if row.get("block_lengths") is None:
        if row.get("blocks") is None:
            return blocks_from_labels(labels, documents)
        column = _integers(row, "blocks", index, labels.size if kept is None else kept.size)
        return blocks_from_column(column if kept is None else column[kept], documents)
    lengths = as_lengths("block_lengths", row["block_lengths"], total=labels.size)
    if not np.isin(np.cumsum(documents), np.cumsum(lengths)).all():
        raise ValueError(
            f"`block_lengths` must end a block with every document, got {lengths.tolist()} for `seq_lengths` "
            f"{documents.tolist()}. Cut the blocks there."
        )
    return Blocks(lengths, block_response(labels, lengths, documents))
