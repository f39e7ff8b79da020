"""LongBench's metrics of one answer against one reference, 0 to 1, with the published script's numbers.

Source: https://github.com/THUDM/LongBench, `metrics.py` (MIT). Its oddities are part of the numbers and are kept; each
is named where it stands. Chinese texts are cut into words before they come here, see `chinese`.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_words(text: str) -> list[str]:
    """Return the words of an English text in lower case, without ASCII punctuation and articles.

    Example:

    >>> normalized_words("The U.S. won a match, 3-1!")
    ['us', 'won', 'match', '31']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of the answer's tokens, repeated ones counted.

    Example: one of two tokens is right, and it is one of the reference's three: 2 * (1/2 * 1/3) / (1/2 + 1/3).

    >>> token_f1(["blue", "whale"], ["the", "big", "whale"])
    0.4
    """
    same = sum((Counter(answer) & Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, reference: str) -> float:
    """Return the F1 of the answer's normalised words.

    Example:

    >>> qa_f1("It was the Georgia Peach.", "Georgia Peach") == 2 * (2 / 4 * 1) / (2 / 4 + 1)
    True
    """
    return token_f1(normalized_words(answer), normalized_words(reference))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """Return 1 over the number of classes the answer names, if the right one is among them, else 0.

    A class whose name is part of the right one's name is not held against the answer; but the script skips the class
    that follows each one it takes out, so the second of two such neighbours is.

    Example:

    >>> classes = ["Date", "City", "Big City"]
    >>> classification("Big City", "Big City", classes), classification("Date or City", "City", classes)
    (1.0, 0.5)
    """
    named = [label for label in classes if label in answer]
    position = 0
    while position < len(named):
        if named[position] in reference and named[position] != reference:
            named.remove(named[position])
        position += 1
    return 1 / len(named) if reference in named else 0.0


def number_share(answer: str, number: str) -> float:
    """Return the share of the numbers in an answer that are the right one, written alike; 0 without numbers.

    Example:

    >>> number_share("Paragraph 12, not 11", "12"), number_share("none", "12"), number_share("012", "12")
    (0.5, 0.0, 0.0)
    """
    numbers = _NUMBER.findall(answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str, *, word: str) -> float:
    """Return the share of the numbers in an answer that are the number of the right paragraph.

    Args:
        answer: the model's.
        reference: holds `word` and a number, such as "Paragraph 12".
        word: "Paragraph ", or "段落" in Chinese.

    Raises:
        ValueError: the reference has no such number.

    Example:

    >>> retrieval("It is 12.", "Paragraph 12", word="Paragraph ")
    1.0
    """
    found = re.search(re.escape(word) + r"(\d+)", reference)
    if found is None:
        raise ValueError(f"`answers` must hold {word!r} and a number, got {reference!r}. Set it to '{word}1', say.")
    return number_share(answer, found[1])


def code_similarity(answer: str, reference: str) -> float:
    """Return the similarity of the answer's first line of code to the reference, in hundredths.

    The first line is the first one, after leading line breaks, without "`", "#" or "//"; it may be blank. The
    published script takes `fuzz.ratio` of fuzzywuzzy, which is difflib's ratio in full percent, and another measure
    where python-Levenshtein happens to be installed too (https://github.com/THUDM/LongBench/issues/96). Here it is
    difflib's, what the script's own imports give.

    Example:

    >>> code_similarity("# add\\nreturn a + b\\n", "return a + c"), code_similarity("x", "")
    (0.92, 0.0)
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100
