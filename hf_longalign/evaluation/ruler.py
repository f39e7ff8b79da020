"""RULER's thirteen tasks without a download: as many samples as asked for, sized in the model's own tokens.

Source: https://arxiv.org/abs/2404.06654 and its generator, https://github.com/NVIDIA/RULER. Whoever publishes RULER
scores means these texts, so the tasks that need no data (needles in noise or among needles, variable tracking, common
words up to the size of the list, frequent words) equal the generator's, item by item, for the same seed and
tokenizer. That is why the random numbers below are drawn in its order, from Python's generator. The others cannot: its
essays, its sentence splitter and its questions are downloads. They follow the same procedure over texts and questions
that the caller brings.
"""

import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from hf_longalign.evaluation.haystack import sentences_of
from hf_longalign.evaluation.prompt import Prompt, other_ways
from hf_longalign.evaluation.ruler_data import (
    TASKS,
    TEMPLATES,
    Question,
    RulerTask,
    invented_questions,
    word_list,
    word_pairs,
)


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# Below this length the generator takes smaller steps and shorter examples.
SHORT = 4096
# Depths in percent at which needles and assignments may stand in an essay.
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()
SEED = 42  # of the published data
# Invented questions: the same for any number of samples, so that fewer are the first of more.
QUESTIONS = 500
HOPS = 4
COMMON = 10
VT_EXAMPLE_TOKENS = 500
EXAMPLE_VALUE = "12345"


