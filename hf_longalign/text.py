"""Text from outside made safe, and what two texts are compared by: words, sentences, F1, digests.

Scripts without blanks between words, and Korean, whose endings stick to the word, are compared by characters: a word
of theirs can be told only with a dictionary, and a dictionary for each language is more than a comparison needs.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence


# Written without blanks: Thai, Lao, Myanmar, Khmer, Japanese, Chinese.
_NO_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# The inside of a regular expression's class: the scripts that are compared by characters.
UNSPACED = _NO_BLANKS + "\u1100-\u11ff\uac00-\ud7af"

_NO_BLANKS_CHARACTER = re.compile(f"[{_NO_BLANKS}]")
# Vowel signs and tones of Indic and Southeast Asian scripts. Python's \w leaves them out, and words would fall apart.
_SIGNS = "".join(chr(code) for code in range(0x0900, 0x1900) if unicodedata.category(chr(code))[0] == "M")
# A character that makes a longer word of one beside it.
_IN_WORD = rf"(?:[^\W_{UNSPACED}]|[{_SIGNS}])"
_CHARACTER = re.compile(f"[{UNSPACED}][{_SIGNS}]*")
# Accents that a comparison ignores: Latin, Greek and Cyrillic ones, Hebrew points, Arabic vowels.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670]+"
)
# Thai, Lao, Myanmar and Khmer are written with letters, of which every text holds most pairs.
_LETTERS = re.compile("[\u0e00-\u17ff]")
_GRAM = {False: 2, True: 4}
_FOREIGN_NOT_WORD = re.compile(f"[^\\x00-\\x7f\\w{_SIGNS}]+")
_NOT_WORD = re.compile(f"[^\\w{_SIGNS}]+")
# Most texts are ASCII, and `translate` is four times as fast there as a regular expression.
_ASCII_NOT_WORD = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) == "_")}
# Led by the comma, which is rarer than a digit: ten times as fast as `(?<=\d),(?=\d)`.
_DIGIT_COMMA = re.compile(r",(?<=\d,)(?=\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_FUNCTION_WORDS = """
about after all also and any are been both but can did does each for from had has have her his how into its many more
most much not one other our out she some such than that their them then there these they this those was were what when
where which who whom whose why will with would you your
"""
_NO_CONTENT = frozenset(_FUNCTION_WORDS.split())
# Chinese and Japanese characters that mostly stand for grammar: a pair of characters with one of them tells little.
_CHINESE_PARTICLES = "的了是在和與与及或也就都而被把这這那你我他她它们們个個之其"
_PARTICLES = frozenset(_CHINESE_PARTICLES + "のはをにがでとももへやかられたしてるいう")

_SENTENCE_END = re.compile(
    r"[.!?…؟۔।]+[\"'”’»)\]*_]*(?=\s|$)|[。！？｡]+[\"”’」』）】〉》]*|[!?…]+[」』）】〉》]+", re.MULTILINE
)
_LAST_WORD = re.compile(r"([^\W\d_]+|\b\d{1,2})\.$")
_SHORT_FORMS = "al cf ch co dr ed eds etc fig inc jr lt ltd mr mrs ms no nos pp prof sr st vol vs"
_ABBREVIATIONS = frozenset(_SHORT_FORMS.split())


def clean(text: str) -> str:
    """Return text from outside as it can be stored and sent anywhere: no NUL bytes, no half characters.

    JSON may hold one half of a character of two (a lone surrogate, `"\\ud83d"`), which neither UTF-8 nor SQLite nor
    Parquet can write; it becomes the replacement character. Both halves in a row become the character they mean.

    Example:

    >>> clean("a dam\\ud83d\\0") == "a dam\\N{REPLACEMENT CHARACTER}", clean("\\ud83d\\ude00") == "\\N{GRINNING FACE}"
    (True, True)
    """
    if "\0" in text:
        text = text.replace("\0", "")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # UTF-16 is made of halves: two that belong together become one character, one alone is replaced.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def normalise(text: str) -> str:
    """Return `text` as an answer is compared: folded case and accents, no punctuation, no articles, single blanks.

    Characters of scripts without blanks, and of Korean, stand as words of their own: so a phrase is found inside a
    sentence, see [`holds`].

    Example:

    >>> normalise("The  Café had 26,977 guests."), normalise("水坝建于1912年。")
    ('cafe had 26977 guests', '水 坝 建 于 1912 年')
    """
    plain = text.casefold()
    if not plain.isascii():
        # Composed again at the end: decomposed, a syllable of Korean is several characters, and か differs from が.
        plain = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFKD", plain)))
        plain = _FOREIGN_NOT_WORD.sub(" ", plain)
    plain = _DIGIT_COMMA.sub("", plain)
    if plain.isascii():
        plain = plain.translate(_ASCII_NOT_WORD)
    else:
        plain = _NOT_WORD.sub(" ", _CHARACTER.sub(r" \g<0> ", plain))
    return " ".join(word for word in plain.split() if word not in _ARTICLES)


def holds(text: str, phrase: str) -> bool:
    """Return whether a normalised text holds a normalised phrase, whole words only.

    Example:

    >>> holds(normalise("The dams of Ashby."), normalise("dam")), holds(normalise("他住在北京。"), normalise("北京"))
    (False, True)
    """
    # With a blank at each end, so that words at the ends of the text are found, and parts of words nowhere.
    return f" {phrase} " in f" {text} "


def fold(text: str) -> str:
    """One form for case, composed characters, and the digits of any script."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).strip()
    return folded if folded.isascii() else re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), folded)


