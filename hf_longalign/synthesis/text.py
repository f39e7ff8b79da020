"""What two texts are compared by: normalised text, words, content words, and a stable digest."""

import hashlib
import re
import unicodedata


_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d)")
_NOT_WORD = re.compile(r"[^\w]+")
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_ARTICLES = frozenset(("a", "an", "the"))
_FUNCTION_WORDS = """
about after all also and any are been both but can did does each for from had has have her his how into its many more
most much not one other our out she some such than that their them then there these they this those was were what when
where which who whom whose why will with would you your
"""
_NO_CONTENT = frozenset(_FUNCTION_WORDS.split())


def normalise(text: str) -> str:
    """Return `text` as an answer is compared: folded case and accents, no punctuation, no articles, single blanks.

    Example:

    >>> normalise("The  Café had 26,977 guests.")
    'cafe had 26977 guests'
    """
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(char for char in decomposed if not unicodedata.combining(char))
    plain = _NOT_WORD.sub(" ", _DIGIT_COMMA.sub("", plain))
    return " ".join(word for word in plain.split() if word not in _ARTICLES)


def content_words(text: str) -> set[str]:
    """Return the words of `text` that carry meaning: numbers, and longer words that are no function words.

    Example:

    >>> sorted(content_words("Who was the oldest of the 12 orphans?"))
    ['12', 'oldest', 'orphans']
    """
    words = set(normalise(text).split())
    return {word for word in words if word.isdigit() or (len(word) > 2 and word not in _NO_CONTENT)}


def digest(*parts: str, size: int = 8) -> str:
    """Return a hex digest of the parts, the same on every machine.

    Example:

    >>> digest("a", "b") == digest("ab")
    False
    """
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def word_count(text: str) -> int:
    """Return the number of words; a character of a script without blanks (Chinese, Japanese, Thai) counts as half one.

    Example:

    >>> word_count("A dam, built in 1912."), word_count("水坝建于一九一二年")
    (5, 4)
    """
    unspaced = len(_UNSPACED.findall(text))
    return len(_UNSPACED.sub(" ", text).split()) + unspaced // 2