@dataclass(frozen=True)
class RulerSample:
    """A sample: what the user says, how the answer is made to begin, and the strings an answer is scored by.

    `context` is the long part of the text, `evidence` what of it the answer needs; empty where that is all of it.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]
    context: str = ""
    evidence: str = ""

    @property
    def whole(self) -> str:
        """What a model reads before it answers."""
        return self.text + self.prefix


Make = Callable[[int], RulerSample]


@dataclass
class RulerBuilder:
    """Makes the samples of a task at one length.

    Raises:
        ValueError: essays or questions are missing, or the length is too small for a sample; the message names the
            smallest.

    >>> sample = next(RulerBuilder(TASKS["niah_single_1"], 400, lambda text: len(text.split())).samples(1))
    >>> sample.text.startswith("A special magic number is hidden within"), len(sample.answers)
    (True, 1)
    """

    task: RulerTask
    length: int  # tokens of a sample at most, the room for its answer and the chat template included
    count: Callable[[str], int]  # tokens of a text, the chat template included where one is used
    essays: Sequence[str] = ()  # for the haystack of "essay" tasks
    questions: Sequence[Question] = ()  # for "qa" tasks, each with as many documents as the task has hops

    def __post_init__(self) -> None:
        kind = self.task.kind
        if kind == "qa" and not self.questions:
            raise ValueError(f"`questions` must be given for {self.task.name!r}, got none. Set `questions`.")
        if self.task.haystack == "essay" and not self.essays:
            raise ValueError(f"`essays` must be given for {self.task.name!r}, got none. Set `haystack`.")
        # Its numbers come from both, seeded alike; which one draws what is part of the published data.
        self._rng, self._numpy_rng = random.Random(SEED), np.random.RandomState(SEED)
        if self.task.haystack == "essay":
            self._sentences = [sentence.strip() for sentence in sentences_of(self.essays)]
        if kind == "qa":
            self._documents = sorted({document for question in self.questions for document in question.documents})
        if kind == "cwe":
            self._words = word_list()
            random.Random(SEED).shuffle(self._words)
        self._asked = 0

    def samples(self, number: int) -> Iterator[RulerSample]:
        """Yield so many samples; fewer samples are the first of more."""
        kind, short = self.task.kind, self.length < SHORT
        if kind == "fwe":
            yield from self._frequent_words(number)
            return
        make: Make = getattr(self, f"_{kind}")
        # Units of haystack by which the generator makes a sample smaller until it fits.
        niah = 500 if self.task.haystack == "essay" else 5 if short else 25
        step = {"niah": niah, "vt": 5 if short else 10}.get(kind, 10)
        room = self.length - self.task.max_new_tokens
        example = self._solved_vt() if kind == "vt" else ""
        units = self._largest(make, step, self.length, room - (self.count(example) if example else 0))

        def with_example(units: int) -> RulerSample:
            sample = make(units)
            renamed = example
            for name in example.strip().split()[-HOPS - 1 :]:
                renamed = renamed.replace(name, self._letters(string.ascii_uppercase, len(name)))
            renamed = renamed.replace(EXAMPLE_VALUE, str(self._numpy_rng.randint(10000, 99999)))
            return replace(sample, text=f"{renamed}\n{sample.text}")

        def too_short(tokens: int) -> str:
            return (
                f"`lengths` must be at least {tokens + self.task.max_new_tokens} tokens for {self.task.name!r}, got "
                f"{self.length}. Set a larger length, or leave the task out."
            )

        for self._asked in range(number):
            yield self._fitting(with_example if example else make, units, step, room, too_short)

    def _largest(self, make: Make, step: int, length: int, room: int) -> int:
        """The most units of haystack with which a sample fits, by bisection as the generator does it."""
        common = self.task.kind == "cwe"
        probe = 4096 if common else step
        tokens = self.count(make(probe).whole) / probe
        # It takes three times the estimate for most tasks, and for lists of words twice.
        most = int(length // tokens) * 2 if common else int(length / tokens * 3)
        low, high, found = step, max(most, step * 2), step
        while low <= high:
            middle = (low + high) // 2
            if self.count(make(middle).whole) <= room:
                found, low = middle, middle + 1
            else:
                high = middle - 1
        return found

    def _fitting(self, make: Make, units: int, step: int, room: int, refusal: Callable[[int], str]) -> RulerSample:
        """A sample of at most so many units, a step less as long as it does not fit."""
        while True:
            sample = make(units)
            tokens = self.count(sample.whole)
            if tokens <= room:
                return sample
            if units <= step:  # here the generator would try for ever
                raise ValueError(refusal(tokens))
            units -= step

    def _sample(self, answers: Sequence[str], context: str, evidence: str = "", **words: object) -> RulerSample:
        text, prefix = TEMPLATES[self.task.kind]
        words["context"] = context
        return RulerSample(text.format(**words), prefix.format(**words), tuple(answers), context, evidence)

    def _niah(self, units: int) -> RulerSample:
        """Needles in sentences of noise, in an essay of so many words, or among other needles."""
        task, rng = self.task, self._rng
        kinds: dict[str, Callable[[], str]] = {
            "numbers": lambda: str(rng.randint(1_000_000, 9_999_999)),
            "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            "words": lambda: rng.choice(word_pairs()),
        }
        new_key, new_value = kinds[task.keys], kinds[task.values]
        keys, values, needles = [], [], []
        for _ in range(task.n_keys):
            keys.append(new_key())
            values.append([new_value() for _ in range(task.n_values)])
            needles += [NEEDLE.format(kind=task.values, key=keys[-1], value=value) for value in values[-1]]
        random.Random(SEED).shuffle(needles)
        if task.haystack == "essay":
            sentences = self._essay(units)
            places = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
            # What stands before the first needle, between two and after the last is one piece each, empty ones too.
            pieces = [" ".join(sentences[a:b]) for a, b in pairwise([0, *places, len(sentences)])]
            context = " ".join([part for pair in zip(pieces, needles, strict=False) for part in pair] + pieces[-1:])
        else:
            hay = [NOISE] * units
            if task.haystack == "needle":
                hay = [NEEDLE.format(kind=task.values, key=new_key(), value=new_value()) for _ in range(units)]
            # From the back, so that an insertion moves no place that is still to come.
            for place, needle in zip(
                sorted(rng.sample(range(units), len(needles)), reverse=True), needles, strict=True
            ):
                hay.insert(place, needle)
            context = "\n".join(hay)
        asked = rng.sample(range(task.n_keys), task.n_queries)
        query = ", and ".join(filter(None, [", ".join(keys[i] for i in asked[:-1]), keys[asked[-1]]]))
        text, prefix = TEMPLATES["niah"]
        kind = task.values
        if task.n_queries * task.n_values == 1:  # the generator's way to the singular, in its order
            kind = kind[:-1]
            for several, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
                text, prefix = text.replace(several, one), prefix.replace(several, one)
        words = {"kind": kind, "context": context, "query": query}
        answers = tuple(value for i in asked for value in values[i])
        evidence = [NEEDLE.format(kind=task.values, key=keys[i], value=value) for i in asked for value in values[i]]
        return RulerSample(text.format(**words), prefix.format(**words), answers, context, "\n".join(evidence))

    def _essay(self, words: int) -> list[str]:
        """The sentences of so many words of the essays, which are repeated where they end."""
        sentences, left = [], words
        while left > 0:
            for sentence in self._sentences:
                cut = sentence.split()[:left]
                sentences.append(" ".join(cut))
                left -= len(cut)
                if left <= 0:
                    break
        return sentences

    def _letters(self, alphabet: str, number: int) -> str:
        return "".join(self._rng.choices(alphabet, k=number))

    def _vt(self, units: int, *, is_example: bool = False) -> RulerSample:
        """A chain of assignments, in order, among sentences of noise."""
        letters = 3 if is_example else 5
        names = [self._letters(string.ascii_uppercase, letters) for _ in range(HOPS + 1)]
        while len(set(names)) < HOPS + 1:
            names.append(self._letters(string.ascii_uppercase, letters))
        # Of a name that came twice both stand at the front, as in the generator.
        names = names[: HOPS + 1]
        value = EXAMPLE_VALUE if is_example else str(self._numpy_rng.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]
        hay = [NOISE] * units
        for shift, place in enumerate(sorted(self._rng.sample(range(units), len(chain)))):
            hay.insert(place + shift, chain[shift])
        context = "\n".join(hay).replace(". \n", ".\n")
        return self._sample(names, context, "\n".join(chain), query=value, number=HOPS + 1)

    def _solved_vt(self) -> str:
        """A solved sample of at most 500 tokens, that stands before every one; its answer takes no room."""

        def make(units: int) -> RulerSample:
            return self._vt(units, is_example=True)

        def refusal(tokens: int) -> str:
            return (
                f"`count` must take at most {VT_EXAMPLE_TOKENS} tokens for the example of variable tracking, got "
                f"{tokens}: this tokenizer cuts English text too finely. Leave {self.task.name!r} out."
            )

        units = self._largest(make, 5, VT_EXAMPLE_TOKENS, VT_EXAMPLE_TOKENS)
        sample = self._fitting(make, units, 5, VT_EXAMPLE_TOKENS, refusal)
        return f"{sample.whole} {' '.join(sample.answers)}\n"

    def _cwe(self, units: int) -> RulerSample:
        """A numbered list in which ten words come more often than the others, after a short solved one."""
        short = self.length < SHORT
        example = self._listed(20, 3, 1) if short else self._listed(40, 10, 3)
        context, common = self._listed(units, 6, 1) if short else self._listed(units, 30, 3)
        solved, sample = self._sample(example[1], example[0]), self._sample(common, context)
        told = " ".join(f"{i}. {word}" for i, word in enumerate(example[1], 1))
        return replace(sample, text=f"{solved.whole} {told}\n{sample.text}")

    def _listed(self, number: int, often: int, seldom: int) -> tuple[str, list[str]]:
        # Where these do not do, the generator goes over to a list of 370,000 words, which is a download.
        drawn = self._rng.sample(self._words if number <= len(self._words) else word_pairs(), number)
        common, others = drawn[:COMMON], drawn[COMMON:]
        rows = common * often + others * seldom
        random.Random(SEED).shuffle(rows)
        return " ".join(f"{i}. {word}" for i, word in enumerate(rows, 1)), common

    def _frequent_words(self, number: int) -> Iterator[RulerSample]:
        """Coded words whose frequency falls with the square of their rank; the first rank is noise."""
        room = self.length - self.task.max_new_tokens
        step, words, vocabulary = room // 32, room // 6, room // 50
        if vocabulary < 4 or self.count(self._sample((), "").whole) >= room:
            raise ValueError(
                f"`lengths` must leave room for the question and four coded words of {self.task.name!r}, got "
                f"{self.length}. Set a larger length, or leave the task out."
            )
        coded = self._coded(vocabulary)
        while self.count(self._coded_text(coded, words).whole) < room:
            words += step
        for _ in range(number):
            coded, fitting = self._coded(vocabulary), words - step
            while self.count(self._coded_text(coded, fitting).whole) > room:
                fitting -= step
            yield self._coded_text(coded, fitting)

    def _coded(self, number: int) -> list[str]:
        words = {self._letters(string.ascii_lowercase, 6) for _ in range(number)}
        while len(words) < number:
            words.add(self._letters(string.ascii_lowercase, 6))
        coded = sorted(words)
        random.Random(SEED).shuffle(coded)
        return ["...", *coded[1:]]

    def _coded_text(self, coded: Sequence[str], words: int) -> RulerSample:
        # The share of rank k under a zeta distribution with exponent 2, whose sum is pi^2 / 6.
        ranks = np.arange(1, len(coded) + 1)
        counts = (words * ranks**-2.0 / (math.pi**2 / 6)).astype(int).tolist()
        drawn = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        random.Random(SEED).shuffle(drawn)
        return self._sample(coded[1:4], " ".join(drawn))

    def _qa(self, units: int) -> RulerSample:
        """The documents of a question among so many in all, those of other questions."""
        question = self.questions[self._asked % len(self.questions)]
        others = [document for document in self._documents if document not in question.documents]
        number = max(0, units - len(question.documents))
        documents = [*question.documents, *self._rng.sample(others, min(number, len(others)))]
        # Fewer documents than a long sample holds come again.
        documents += [others[i % len(others)] for i in range(number - len(others))] if others else []
        random.Random(SEED).shuffle(documents)
        context, evidence = (
            "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(texts, 1))
            for texts in (documents, question.documents)
        )
        return self._sample(question.answers, context, evidence, query=question.query)


def ruler_prompts(
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    count: Callable[[str], int],
    essays: Sequence[str],
    questions: Sequence[Question] = (),
    chat: bool = True,
    diagnose_at: int | None = None,
) -> tuple[list[Prompt], dict[str, str]]:
    """Return the prompts of tasks at lengths, and which of them have no room there, with the reason.

    The arguments are those of [`~hf_longalign.evaluation.needles.needle_prompts`]; `questions` are for the
    question-answering tasks, without any they are invented. Common and frequent words cannot be asked over their
    evidence alone, as that is the whole text.
    """
    prompts, missing = [], {}
    for task in (TASKS[name] for name in tasks):
        asked = list(questions) or (invented_questions(task.hops, QUESTIONS) if task.kind == "qa" else [])
        for length in lengths:
            builder = RulerBuilder(task, length, count, essays, asked)
            own: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "chat": chat, "length": length}
            try:
                made = list(builder.samples(samples))
            except ValueError as error:
                missing[f"{task.name}, {length:,} tokens"] = str(error)
                continue
            for index, sample in enumerate(made):
                prompt = Prompt("ruler", task.name, index, sample.text, sample.answers, prefix=sample.prefix, **own)
                prompts.append(prompt)
                if length == diagnose_at and sample.evidence:
                    texts = (sample.text.replace(sample.context, other) for other in (sample.evidence, ""))
                    prompts += other_ways(prompt, *texts)
    return prompts, missing


def score_ruler(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return RULER's score of an answer, 0 to 1: of questions whether any answer is named, else the share that is.

    >>> score_ruler(Prompt("ruler", "ruler_vt", 0, "", ("ABCDE", "FGHIJ"), 30), " ABCDE only")
    {'string_match': 0.5}
    """
    return {"string_match": string_match(answer, prompt.answers, every=TASKS[prompt.task.split(",")[0]].kind != "qa")}


def string_match(answer: str, references: Sequence[str], *, every: bool) -> float:
    """Return the share of the references that stand in the answer (`every`), or whether any does, case aside.

    >>> string_match("They are A1 and b2.", ["a1", "B2", "c3", "d4"], every=True)
    0.5
    """
    text = re.sub("[\x00-\x1f]", "\n", answer).strip().lower()
    found = [reference.lower() in text for reference in references]
    return sum(found) / len(found) if every else float(any(found))