def whole_word(value: str) -> str:
    """Return a pattern that finds a folded value as a whole word or number in a folded text.

    >>> [bool(re.search(whole_word("art"), text)) for text in ("state of the art", "party")]
    [True, False]
    """
    # Where words stand side by side without a blank, and beside signs, every place is an edge: `(?!)` matches nothing.
    before, after = (
        r"\d" if edge.isdecimal() else _IN_WORD if re.match(_IN_WORD, edge) else "(?!)"
        for edge in (value[0], value[-1])
    )
    return f"(?<!{before}){re.escape(value)}(?!{after})"


def content_words(text: str) -> set[str]:
    """Return the words of `text` that carry meaning: numbers, and longer words that are no function words.

    In scripts that are compared by characters, pairs of neighbours stand for words; four where characters are letters.

    Example:

    >>> sorted(content_words("Who was the oldest of the 12 orphans?")), sorted(content_words("北京的大学"))
    (['12', 'oldest', 'orphans'], ['北京', '大学'])
    """
    return content_of(normalise(text))


def content_of(normalised: str) -> set[str]:
    """Return the content words of a text that is normalised already, see [`content_words`]."""
    words = normalised.split()
    found = {word for word in set(words) if word.isdigit() or (len(word) > 2 and word not in _NO_CONTENT)}
    if normalised.isascii():
        return found
    lengths = [_GRAM[bool(_LETTERS.match(word))] if _CHARACTER.match(word) else 0 for word in words]
    found -= {word for word, length in zip(words, lengths, strict=True) if length}
    for place, length in enumerate(lengths):
        gram = words[place : place + length]
        if length and lengths[place : place + length] == [length] * length and not _PARTICLES.intersection(gram):
            found.add("".join(gram))
    return found


def word_count(text: str) -> int:
    """Return the number of words; a character of a script without blanks (Chinese, Japanese, Thai) counts as half one.

    Example:

    >>> word_count("A dam, built in 1912."), word_count("水坝建于一九一二年")
    (5, 4)
    """
    if text.isascii():
        return len(text.split())
    return len(_NO_BLANKS_CHARACTER.sub(" ", text).split()) + len(_NO_BLANKS_CHARACTER.findall(text)) // 2


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of the answer's tokens, repeated ones counted.

    Source: SQuAD, https://arxiv.org/abs/1606.05250.

    Example: one of two tokens is right, and it is one of the reference's three: 2 * (1/2 * 1/3) / (1/2 + 1/3).

    >>> token_f1(["blue", "whale"], ["the", "big", "whale"])
    0.4
    """
    same = sum((Counter(answer) & Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def sentence_ends(text: str) -> list[int]:
    """Return where sentences end, as offsets behind their last mark, closing quotes included.

    A sentence ends at a full stop, question or exclamation mark that no small letter follows and that does not belong
    to an abbreviation, an initial or the number of a list.

    Example:

    >>> sentence_ends("Mr. Fox came at 5 p.m. and sat. 他来了。然后"), sentence_ends("In the")
    ([31, 36], [])
    """
    found = []
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        follower = text[end : end + 2].strip()[:1]
        last = _LAST_WORD.search(text[max(0, end - 12) : end])
        short = last and (len(last[1]) == 1 or last[1].isdigit() or last[1].lower() in _ABBREVIATIONS)
        # At the very end of a text there is nothing that a short form could belong to.
        if not follower.islower() and not (short and follower):
            found.append(end)
    return found


def digest(*parts: str, size: int = 8) -> str:
    """Return a hex digest of the parts, the same on every machine; `size` is in bytes.

    Example:

    >>> digest("a", "b") == digest("ab")
    False
    """
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        # Its length first: the same letters cut in other places are other parts.
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
