"""LongBench's scores of an answer, 0 to 1, with the numbers of the published scripts.

Source: https://github.com/THUDM/LongBench, `metrics.py` and `eval.py` (MIT). Their oddities are part of the numbers
and are kept; each is named where it stands.
"""

import difflib
import logging
import re
import string
from collections.abc import Callable, Sequence

from hf_longalign.lazy import require
from hf_longalign.text import token_f1


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_CHOICE = re.compile(r"The correct answer is (?:\(([A-D])\)|([A-D]))")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# LongBench's list.
_CHINESE_PUNCTUATION = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    + "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def normalized_words(text: str) -> list[str]:
    """Return the words of an English text in lower case, without ASCII punctuation and articles.

    >>> normalized_words("The U.S. won a match, 3-1!")
    ['us', 'won', 'match', '31']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def chinese_words(text: str) -> list[str]:
    """Return the words of a Chinese text, punctuation and white space included.

    Raises:
        ImportError: jieba is missing.
    """
    jieba = require("jieba", "eval")
    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))


def qa_f1(answer: str, reference: str) -> float:
    """Return the F1 of the answer's normalised words.

    >>> qa_f1("It was the Georgia Peach.", "Georgia Peach") == 2 * (2 / 4 * 1) / (2 / 4 + 1)
    True
    """
    return token_f1(normalized_words(answer), normalized_words(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """Return the F1 of the answer's Chinese words, without punctuation and white space."""
    cleaned = [
        [
            "".join("".join(c for c in word.lower() if c not in _CHINESE_PUNCTUATION).split())
            for word in chinese_words(text)
        ]
        for text in (answer, reference)
    ]
    ours, theirs = ([word for word in words if word] for words in cleaned)
    return token_f1(ours, theirs)


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L at summary level, with the numbers of the PyPI package `rouge` 1.0.1.

    That is the package that LongBench's script calls (https://github.com/pltrdy/rouge, Apache-2.0).

    Example: "the" and "sat" are common, the answer has 3 distinct words and the reference 4.

    >>> round(rouge_l("the dog sat", "the cat sat down"), 6) == round(2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4), 6)
    True
    """
    # Sentences end at "."; a piece of white space between or behind full stops counts as one empty word.
    ours, theirs = _sentences(answer), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    # Only distinct words count: those in a longest common subsequence of some sentence of each.
    common = {word for right in theirs for left in ours for word in _common_subsequence(right, left)}
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    precision = len(common) / len({word for sentence in ours for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest common subsequence, from its end; of several, the one the package finds."""
    # The package walks back through its table by recursion: two sentences of about 1,000 words together exhaust
    # Python's stack, which the script then scores 0. Here such a pair gets what the formula gives.
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        table.append(row)
    found, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """Return 1 over the number of classes the answer names, if the right one is among them, else 0.

    >>> classes = ["Date", "City", "Big City"]
    >>> classification("Big City", "Big City", classes), classification("Date or City", "City", classes)
    (1.0, 0.5)
    """
    named = [label for label in classes if label in answer]
    # A class whose name is part of the right one's is not held against the answer. The script removes it from the list
    # that it walks through, and so skips the class behind each: the second of two such neighbours stays.
    position = 0
    while position < len(named):
        if named[position] in reference and named[position] != reference:
            named.remove(named[position])
        position += 1
    return 1 / len(named) if reference in named else 0.0


def number_share(answer: str, number: str) -> float:
    """Return the share of the numbers in an answer that are the right one, written alike; 0 without numbers.

    >>> number_share("Paragraph 12, not 11", "12"), number_share("none", "12"), number_share("012", "12")
    (0.5, 0.0, 0.0)
    """
    numbers = _NUMBER.findall(answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str, *, word: str) -> float:
    """Return the share of the numbers in an answer that are the number after `word` in the reference.

    Raises:
        ValueError: the reference has no such number.

    >>> retrieval("It is 12.", "Paragraph 12", word="Paragraph ")
    1.0
    """
    found = re.search(re.escape(word) + r"(\d+)", reference)
    if found is None:
        raise ValueError(f"`answers` must hold {word!r} and a number, got {reference!r}. Set it to '{word}1', say.")
    return number_share(answer, found[1])


def code_similarity(answer: str, reference: str) -> float:
    """Return the similarity of the answer's first line of code to the reference, in hundredths.

    >>> code_similarity("# add\\nreturn a + b\\n", "return a + c"), code_similarity("x", "")
    (0.92, 0.0)
    """
    # The script takes `fuzz.ratio` of fuzzywuzzy, difflib's ratio in full percent, and another measure where
    # python-Levenshtein happens to be installed too (https://github.com/THUDM/LongBench/issues/96). This is difflib's,
    # which the script's own imports give.
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def choice(answer: str, reference: str) -> float:
    """Return 1 where the answer names the right one of LongBench v2's choices in the words asked for, else 0.

    >>> choice("**The correct answer is (B).**", "B"), choice("It is B.", "B")
    (1.0, 0.0)
    """
    # The first letter in parentheses counts, else the first without: "The correct answer is Bern" names B, as there.
    found = _CHOICE.findall(answer.replace("*", ""))
    letters = [letter for letter, _ in found if letter] or [letter for _, letter in found]
    return float(letters[:1] == [reference])


# From the answer, a reference and all classes to a score from 0 to 1.
METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": lambda answer, reference, classes: qa_f1(answer, reference),
    "qa_f1_zh": lambda answer, reference, classes: qa_f1_zh(answer, reference),
    "rouge_l": lambda answer, reference, classes: rouge_l(answer, reference),
    "rouge_l_zh": lambda answer, reference, classes: rouge_l(
        " ".join(chinese_words(answer)), " ".join(chinese_words(reference))
    ),
    "classification": classification,
    "count": lambda answer, reference, classes: number_share(answer, reference),
    "retrieval": lambda answer, reference, classes: retrieval(answer, reference, word="Paragraph "),
    "retrieval_zh": lambda answer, reference, classes: retrieval(answer, reference, word="段落"),
    "code_similarity": lambda answer, reference, classes: code_similarity(answer, reference),
    "choice": lambda answer, reference, classes: choice(answer, reference),
}
