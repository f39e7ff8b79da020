"""What RULER's samples are made of: its thirteen tasks, its words, and questions from a file or invented here.

Source: https://github.com/NVIDIA/RULER, `synthetic.yaml` and `constants.py` (Apache-2.0). RULER takes SQuAD's and
HotpotQA's questions, which are downloads. The invented ones are of the same two kinds: a fact that one document tells,
and a fact that takes two documents.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hf_longalign.lazy import require
from hf_longalign.rows import read_jsonl


@dataclass(frozen=True)
class RulerTask:
    """A task of RULER."""

    name: str  # as in lm-eval
    kind: str  # "niah", "vt", "cwe", "fwe" or "qa"
    max_new_tokens: int  # room for the answer
    haystack: str = "noise"  # or "essay" or "needle" (niah)
    keys: str = "words"  # or "uuids" (niah)
    values: str = "numbers"  # or "uuids" (niah)
    n_keys: int = 1  # in the text (niah)
    n_values: int = 1  # of each key (niah)
    n_queries: int = 1  # keys asked for (niah)
    hops: int = 1  # evidence documents of a question (qa)


TASKS = {
    task.name: task
    for task in (
        RulerTask("niah_single_1", "niah", 128),
        RulerTask("niah_single_2", "niah", 128, "essay"),
        RulerTask("niah_single_3", "niah", 128, "essay", values="uuids"),
        RulerTask("niah_multikey_1", "niah", 128, "essay", n_keys=4),
        RulerTask("niah_multikey_2", "niah", 128, "needle"),
        RulerTask("niah_multikey_3", "niah", 128, "needle", keys="uuids", values="uuids"),
        RulerTask("niah_multivalue", "niah", 128, "essay", n_values=4),
        RulerTask("niah_multiquery", "niah", 128, "essay", n_keys=4, n_queries=4),
        RulerTask("ruler_vt", "vt", 30),
        RulerTask("ruler_cwe", "cwe", 120),
        RulerTask("ruler_fwe", "fwe", 50),
        RulerTask("ruler_qa_squad", "qa", 32),
        RulerTask("ruler_qa_hotpot", "qa", 32, hops=2),
    )
}

# The words around a sample, and how its answer begins.
TEMPLATES = {
    "niah": (
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text?",
        " The special magic {kind} for {query} mentioned in the provided text are",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned "
        "the value {query}, they are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa": (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. "
        "Only give me the answer and do not output any other words.\n\nQuestion: {query}",
        " Answer:",
    ),
}

_FIRST, _LAST, _PLACES, _ENDS, _TRADES, _RIVERS, _FOUNDERS = (
    words.split()
    for words in (
        "Ada Bruno Clara Dimas Edda Fabio Greta Hugo Ines Jonas Kaya Leon Mira Nils Olga Pavel Rita Sven Tilda Viktor",
        "Abend Brook Castell Dorn Elster Falk Grimm Holm Iversen Jarvis Kestrel Lund Marsh Nord Osten Pell Quill Rook",
        "Ash Birch Cold Deer Elm Fox Glen Hazel Iron Kings Lark Mill North Oak Pine Raven Stone Thorn Wind Yew",
        "brook combe dale ford gate ham hurst leigh mere minster mouth stead stow ton wick worth",
        "clockmaker botanist shipwright painter surveyor composer printer glazier physician architect",
        "Aln Bure Cade Doon Esk Fenn Gill Hodder Irt Jed Kyle Lune Mole Nairn Orr Rye Swale Tamar Wye",
        "monks fishermen miners weavers soldiers traders exiles shepherds",
    )
)

_ROMAN = "I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII".split()  # noqa: SIM905


@dataclass(frozen=True)
class Question:
    """A question over documents: one of `answers` counts; `documents` hold the evidence."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def invented_questions(hops: int, number: int) -> list[Question]:
    """Return questions about invented people and towns, at most 5,000, each with its documents and one answer.

    `hops` is the number of documents that a question takes, 1 or 2.

    >>> question = invented_questions(2, 1)[0]
    >>> len(question.documents), all(answer in question.documents[1] for answer in question.answers)
    (2, True)
    """
    # All names first, in one order, so that fewer questions are the first of more.
    rng = np.random.Generator(np.random.PCG64(0))
    towns = [f"{place}{end}" for place in _PLACES for end in _ENDS]
    people = [f"{first} {last}" for first in _FIRST for last in _LAST]
    town_order, person_order = rng.permutation(len(towns)), rng.permutation(len(people))
    questions = []
    for index in range(number):
        # Beyond a few hundred the names come again, told apart by a figure as kings are.
        turn, place = divmod(index, min(len(towns), len(people)))
        figure = f" {_ROMAN[turn]}" if turn else ""
        town, person = towns[town_order[place]] + figure, people[person_order[place]] + figure
        trade, river, founders = (str(rng.choice(words)) for words in (_TRADES, _RIVERS, _FOUNDERS))
        founded, born = str(rng.integers(1100, 1700)), str(rng.integers(1701, 1900))
        about_town = (
            f"{town}\n{town} is a town on the river {river}. It was founded in {founded} by {founders} and has had a "
            "market ever since."
        )
        about_person = (
            f"{person}\n{person} was one of the many people who took up the trade of {trade} in those years. Born in "
            f"{born} in {town}, this {trade} left {rng.integers(2, 10)} notebooks."
        )
        if hops == 1:
            asked = (
                (f"In which year was {town} founded?", founded, about_town),
                (f"On which river does {town} lie?", river, about_town),
                (f"In which town was {person} born?", town, about_person),
                (f"What was the trade of {person}?", trade, about_person),
            )[index % 4]
            questions.append(Question(asked[0], (asked[1],), (asked[2],)))
        else:
            query, answer = (
                (f"On which river does the town lie in which {person} was born?", river),
                (f"In which year was the town founded in which {person} was born?", founded),
            )[index % 2]
            questions.append(Question(query, (answer,), (about_person, about_town)))
    return questions


