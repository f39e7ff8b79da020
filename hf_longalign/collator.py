"""`SkipPositionDataCollator`: batches whose position ids skip, padded or packed."""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_longalign.blocks import IGNORE, Blocks, as_lengths, block_response, blocks_from_labels, unmark_labels
from hf_longalign.positions import Strategy, check_target_length, document_rng, get_strategy


logger = logging.getLogger(__name__)

# Boundaries in a few sizes are never for fewer documents.
FEWEST_DOCUMENTS = 16
# Samples without a place to skip that are met before the user is told so.
PATIENCE = 32


class Flat(NamedTuple):
    """The rows of a batch one after the other: int64 `(total,)` ids and labels; rows, documents and blocks of them."""

    input_ids: np.ndarray
    labels: np.ndarray
    row_lengths: np.ndarray
    seq_lengths: np.ndarray
    blocks: Blocks


@dataclass
class SkipPositionDataCollator:
    """Data collator that gives a share of the samples skipped position ids.

    It goes wherever TRL's or transformers' collator for language modelling goes, and mirrors TRL's keys and dtypes.
    Each row is a dictionary with

    - `"input_ids"`: list, array or tensor of token ids.
    - `"labels"` (optional, default the input ids): -100 outside the loss; may carry block marks
      ([`~hf_longalign.blocks.mark_blocks`]).
    - `"block_lengths"` (optional): tokens of each block, adding up to the row. Without it blocks come from the labels.
    - `"seq_lengths"` (optional): tokens of each document of a packed row, each ending with a block.
    - `"attention_mask"` (optional): tokens it masks are padding and are taken out before anything else.

    Padded, it returns `"input_ids"`, `"labels"`, `"attention_mask"` and `"position_ids"`, int64 `(batch, length)`. The
    position of padding is 0: a larger one could raise the largest position, which "dynamic" RoPE reads.

    Padding-free, it returns `"input_ids"`, `"labels"` and `"position_ids"`, int64 `(1, total)`, `"cu_seq_lens_q"` and
    `"cu_seq_lens_k"`, int32 `(documents + 1,)`, `"max_length_q"` and `"max_length_k"`, int, and `"seq_idx"`, int32
    `(1, total)`. The label of each document's first token is -100. Padding to a multiple is a document of its own.
    With `few_shapes`, for `torch.compile`, the boundaries end in repeated ends, documents without a token, up to a
    power of two, and the longest document counts as long as the whole row, rounded up to one: kernels need no less.

    The positions are a function of (seed, epoch, token ids of the sample): the same for any number of workers and
    processes, after a resume and in any batch order. Call [`~SkipPositionDataCollator.set_epoch`] for new ones.
    A collator skips wherever it is used, so give evaluation its own: `dataclasses.replace(collator, strategy="none")`.
    A plain `Trainer` drops `seq_lengths` and `block_lengths` unless it is told `remove_unused_columns=False`.

    Args:
        tokenizer_or_pad_token_id (`PreTrainedTokenizerBase` or `int`):
            Tokenizer whose pad token is used, or the id of that token.
        target_length (`int`):
            Positions stay below it; the length the model shall learn to reach. Not used by `"none"`.
        strategy (`str` or `Callable`, *optional*, defaults to `"skip_all"`):
            Name or function, see [`~hf_longalign.positions.sample_positions`].
        skip_probability (`float`, *optional*, defaults to `0.5`):
            Share of the samples that are skipped; the others keep ordinary positions.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether to put all documents into one row. The attention must know their boundaries.
        pad_to_multiple_of (`int`, *optional*):
            If set, the length is padded to a multiple of it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the positions.
        few_shapes (`bool`, *optional*, defaults to `False`):
            Whether padding-free boundaries come in a few sizes, so that a compiled model is not compiled again for
            every number of documents.

    Raises:
        ValueError: an argument or a row that is not as said above; among the rows an empty one, one longer than
            `target_length`, and one that trains nothing (a single token, or all labels -100). Documents of packed rows
            may train nothing: packing can cut a prompt from its answer.

    Examples:

    >>> collator = SkipPositionDataCollator(0, target_length=32, skip_probability=1.0)
    >>> rows = [
    ...     {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
    ...     {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    ... ]
    >>> batch = collator(rows)
    >>> batch["input_ids"]
    tensor([[1, 2, 3, 4],
            [5, 6, 7, 0]])
    >>> batch["position_ids"]
    tensor([[ 0,  1, 11, 12],
            [ 0, 21, 22,  0]])

    >>> # Packed rows
    >>> collator = SkipPositionDataCollator(0, target_length=32, skip_probability=1.0, padding_free=True)
    >>> row = {
    ...     "input_ids": [1, 2, 3, 4, 5, 6, 7],
    ...     "labels": [-100, -100, 3, 4, -100, 6, 7],
    ...     "seq_lengths": [4, 3],
    ... }
    >>> batch = collator([row])
    >>> batch["position_ids"]
    tensor([[ 0,  1, 11, 12,  0, 21, 22]])
    >>> batch["cu_seq_lens_q"], batch["max_length_q"]
    (tensor([0, 4, 7], dtype=torch.int32), 4)
    >>> batch["seq_idx"]
    tensor([[0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    tokenizer_or_pad_token_id: PreTrainedTokenizerBase | int
    target_length: int
    strategy: Strategy = "skip_all"
    skip_probability: float = 0.5
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    seed: int = 0
    few_shapes: bool = False
    # Shared memory, so that an epoch set here reaches the workers of a dataloader that are running already.
    _epoch: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.pad_token_id = _pad_token_id(self.tokenizer_or_pad_token_id)
        check_target_length(self.target_length)
        get_strategy(self.strategy)
        if not 0 <= self.skip_probability <= 1:
            raise ValueError(
                f"`skip_probability` must be from 0 to 1, got {self.skip_probability!r}. Set the share to be skipped."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"`pad_to_multiple_of` must be at least 1, got {self.pad_to_multiple_of!r}. Set None for none."
            )
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._without_place = 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, which a plain `Trainer` saves with its checkpoints; `None` for a bare pad token."""
        given = self.tokenizer_or_pad_token_id
        return None if isinstance(given, int) else given

    def set_epoch(self, epoch: int) -> None:
        """Draw new positions from now on, in this process and in the workers that were started from it."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows into a batch; see the class."""
        flat = _flatten(rows)
        self._check(rows, flat)
        positions = self._positions(flat)
        return self._packed(flat, positions) if self.padding_free else self._padded(flat, positions)

    def _check(self, rows: Sequence[dict[str, Any]], flat: Flat) -> None:
        if not self.padding_free and flat.seq_lengths.size > flat.row_lengths.size:
            raise ValueError(
                "`seq_lengths` must hold one document per row in a padded batch, got packed rows. "
                "Set `padding_free=True`."
            )
        if self.strategy != "none" and flat.seq_lengths.max() > self.target_length:
            check_target_length(self.target_length, int(flat.seq_lengths.max()))
        targets = flat.labels != IGNORE
        row_starts = np.cumsum(flat.row_lengths) - flat.row_lengths
        # Nothing comes before the first token that could predict it.
        targets[row_starts] = False
        for index in (~np.logical_or.reduceat(targets, row_starts)).nonzero()[0].tolist():
            if rows[index].get("seq_lengths") is None:
                raise ValueError(
                    f"`labels` must hold a target after the first token, got none in row {index} of the batch with "
                    f"{flat.row_lengths[index]} tokens: it trains nothing. Leave such samples out."
                )

    def _positions(self, flat: Flat) -> np.ndarray:
        """Position ids `(total,)` of all documents, each from 0."""
        starts = np.cumsum(flat.seq_lengths) - flat.seq_lengths
        steps = np.ones(flat.input_ids.size, dtype=np.int64)
        steps[starts] = 0
        if self.strategy != "none":
            self._skip(steps, flat, starts)
        ends = np.add.reduceat(steps, starts)
        steps[starts[1:]] = -ends[:-1]
        return np.cumsum(steps, out=steps)

    def _skip(self, steps: np.ndarray, flat: Flat, starts: np.ndarray) -> None:
        """Add the skips of the chosen documents to the steps from token to token."""
        sampler = get_strategy(self.strategy)
        blocks = flat.blocks
        first = np.searchsorted(np.cumsum(blocks.lengths) - blocks.lengths, starts).tolist()
        first.append(blocks.lengths.size)
        epoch = int(self._epoch)
        for document, (start, length) in enumerate(zip(starts.tolist(), flat.seq_lengths.tolist(), strict=True)):
            rng = document_rng(flat.input_ids[start : start + length], seed=self.seed, epoch=epoch)
            if rng.random() >= self.skip_probability:
                continue
            own = slice(first[document], first[document + 1])
            skips = sampler(blocks.lengths[own], blocks.response[own], self.target_length, rng)
            steps[skips.tokens + start] += skips.sizes
            self._watch(skips.tokens.size > 0)

    def _watch(self, found: bool) -> None:
        """Warn once if the first samples to be skipped have no place to skip at."""
        if self._without_place < 0:
            return
        self._without_place = -1 if found else self._without_place + 1
        if self._without_place == PATIENCE:
            self._without_place = -1
            logger.warning(
                "No position was skipped: strategy %r found no place to skip at in the first %d samples. Plain text is"
                ' one block, "skip_outer" needs two turns: set `strategy="pose"`, or give the rows `block_lengths`.',
                self.strategy,
                PATIENCE,
            )

    def _length(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def _padded(self, flat: Flat, positions: np.ndarray) -> dict[str, torch.Tensor]:
        lengths = flat.row_lengths.tolist()
        shape = (len(lengths), self._length(max(lengths)))
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
        }
        start = 0
        for row, length in enumerate(lengths):
            end = start + length
            batch["input_ids"][row, :length] = flat.input_ids[start:end]
            batch["labels"][row, :length] = flat.labels[start:end]
            batch["attention_mask"][row, :length] = 1
            batch["position_ids"][row, :length] = positions[start:end]
            start = end
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def _packed(self, flat: Flat, positions: np.ndarray) -> dict[str, Any]:
        total = flat.input_ids.size
        padding = self._length(total) - total
        lengths = np.append(flat.seq_lengths, padding) if padding else flat.seq_lengths
        boundaries = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        labels = np.concatenate((flat.labels, np.full(padding, IGNORE)))
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


