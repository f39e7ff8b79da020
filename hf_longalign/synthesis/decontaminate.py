"""Decontamination: seeds and contexts that share an n-gram of words with an evaluation file are cut."""

from collections.abc import Iterable, Iterator
from typing import Any

from hf_longalign.synthesis.rows import Row, read_rows
from hf_longalign.text import normalise


class Contamination:
    """The n-grams of evaluation data.

    Args:
        sources: evaluation files or Hub data sets, read as `read_rows` does. Every string of every row counts, also
            inside lists and dicts.
        ngram: words in a row that make an overlap; 13 by default, as in GPT-3 (https://arxiv.org/abs/2005.14165).
            A string of the evaluation data with fewer words, but at least `shortest`, counts as a whole: most
            questions are shorter than 13 words.
        shortest: strings of fewer words overlap with nothing: "yes" and "in 1912" contaminate nobody.

    Raises:
        BadRowError: a row of an evaluation file cannot be read.

    Example:

    >>> known = Contamination([[{"input": "Who finished the dam below Thornwick in 1912?"}]])
    >>> known.overlap("who finished the dam, below Thornwick, in 1912")
    ('who finished dam below thornwick in 1912', 'seeds:1')
    >>> known.overlap("Who finished the dam?") is None
    True
    """

    def __init__(self, sources: Iterable[Any], ngram: int = 13, shortest: int = 6):
        if ngram < 1:
            raise ValueError(f"`decontaminate_ngram` must be at least 1, got {ngram!r}. 13 is usual.")
        self._lengths: set[int] = set()
        self._grams: dict[str, str] = {}
        for source in sources:
            for row in read_rows(source):
                self._add(row, ngram, shortest)

    def __len__(self) -> int:
        return len(self._grams)

    def _add(self, row: Row, ngram: int, shortest: int) -> None:
        if row.fault:
            raise row.fault
        for text in _strings(row.values):
            words = normalise(text).split()
            length = min(ngram, len(words))
            if length < min(ngram, shortest):
                continue
            self._lengths.add(length)
            for gram in _grams(words, length):
                self._grams.setdefault(gram, row.origin)

    def overlap(self, text: str) -> tuple[str, str] | None:
        """Return the first shared n-gram and where it stands in the evaluation data, or `None`."""
        words = normalise(text).split()
        for length in sorted(self._lengths):
            for gram in _grams(words, length):
                place = self._grams.get(gram)
                if place is not None:
                    return gram, place
        return None


def _grams(words: list[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)