def load_questions(source: str | Path) -> list[Question]:
    """Return the questions of a file.

    Args:
        source: SQuAD's JSON, HotpotQA's JSON, or JSONL with `question` (or `instruction`), `answer` or `answers`, and
            `context` (a text) or `contexts` (texts).

    Raises:
        ValueError: no such file, or a row without one of these; the message names file, row and field.
    """
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"`ruler_questions` must be a file, got {str(source)!r}. Correct the path.")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return [_of_row(row.values, row.origin) for row in read_jsonl(file, str(path))]
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"`ruler_questions` must hold JSON, got {error} in {path.name}. Mend it.") from error
    # Told apart by what they are: SQuAD's JSON is an object, HotpotQA's a list.
    if isinstance(data, dict):
        return list(_of_squad(data, path.name))
    return [_of_hotpot(row, f"{path.name}, row {number}") for number, row in enumerate(data)]


def _of_row(row: Mapping[str, Any], where: str) -> Question:
    for name in ("answers", "contexts"):
        if not isinstance(row.get(name), list | None):
            raise ValueError(f"`{name}` must be a list of texts, got {row[name]!r:.40} in {where}. Write [...].")
    query = row.get("question") or row.get("instruction")
    answers = row.get("answers") or ([row["answer"]] if row.get("answer") else None)
    documents = row.get("contexts") or ([row["context"]] if row.get("context") else None)
    named = {"question": query, "answer": answers, "context": documents}
    missing = next((name for name, value in named.items() if not value), None)
    if missing:
        raise ValueError(f"`{missing}` must be given for every question, got none in {where}. Add it or take it out.")
    return Question(str(query), tuple(map(str, answers or ())), tuple(map(str, documents or ())))


def _of_squad(data: Mapping[str, Any], name: str) -> Iterator[Question]:
    if "data" not in data:
        raise ValueError(
            f"`ruler_questions` must be SQuAD's, with `data`, got {name} with {sorted(data)}. Write JSONL."
        )
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                if asked["answers"]:  # an impossible question has none
                    answers = dict.fromkeys(answer["text"] for answer in asked["answers"])
                    yield Question(asked["question"], tuple(answers), (paragraph["context"],))


def _of_hotpot(row: Any, where: str) -> Question:
    whole = isinstance(row, dict) and {"question", "answer", "context"} <= set(row)
    if not whole or not all(isinstance(part, list) and len(part) == 2 for part in row["context"]):
        got = sorted(row) if isinstance(row, dict) else row
        raise ValueError(
            "`ruler_questions` must be HotpotQA's, with question, answer, and a context of pairs of title and "
            f"sentences, got {got!r:.80} in {where}. Write JSONL instead."
        )
    documents = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
    return Question(row["question"], (row["answer"],), tuple(documents))


class Pairs(Sequence[str]):
    """All "adjective-noun" words in sorted order, six millions of them, none of which is kept.

    >>> list(Pairs(["old", "old-world", "big"], ["yew", "map"]))
    ['big-map', 'big-yew', 'old-map', 'old-world-map', 'old-world-yew', 'old-yew']
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._groups: list[list[str]] = []
        for adjective in sorted(set(adjectives), key=lambda word: f"{word}-"):
            # "old-world-map" stands between "old-map" and "old-yew": these alone must be sorted as whole words.
            if self._groups and adjective.startswith(f"{self._groups[-1][0]}-"):
                self._groups[-1].append(adjective)
            else:
                self._groups.append([adjective])
        self._sorted = {
            number: sorted({f"{adjective}-{noun}" for adjective in group for noun in self._nouns})
            for number, group in enumerate(self._groups)
            if len(group) > 1
        }
        sizes = [len(self._sorted.get(number, self._nouns)) for number in range(len(self._groups))]
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        if number in self._sorted:
            return self._sorted[number][place]
        return f"{self._groups[number][0]}-{self._nouns[place]}"


@cache
def word_pairs() -> Pairs:
    """Return RULER's adjective-noun words."""
    return Pairs(_words("adjectivelist.txt"), _words("nounlist.txt"))


def word_list() -> list[str]:
    """Return RULER's nouns, adjectives and verbs, sorted."""
    return sorted({word for kind in ("noun", "adjective", "verb") for word in _words(f"{kind}list.txt")})


def _words(name: str) -> list[str]:
    random_word = require("wonderwords.random_word", "eval")
    return random_word._get_words_from_text_file(name)
