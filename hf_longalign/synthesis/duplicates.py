"""Near-duplicates among contexts, by MinHash over word 5-grams (datasketch)."""

from collections.abc import Sequence
from typing import Any

from hf_longalign.synthesis.extras import require
from hf_longalign.text import normalise


_PERMUTATIONS = 128
_SHINGLE = 5


def find_duplicates(texts: Sequence[str], threshold: float = 0.8) -> dict[int, int]:
    """Return, for each text that nearly repeats an earlier one, its index and the index of that earlier one.

    Args:
        texts: the texts, in the order in which the first of a kind is kept.
        threshold: share of common 5-grams (estimated Jaccard similarity) from which two texts count as the same.

    Example:

    >>> find_duplicates(["the dam was built in 1912 by Ada", "no", "The dam was built in 1912, by Ada!"])
    {2: 0}
    """
    datasketch = require("datasketch")
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
    sketches: dict[int, Any] = {}
    found: dict[int, int] = {}
    for number, text in enumerate(texts):
        sketch = datasketch.MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch(_shingles(text))
        earlier = [other for other in sorted(index.query(sketch)) if sketch.jaccard(sketches[other]) >= threshold]
        if earlier:
            found[number] = earlier[0]
        else:
            sketches[number] = sketch
            index.insert(number, sketch)
    return found


def _shingles(text: str) -> list[bytes]:
    words = normalise(text).split()
    count = max(1, len(words) - _SHINGLE + 1)
    return [" ".join(words[start : start + _SHINGLE]).encode() for start in range(count)]
