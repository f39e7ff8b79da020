"""In which order prompts are read so that they share most, and which of them are answered together. Only NumPy."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np


T = TypeVar("T")


def reading_order(prompts: Sequence[np.ndarray]) -> list[int]:
    """Return the order in which each prompt follows the one it shares its longest beginning with.

    Sorted as words are: what shares a beginning stands together, so reading one after the other and going back to
    where they part reads every shared token once.

    Args:
        prompts: int `(tokens,)` each.

    Example:

    >>> reading_order([np.array([7, 8, 9]), np.array([1, 2]), np.array([7, 8, 300]), np.array([7, 8])])
    [1, 3, 0, 2]
    """
    words = [ids.astype(">u4").tobytes() for ids in prompts]  # big-endian bytes sort as the numbers do
    return sorted(range(len(words)), key=words.__getitem__)


def shared_lengths(ordered: Sequence[np.ndarray]) -> list[int]:
    """Return how many tokens each prompt shares with the one before it, at most all but its last token.

    The last one is always read, because its logits give the first token of the answer.

    >>> shared_lengths([np.array([1, 2]), np.array([7, 8]), np.array([7, 8, 9]), np.array([7, 8, 9])])
    [0, 0, 2, 2]
    """
    lengths = [0] if len(ordered) else []
    for before, ids in pairwise(ordered):
        most = min(before.size, ids.size - 1)
        parts = np.flatnonzero(before[:most] != ids[:most])
        lengths.append(int(parts[0]) if parts.size else most)
    return lengths


def branch_points(shared: Sequence[int], index: int) -> set[int]:
    """Return the lengths at which prompts after `index` leave what it has in common with them.

    Args:
        shared: see [`shared_lengths`].
        index: number of the prompt that is being read.

    >>> sorted(branch_points([0, 6, 8, 3, 5, 0, 9], 0))
    [3, 6]
    """
    points: set[int] = set()
    least = math.inf
    for length in shared[index + 1 :]:
        least = min(least, length)
        if not least:
            break
        points.add(int(least))
    return points


class Pools(Generic[T]):
    """Prompts that were read and wait to be answered together with others of about their length.

    Lengths of one pool differ by at most a fifth, so little of a batch is padding.

    Args:
        batch_tokens: what all that wait may take in tokens, padding included.

    Example:

    >>> pools = Pools(1000)
    >>> pools.add("a", 400), pools.add("b", 410), pools.add("c", 100)
    ([], [], [])
    >>> pools.add("d", 400)
    [['a', 'b']]
    >>> pools.empty()
    [['d'], ['c']]
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._pools: dict[int, list[tuple[T, int]]] = defaultdict(list)

    def add(self, item: T, tokens: int) -> list[list[T]]:
        """Let an item of so many tokens wait, and return the batches that must be answered first to make room."""
        name = round(4 * math.log2(tokens))
        leaving = []
        while self._pools and self._padded(name, tokens) > self.batch_tokens:
            leaving.append(self._pop())
        self._pools[name].append((item, tokens))
        return leaving

    def empty(self) -> list[list[T]]:
        """Return all batches that wait, the largest first."""
        return [self._pop() for _ in range(len(self._pools))]

    def _padded(self, name: int, tokens: int) -> int:
        """What all pools would take with one more item in the pool of that name."""
        others = sum(_cost(pool) for other, pool in self._pools.items() if other != name)
        return others + _cost([*self._pools.get(name, []), (None, tokens)])

    def _pop(self) -> list[T]:
        largest = max(self._pools, key=lambda name: _cost(self._pools[name]))
        return [item for item, _ in self._pools.pop(largest)]


def _cost(pool: Sequence[tuple[Any, int]]) -> int:
    return len(pool) * max(tokens for _, tokens in pool)
