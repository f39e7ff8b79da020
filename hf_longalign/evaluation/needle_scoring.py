"""Scoring answers to needle prompts: which of the expected values an answer names, and whether it names only those."""

import re
import unicodedata
from collections.abc import Sequence

from hf_longalign.evaluation.haystack import UNSPACED
from hf_longalign.evaluation.prompt import Prompt


_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:[,.'’_ \u00a0\u2009\u202f]\d{3})+(?!\d)")
_DIGITS = re.compile(r"\d+")
_UNSPACED = re.compile(f"[{UNSPACED}]")


def score_needle(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return the scores of an answer, 0 to 1.

    `recall` is the share of the expected values that the answer names, as whole words or numbers. `exact_match` is 1
    where it names all of them and, if they are numbers, no other number with as many digits: listing every number
    of the text is no answer. Whether it names wrong values that are no numbers cannot be told. Case does not count,
    nor does how a character is composed or in which script digits are; 1,234,567 and 1 234 567 are 1234567.

    Args:
        prompt: `answers` are the values.
        answer: what the model said.

    Example:

    >>> prompt = Prompt("needle", "multi_value", 0, "Which codes?", ("1234567", "7654321"), 8)
    >>> score_needle(prompt, "They are 7654321 and 1,234,567.")
    {'exact_match': 1.0, 'recall': 1.0}
    >>> score_needle(prompt, "1234567, 7777777")
    {'exact_match': 0.0, 'recall': 0.5}
    """
    expected = {_fold(value) for value in prompt.answers}
    numbers = {value for value in expected if _is_number(value)}
    text = _ungroup(_fold(answer), {len(value) for value in numbers})
    found = {value for value in expected if _names(text, value)}
    wrong = {number for number in _DIGITS.findall(text) if len(number) in {len(value) for value in numbers}} - numbers
    return {"exact_match": float(found == expected and not wrong), "recall": len(found) / len(expected)}


def overlap(values: Sequence[str]) -> tuple[str, str] | None:
    """Return a value that another one, also returned, names; `None` where each can be told from the others.

    >>> overlap(["red", "dark blue", "Dark Red"])
    ('red', 'Dark Red')
    """
    folded = [_fold(value) for value in values]
    for index, value in enumerate(folded):
        for other_index, other in enumerate(folded):
            if index != other_index and _names(other, value):
                return values[index], values[other_index]
    return None


def _names(text: str, value: str) -> bool:
    """Whether a folded text holds a folded value as a whole word or number."""
    start = text.find(value)
    while start >= 0:
        end = start + len(value)
        if not _continues(text[start - 1 : start], value[0]) and not _continues(text[end : end + 1], value[-1]):
            return True
        start = text.find(value, start + 1)
    return False


def _continues(neighbour: str, edge: str) -> bool:
    """Whether the character beside a value makes a longer word or number of it."""
    if not neighbour or _UNSPACED.match(edge) or _UNSPACED.match(neighbour):
        return False
    if edge.isdecimal():
        return neighbour.isdecimal()
    kinds = unicodedata.category(edge)[0] + unicodedata.category(neighbour)[0]
    return kinds[0] in "LMN" and kinds[1] in "LMN"


def _fold(text: str) -> str:
    """One form for case, composed characters, and the digits of any script."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).strip()
    return folded if folded.isascii() else re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), folded)


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _ungroup(text: str, lengths: set[int]) -> str:
    """Take the marks between thousands out of numbers that then have one of the lengths."""

    def plain(match: re.Match[str]) -> str:
        digits = "".join(_DIGITS.findall(match[0]))
        return digits if len(digits) in lengths else match[0]

    return _GROUPED.sub(plain, text)
