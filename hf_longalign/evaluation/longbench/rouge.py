"""ROUGE-L as LongBench counts it: with the numbers of the PyPI package `rouge` 1.0.1, the one its script calls.

That package (https://github.com/pltrdy/rouge, Apache-2.0) has been left as it is since 2021 and walks back through its
table by recursion: a pair of sentences of about 1,000 words together exhausts Python's stack, which LongBench's script
then scores 0. Here such a pair gets what the formula gives.
"""

from collections.abc import Sequence


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L at summary level.

    Sentences end at "."; a piece of white space between or behind full stops counts as one empty word. Only distinct
    words count: those in any longest common subsequence of a sentence of the one and a sentence of the other, over
    those of the reference (recall) and of the answer (precision).

    Args:
        answer: the model's; without a word or white space beside full stops it scores 0.
        reference: likewise.

    Example: "the" and "sat" are common, the answer has 3 distinct words and the reference 4.

    >>> round(rouge_l("the dog sat", "the cat sat down"), 6) == round(2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4), 6)
    True
    """
    ours, theirs = _sentences(answer), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    common = {word for right in theirs for left in ours for word in _common_subsequence(right, left)}
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    precision = len(common) / len({word for sentence in ours for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest common subsequence, from its end; of several, the one the package finds."""
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
