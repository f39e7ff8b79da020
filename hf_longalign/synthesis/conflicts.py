"""Which contexts must not stand beside a gold one: those a reader could take for the source of the instruction."""

from collections import Counter
from collections.abc import Collection, Iterable
from math import log

from hf_longalign.text import content_words


# Over 450 published seeds of 2WikiMQA, HotpotQA and MuSiQue the median gold context covers 0.82 to 1.0 of its
# instruction, and 0.02 % or less of the other contexts of a task cover 0.8: those that share what it asks for.
COVERAGE = 0.8


class Rivals:
    """Tells whether a context holds what an instruction asks for, by the rare words they share.

    Args:
        texts: contexts to learn from how rare a word is; some thousand are enough.

    Example:

    >>> rivals = Rivals(["the dam of Thornwick", "the dam of Ashby", "a film by Ada"])
    >>> rivals.covers("Who built the dam of Ashby?", content_words("the Ashby dam, built by Eve"))
    True
    >>> rivals.covers("Who built the dam of Ashby?", content_words("the Thornwick dam, built by Eve"))
    False
    """

    def __init__(self, texts: Iterable[str]):
        self._documents = 0
        self._frequency: Counter[str] = Counter()
        for text in texts:
            self._documents += 1
            self._frequency.update(content_words(text))

    def weight(self, word: str) -> float:
        """Inverse document frequency of a word; 0 for one that every text holds."""
        return log((self._documents + 1) / (self._frequency[word] + 1))

    def covers(self, instruction: str, words: Collection[str]) -> bool:
        """Whether `words` hold most of what `instruction` asks for. An instruction of common words alone is covered.

        Args:
            instruction: what is asked.
            words: the content words of a context.
        """
        # Sorted, because a sum of floats depends on its order and the order of a set on the process.
        asked = sorted(content_words(instruction))
        total = sum(self.weight(word) for word in asked)
        return sum(self.weight(word) for word in asked if word in words) >= COVERAGE * total
