"""Where the blocks of a sample begin: told by its labels, a `block_lengths` column, or where its parts begin.

A block is a run of tokens that belong together: an instruction, a response, one context of an instruction.
Blocks travel beside the tokens in a column of one small number per token, so that truncation and packing cut both
alike and a cut block still knows what it is:

| value | the token is in |
| --- | --- |
| 0, 1 | an instruction block; neighbours differ |
| 2, 3 | a response block; neighbours differ |

Only NumPy. Arrays of several documents in a row (a packed row, a batch) take their lengths as `seq_lengths`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


IGNORE = -100


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


def blocks_to_column(blocks: Blocks) -> np.ndarray:
    """Write blocks as one number per token, int8 `(n,)`; see the table at the top.

    >>> blocks_to_column(Blocks(np.array([2, 1, 2]), np.array([False, False, True])))
    array([0, 0, 1, 2, 2], dtype=int8)
    """
    values = 2 * blocks.response + np.arange(blocks.lengths.size) % 2
    return np.repeat(values.astype(np.int8), blocks.lengths)


def blocks_from_column(column: np.ndarray, seq_lengths: np.ndarray | None = None) -> Blocks:
    """Read the blocks that [`blocks_to_column`] has written, whatever was cut off before or behind.

    Args:
        column: int `(n,)`.
        seq_lengths: int64 `(documents,)` of documents in a row; `None` for a single one.

    Returns:
        The [`Blocks`] of all documents; no block crosses a document's end.

    Raises:
        ValueError: a value that is not from 0 to 3.

    Example:

    >>> blocks_from_column(np.array([0, 1, 2, 2, 2, 0, 3]), np.array([4, 3]))
    Blocks(lengths=array([1, 1, 2, 1, 1, 1]), response=array([False, False,  True,  True, False,  True]))
    """
    if column.size and not 0 <= column.min() <= column.max() <= 3:
        raise ValueError(
            f"`blocks` must be numbers from 0 to 3, got {column.min()} to {column.max()}. Call a column of your own "
            "`block_lengths`, with the tokens of each block."
        )
    begins = _changes(column, seq_lengths)
    starts = begins.nonzero()[0]
    return Blocks(np.diff(starts, append=column.size), column[starts] >= 2)


def blocks_as_prepared(values: ArrayLike, tokens: int) -> Blocks:
    """Read the `blocks` of a row of so many tokens that was prepared before.

    Raises:
        ValueError: they are not one number from 0 to 3 for each token.

    >>> blocks_as_prepared([0, 0, 2], 3)
    Blocks(lengths=array([2, 1]), response=array([False,  True]))
    """
    column = np.asarray(values)
    if column.dtype.kind not in "iu" or column.shape != (tokens,):
        raise ValueError(
            f"`blocks` must be one whole number for each of the {tokens} tokens of a row, as its preparation makes "
            f"them, got {column.dtype} of shape {column.shape}. Take the column out, and blocks are found anew."
        )
    return blocks_from_column(column)


def _changes(values: np.ndarray, seq_lengths: np.ndarray | None) -> np.ndarray:
    """Bool `(n,)`: where a document begins or the value differs from the one before."""
    begins = np.ones(values.size, dtype=bool)
    begins[1:] = values[1:] != values[:-1]
    if seq_lengths is not None:
        begins[np.cumsum(seq_lengths) - seq_lengths] = True
    return begins


def blocks_from_labels(labels: np.ndarray, seq_lengths: np.ndarray | None = None) -> Blocks:
    """Read the blocks off the labels: one begins at every change of ignored to target, and is a response if it is one.

    Ignored text after the last target (a template's line end) belongs to the block before it: a skip there would train
    nothing.

    Args:
        labels: int64 `(n,)`, token ids and -100.
        seq_lengths: int64 `(documents,)` of documents in a row; `None` for a single one.

    Returns:
        The [`Blocks`] of all documents; no block crosses a document's end.

    Example:

    >>> blocks_from_labels(np.array([-100, -100, 5, 6, -100, 7, -100]))
    Blocks(lengths=array([2, 2, 1, 2]), response=array([False,  True, False,  True]))
    """
    documents = np.array([labels.size]) if seq_lengths is None else seq_lengths
    ends = np.cumsum(documents)
    ignored = labels == IGNORE
    begins = _changes(ignored, seq_lengths)
    starts = begins.nonzero()[0]
    last = starts[np.searchsorted(starts, ends) - 1]
    begins[last] = ~ignored[last] | (last == ends - documents)
    starts = begins.nonzero()[0]
    return Blocks(np.diff(starts, append=labels.size), ~ignored[starts])


def block_response(labels: ArrayLike, lengths: np.ndarray, seq_lengths: np.ndarray | None = None) -> np.ndarray:
    """Say which blocks of a `block_lengths` column are responses: those whose last token is a target.

    A document without ignored labels (plain language modelling) tells nothing; its blocks alternate as in SkipAlign's
    sample (https://arxiv.org/abs/2405.03939): instruction, response, instruction, response.

    Args:
        labels: int64 `(n,)`, token ids and -100.
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


def blocks_at(tokens: ArrayLike, response: ArrayLike, total: int) -> Blocks:
    """Make blocks of the tokens that they begin at.

    The text before the first one is an instruction. Of two that begin at one token the later stays, and none begins
    behind the last token.

    Args:
        tokens: int `(k,)`, ascending.
        response: bool `(k,)`.
        total: tokens of the sample, at least 1.

    Example: one block at token 2, two at token 3, one past the end.

    >>> blocks_at([2, 3, 3, 5], [False, False, True, False], total=5)
    Blocks(lengths=array([2, 1, 2]), response=array([False, False,  True]))
    """
    starts = np.concatenate(([0], np.asarray(tokens, dtype=np.int64)))
    flags = np.concatenate(([False], np.asarray(response, dtype=bool)))
    kept = np.append(starts[1:] != starts[:-1], True) & (starts < total)
    return Blocks(np.diff(starts[kept], append=total), flags[kept])