def _pad_token_id(tokenizer: PreTrainedTokenizerBase | int) -> int:
    pad_token_id = tokenizer if isinstance(tokenizer, int) else getattr(tokenizer, "pad_token_id", None)
    if pad_token_id is None:
        raise ValueError(
            f"`tokenizer_or_pad_token_id` must have a pad token, got {type(tokenizer).__name__} without one. Set "
            "`tokenizer.pad_token = tokenizer.eos_token`, or give the id of a token."
        )
    return pad_token_id


def _flatten(rows: Sequence[dict[str, Any]]) -> Flat:
    """Put the rows one after the other, checked and without the padding they came with."""
    input_ids, labels, seq_lengths, blocks = [], [], [], []
    for index, row in enumerate(rows):
        ids, marked = _tokens(row, index)
        given = row.get("seq_lengths")
        documents = np.array([ids.size]) if given is None else as_lengths("seq_lengths", given, total=ids.size)
        input_ids.append(ids)
        labels.append(unmark_labels(marked))
        seq_lengths.append(documents)
        blocks.append(_blocks(row.get("block_lengths"), marked, labels[-1], documents))
    return Flat(
        np.concatenate(input_ids),
        np.concatenate(labels),
        np.array([ids.size for ids in input_ids]),
        np.concatenate(seq_lengths),
        Blocks(*(np.concatenate(parts) for parts in zip(*blocks, strict=True))),
    )


