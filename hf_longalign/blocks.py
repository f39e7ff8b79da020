"""Where the blocks of a sample begin: its labels, a `block_lengths` column, or character offsets of its parts.

A block is a run of tokens that keeps contiguous positions: an instruction, a response, one context of an instruction.
TRL's preparation keeps `input_ids`, `labels` and `seq_lengths` alone through packing, so blocks finer than the runs of
ignored labels travel inside the labels, as marks below -100:

| first token of | ignored label | target label t |
| --- | --- | --- |
| an instruction block | -101 | -(1000 + 2t) |
| a response block | -102 | -(1001 + 2t) |

Only NumPy. Arrays of several documents in a row (a packed row, a batch) take their lengths as `seq_lengths`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


IGNORE = -100
IGNORED_MARK = -101
TARGET_MARK = -1000


class Blocks(NamedTuple):
    """The blocks of a sample, in order: `lengths` int64 `(blocks,)` in tokens and `response` bool `(blocks,)`."""

    lengths: np.ndarray
    response: np.ndarray


def as_lengths(name: str, lengths: ArrayLike, total: int | None = None) -> np.ndarray:
    """Check a list of lengths.

    Args:
        name: the field to name in an error, e.g. `"block_lengths"`.
        lengths: `(k,)` whole numbers of at least 1.
        total: what they must add up to, in tokens; `None` where it is not known.

    Returns:
        int64 `(k,)`.

    Raises:
        ValueError: no lengths, one that is not a whole number of at least 1, or a wrong sum.

    Example:

    >>> as_lengths("block_lengths", [3, 2], total=5)
    array([3, 2])
    >>> as_lengths("block_lengths", [3, 2], total=6)
    Traceback (most recent call last):
    ValueError: `block_lengths` must add up to the 6 tokens of the sample, got [3, 2] (5). Give every token one block.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`{name}` must be a list of at least one length, got {lengths!r}. Give a non-empty sample.")
    if array.dtype.kind not in "iu" or array.min() < 1:
        raise ValueError(f"`{name}` must be whole numbers of at least 1, got {lengths!r}. Leave out what is empty.")
    if total is not None and array.sum() != total:
        unit = "block" if name == "block_lengths" else "document"
        raise ValueError(
            f"`{name}` must add up to the {total} tokens of the sample, got {lengths!r} ({array.sum()}). "
            f"Give every token one {unit}."
        )
    return array.astype(np.int64, copy=False)


def alternate(count: int) -> np.ndarray:
    """Say which of `count` blocks are responses where nothing else does: instruction, response, instruction, response.

    That is SkipAlign's sample (https://arxiv.org/abs/2405.03939).

    >>> alternate(3)
    array([False,  True, False])
    """
    return np.arange(count) % 2 == 1


def mark_blocks(labels: ArrayLike, block_lengths: ArrayLike, response: ArrayLike) -> np.ndarray:
    """Write blocks into labels, so that they outlive truncation and packing.

    Args:
        labels: int `(n,)`, token ids and -100.
        block_lengths: int `(blocks,)`, adding up to n.
        response: bool `(blocks,)`.

    Returns:
        int64 `(n,)` labels with the first token of each block marked.

    Raises:
        ValueError: lengths that do not add up, `response` of another length, or labels that carry marks already.

    Example:

    >>> mark_blocks([-100, -100, -100, 7, 8], [2, 1, 2], [False, False, True])
    array([ -101,  -100,  -101, -1015,     8])
    """
    marked = np.array(labels, dtype=np.int64)
    if marked.size and marked.min() < IGNORE:
        raise ValueError(f"`labels` must be token ids or {IGNORE}, got {marked.min()}. Unmark them first.")
    lengths = as_lengths("block_lengths", block_lengths, total=marked.size)
    flags = as_response(response, lengths.size).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    first = marked[starts]
    marked[starts] = np.where(first == IGNORE, IGNORED_MARK - flags, TARGET_MARK - 2 * first - flags)
    return marked


def as_response(response: ArrayLike, count: int) -> np.ndarray:
    """Check that `response` holds one flag per block; returns bool `(count,)`."""
    flags = np.asarray(response)
    if flags.dtype.kind != "b" or flags.shape != (count,):
        raise ValueError(f"`response` must be one bool per block, {count} here, got {response!r}. Set one per block.")
    return flags


def unmark_labels(labels: np.ndarray) -> np.ndarray:
    """Restore the labels that [`mark_blocks`] has marked; labels without marks are returned as they are.

    Args:
        labels: int64 `(n,)`.

    Returns:
        int64 `(n,)`, token ids and -100.

    Raises:
        ValueError: a value below -100 that is no mark.

    Example:

    >>> unmark_labels(np.array([-101, -100, -101, -1015, 8]))
    array([-100, -100, -100,    7,    8])
    """
    marked = labels < IGNORE
    if not marked.any():
        return labels
    targets = labels <= TARGET_MARK
    unknown = marked & ~targets & (labels < IGNORED_MARK - 1)
    if unknown.any():
        raise ValueError(
            f"`labels` must be token ids, {IGNORE} or block marks, got {labels[unknown][0]}. "
            f"Set ignored ones to {IGNORE}."
        )
    return np.where(targets, (TARGET_MARK - labels) >> 1, np.where(marked, IGNORE, labels))


def blocks_from_labels(labels: np.ndarray, seq_lengths: np.ndarray | None = None) -> Blocks:
    """Read the blocks out of labels: at the marks where a document has any, else at every change of ignored to target.

    Ignored text after the last target (a template's line end) belongs to the block before it: a skip there would train
    nothing. The first token of a document begins a block even where packing or truncation has cut its mark off; it is
    then an instruction if it is ignored, a response if not.

    Args:
        labels: int64 `(n,)`.
        seq_lengths: int64 `(documents,)` of documents in a row; `None` for a single one.

    Returns:
        The [`Blocks`] of all documents; no block crosses a document's end.

    Example:

    >>> blocks_from_labels(np.array([-100, -100, 5, 6, -100, 7, -100]))
    Blocks(lengths=array([2, 2, 1, 2]), response=array([False,  True, False,  True]))
    >>> blocks_from_labels(np.array([-101, -100, -101, -1015, 8]))
    Blocks(lengths=array([2, 1, 2]), response=array([False, False,  True]))
    """
    documents = np.array([labels.size]) if seq_lengths is None else seq_lengths
    document_ends = np.cumsum(documents)
    document_starts = document_ends - documents
    ignored = labels == IGNORE
    begins = np.empty(labels.size, dtype=bool)
    begins[1:] = ignored[1:] != ignored[:-1]
    begins[document_starts] = True
    starts = begins.nonzero()[0]
    last = starts[np.searchsorted(starts, document_ends) - 1]
    begins[last] = ~ignored[last] | (last == document_starts)
    marks = labels < IGNORE
    if marks.any():
        has_marks = np.logical_or.reduceat(marks, document_starts)
        begins = np.where(np.repeat(has_marks, documents), marks, begins)
        begins[document_starts] = True
    starts = begins.nonzero()[0]
    return Blocks(np.diff(starts, append=labels.size), _response_at(labels[starts]))


def _response_at(first: np.ndarray) -> np.ndarray:
    """Whether blocks are responses, by the label of their first token: a mark says so, else a target does."""
    by_mark = np.where(first <= TARGET_MARK, (TARGET_MARK - first) & 1 == 1, first == IGNORED_MARK - 1)
    return np.where(first < IGNORE, by_mark, first != IGNORE)


def block_response(labels: ArrayLike, lengths: np.ndarray, seq_lengths: np.ndarray | None = None) -> np.ndarray:
    """Say which blocks of a `block_lengths` column are responses: those whose last token is a target.

    A document without ignored labels (plain language modelling) tells nothing; its blocks alternate ([`alternate`]).

    Args:
        labels: int64 `(n,)` without marks.
        lengths: int64 `(blocks,)`, adding up to n.
        seq_lengths: int64 `(documents,)` of documents in a row, each ending with a block; `None` for a single one.

    Returns:
        bool `(blocks,)`.

    Raises:
        ValueError: block lengths that do not add up.

    Example:

    >>> block_response([-100, -100, -100, 7, 8], np.array([2, 1, 2]))
    array([False, False,  True])
    >>> block_response([5, 6, 7], np.array([2, 1]))
    array([False,  True])
    """
    targets = np.asarray(labels, dtype=np.int64) != IGNORE
    lengths = as_lengths("block_lengths", lengths, total=targets.size)
    documents = np.array([targets.size]) if seq_lengths is None else seq_lengths
    document_starts = np.cumsum(documents) - documents
    ends = np.cumsum(lengths)
    response = targets[ends - 1]
    silent = np.logical_and.reduceat(targets, document_starts)
    if silent.any():
        first_block = np.searchsorted(ends - lengths, document_starts)
        counts = np.diff(first_block, append=lengths.size)
        rank = np.arange(lengths.size) - np.repeat(first_block, counts)
        response = np.where(np.repeat(silent, counts), rank % 2 == 1, response)
    return response


def blocks_from_offsets(token_offsets: ArrayLike, cuts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Turn cuts between characters into blocks of tokens.

    A cut at character c begins a block at the first token that ends after c, so a token across the cut belongs to the
    later block. Tokens without characters (special tokens: an offset pair of equal numbers) begin no block. Of cuts
    that fall on one token the last one stays; a cut after the last token is left out.

    Args:
        token_offsets: int `(n, 2)` character span of each token, a fast tokenizer's `offset_mapping`.
        cuts: characters at which blocks begin, ascending.

    Returns:
        Block lengths int64 `(blocks,)`, and int64 `(blocks,)` what begins each block: 0 for the start of the text, k
        for `cuts[k - 1]`.

    Raises:
        ValueError: no tokens, or cuts that are not ascending.

    Example: "ab cd ef" as a start token and three words; cuts before "cd", inside it, and at the end.

    >>> blocks_from_offsets([(0, 0), (0, 2), (3, 5), (6, 8)], [3, 4, 8])
    (array([2, 2]), array([0, 2]))
    """
    offsets = np.asarray(token_offsets, dtype=np.int64).reshape(-1, 2)
    if not len(offsets):
        raise ValueError("`token_offsets` must hold at least one token, got none. Leave empty samples out.")
    where = np.asarray(cuts, dtype=np.int64)
    if (np.diff(where) < 0).any():
        raise ValueError(f"`cuts` must be ascending, got {list(cuts)!r}. Sort them.")
    ends = np.maximum.accumulate(np.where(offsets[:, 1] > offsets[:, 0], offsets[:, 1], 0))
    starts = np.concatenate(([0], np.searchsorted(ends, where, side="right")))
    last = np.append(starts[1:] != starts[:-1], True)
    kept = (last & (starts < len(offsets))).nonzero()[0]
    return np.diff(starts[kept], append=len(offsets)), kept