def _tokens(row: dict[str, Any], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and labels of a row, int64 `(n,)`, without what its attention mask hides."""
    if "input_ids" not in row:
        raise ValueError(f"`input_ids` must be in every row, got a row of {sorted(row)}. Tokenise the data set first.")
    ids = _integers(row["input_ids"], "input_ids", index)
    labels = ids if row.get("labels") is None else _integers(row["labels"], "labels", index)
    if labels.size != ids.size:
        raise ValueError(
            f"`labels` must be as many as `input_ids`, {ids.size} in row {index} of the batch, got {labels.size}. "
            "Set -100 where nothing is to be learned."
        )
    if row.get("attention_mask") is not None:
        mask = _integers(row["attention_mask"], "attention_mask", index)
        if mask.size != ids.size:
            raise ValueError(
                f"`attention_mask` must be as long as `input_ids`, {ids.size} in row {index} of the batch, got "
                f"{mask.size}. Leave it out: padding is added here."
            )
        ids, labels = ids[mask != 0], labels[mask != 0]
    if not ids.size:
        raise ValueError(
            f"`input_ids` must hold tokens, got none in row {index} of the batch. Leave empty samples out."
        )
    return ids, labels


def _integers(values: Any, name: str, index: int) -> np.ndarray:
    """Whole numbers as int64 `(n,)`; lists, the common case, take the fastest way that refuses floats."""
    if isinstance(values, list):
        try:
            return np.frombuffer(array("q", values), dtype=np.int64)
        except (TypeError, OverflowError):
            bad = next((value for value in values if not isinstance(value, int)), values)
    else:
        given = np.asarray(values)
        if given.dtype.kind in "iu" and given.ndim == 1:
            return given.astype(np.int64, copy=False)
        bad = given
    raise ValueError(
        f"`{name}` must be a flat list of whole numbers, got {bad!r} in row {index} of the batch. "
        "Tokenise the samples first."
    )


def _blocks(lengths: Any, marked: np.ndarray, labels: np.ndarray, documents: np.ndarray) -> Blocks:
    """The blocks of a row: its `block_lengths` where it has them, else from its labels."""
    if lengths is None:
        return blocks_from_labels(marked, documents)
    lengths = as_lengths("block_lengths", lengths, total=labels.size)
    if not np.isin(np.cumsum(documents), np.cumsum(lengths)).all():
        raise ValueError(
            f"`block_lengths` must end a block with every document, got {lengths.tolist()} for `seq_lengths` "
            f"{documents.tolist()}. Cut the blocks there."
        )
    return Blocks(lengths, block_response(labels, lengths, documents))
