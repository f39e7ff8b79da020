"""Needles: tasks, prompts of exact length with the needles at their depth of a haystack, and the score of an answer.

After RULER (https://arxiv.org/abs/2404.06654): each needle says that a key has a value; the question asks for the
values of some keys.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from string import Formatter

import numpy as np

from hf_longalign.evaluation.haystack import PARAGRAPH, sentences_of, split_units
from hf_longalign.evaluation.prompt import Prompt, other_ways
from hf_longalign.puzzles.puzzle import seeded_rng
from hf_longalign.text import fold, whole_word


_ADJECTIVES = """
amber ancient bitter bold brave brisk calm clever cosy crooked curious dusty eager early faint fancy feral
gentle golden grand hasty hidden hollow honest humble icy jolly keen late lively lonely lucky mellow misty
modest narrow noble odd pale patient plain polite proud quick quiet rapid rough royal rusty shiny silent
simple sleepy slow smooth solemn sturdy sunny swift tall tender thin tidy tiny vivid warm wild wise young
""".split()  # noqa: SIM905
_NOUNS = """
acorn anchor apron arrow badger ballad barrel basin beacon beetle bonnet bottle bramble bridge bucket button
cabin camel candle canyon carpet castle cavern cherry chisel cobweb compass copper cradle cricket crown
curtain dagger desert dolphin donkey drum eagle ember falcon feather fiddle forest fossil fountain garlic
glacier glove goblet hammer hamster harbor hazel helmet heron island jacket jasmine kettle ladder lantern
lemon lizard magnet maple marble meadow mirror monkey mosaic needle nutmeg oboe orchard otter oyster paddle
parcel parrot pebble pepper pillow pirate plum pocket pony quarry quilt rabbit raven ribbon river rocket
saddle salmon shadow shovel sparrow spider temple thimble thistle ticket tiger tulip tunnel turnip valley
velvet violin walnut willow window
""".split()  # noqa: SIM905
_PAIRS = [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
_NUMBERS = range(1_000_000, 10_000_000)  # all of seven digits, none of which can stand in another
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:[,.'’_ \u00a0\u2009\u202f]\d{3})+(?!\d)")
_DIGITS = re.compile(r"\d+")
# A long prompt may be this much shorter than asked for: it saves counting it again for one more word.
_SLACK = 0.0025


@dataclass(frozen=True)
class NeedleTask:
    """How many needles there are, and how many of them are asked for."""

    name: str  # what reports call it
    queries: int = 1  # keys asked for
    values: int = 1  # values of each key, a needle each
    distractors: int = 0  # needles of other keys

    def __post_init__(self) -> None:
        for name, least in (("queries", 1), ("values", 1), ("distractors", 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {number!r}. Set more.")

    @property
    def expected(self) -> int:
        """Values an answer must hold."""
        return self.queries * self.values


TASKS = {
    task.name: task
    for task in (
        NeedleTask("single"),
        NeedleTask("multi_key", distractors=3),
        NeedleTask("multi_value", values=4),
        NeedleTask("multi_query", queries=4),
    )
}


@dataclass(frozen=True)
class Wording:
    """The words around keys and values."""

    header: str  # before the haystack
    needle: str  # a sentence with `{key}` and `{value}`
    question: str  # after the haystack, with `{keys}`
    answer: str  # with `{keys}`; without a chat template the model goes on from here
    conjunction: str = ", and "  # before the last of several keys

    def __post_init__(self) -> None:
        for name, fields in (("needle", {"key", "value"}), ("question", {"keys"}), ("answer", {"keys"})):
            text = getattr(self, name)
            # A brace too many would fail in the middle of a grid, or silently print a key's name.
            with suppress(ValueError):
                if {part for _, part, _, _ in Formatter().parse(text) if part is not None} == fields:
                    continue
            wanted = " and ".join(f"{{{part}}}" for part in sorted(fields))
            raise ValueError(f"`{name}` must hold {wanted} and nothing else in braces, got {text!r}. Correct it.")

    def join(self, keys: Sequence[str]) -> str:
        """Return the keys as the question lists them: "a, b, and c"."""
        return ", ".join(keys[:-1]) + self.conjunction + keys[-1] if len(keys) > 1 else keys[0]


# RULER's words: https://github.com/NVIDIA/RULER
ONE = Wording(
    header="A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.",
    needle="One of the special magic numbers for {key} is: {value}.",
    question="What is the special magic number for {keys} mentioned in the provided text?",
    answer="The special magic number for {keys} mentioned in the provided text is",
)
SEVERAL = Wording(
    header="Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.",
    needle=ONE.needle,
    question="What are all the special magic numbers for {keys} mentioned in the provided text?",
    answer="The special magic numbers for {keys} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Pools:
    """What keys and values are drawn from, without replacement; empty: adjective-noun pairs, seven-digit numbers.

    >>> Pools(values=("red", "dark red"))
    Traceback (most recent call last):
    ValueError: `values` must not be part of one another, got 'red' in 'dark red'. Take one of them away.
    """

    keys: Sequence[str] = ()
    values: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"`{name}` must be texts, got {text!r}. Take it away.")
        double = next((key for key, number in Counter(self.keys).items() if number > 1), None)
        if double is not None:
            raise ValueError(f"`keys` must differ, got {double!r} twice. Take one away.")
        # Else an answer that names one would name the other too.
        for (one, part), (other, whole) in permutations(zip(self.values, map(fold, self.values), strict=True), 2):
            if part in whole and re.search(whole_word(part), whole):
                raise ValueError(
                    f"`values` must not be part of one another, got {one!r} in {other!r}. Take one of them away."
                )


@dataclass(frozen=True)
class Needles:
    """The needles of a sample as text."""

    asked: tuple[str, ...]  # of the keys asked for; the first one's place is the depth of the prompt
    others: tuple[str, ...]  # of other keys
    answers: tuple[str, ...]  # the values of `asked`
    keys: str  # the keys asked for, as the question lists them


def draw_needles(task: NeedleTask, wording: Wording, pools: Pools, rng: np.random.Generator) -> Needles:
    """Draw the keys and values of a sample.

    >>> draw_needles(TASKS["single"], ONE, Pools(keys=["tiny-oboe"]), seeded_rng(0)).asked
    ('One of the special magic numbers for tiny-oboe is: 8601218.',)
    """

    def draw(name: str, pool: Sequence[object], number: int) -> list[str]:
        if number > len(pool):
            raise ValueError(f"`{name}` must be at least {number} for {task.name!r}, got {len(pool)}. Give more.")
        return [str(pool[index]) for index in rng.choice(len(pool), number, replace=False)]

    keys = draw("keys", pools.keys or _PAIRS, task.queries + task.distractors)
    values = draw("values", pools.values or _NUMBERS, task.expected + task.distractors)
    owners = [key for key in keys[: task.queries] for _ in range(task.values)] + keys[task.queries :]
    sentences = tuple(wording.needle.format(key=key, value=value) for key, value in zip(owners, values, strict=True))
    return Needles(
        sentences[: task.expected],
        sentences[task.expected :],
        tuple(values[: task.expected]),
        wording.join(keys[: task.queries]),
    )


def needle_prompts(
    *,
    haystack: Iterable[str],
    count: Callable[[str], int],
    lengths: Sequence[int],
    depths: Sequence[float],
    tasks: Sequence[str | NeedleTask] = tuple(TASKS),
    samples: int = 10,
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int = 128,
    wording: Wording | None = None,
    pools: Pools = Pools(),
    diagnose_at: int | None = None,
) -> Iterator[Prompt]:
    """Return the prompts of a grid of lengths and depths, task by task, those that share a haystack together.

    A prompt and its answer fill their length: `count(text) + max_new_tokens` is at most `length`, and less by at most
    1 % or one word. The first needle asked for stands at the end of a sentence, the one nearest to its depth in tokens
    of the haystack; all others at ends drawn uniformly. A prompt depends on the seed and its own task, length, depth
    and sample, not on the rest of the grid.

    Args:
        haystack: texts; they begin again where they are too short.
        count: tokens the model is given for a text, template included, see [`token_counter`].
        lengths: in tokens, the template and the room for the answer included.
        depths: 0 at the beginning of the haystack, 1 at its end.
        chat: whether `count` applies the chat template. Without it the text ends with the beginning of the answer, and
            the answer ends with its line.
        wording: the words around keys and values; by default RULER's.
        diagnose_at: the length whose samples are asked over their needles alone and without any text, too.

    Raises:
        ValueError: an empty haystack, or a length too small for the needles; the message names the smallest.

    >>> prompts = needle_prompts(
    ...     haystack=["The sky is blue. The grass is green."], count=lambda text: len(text.split()), tasks=["single"],
    ...     lengths=[70], depths=[0.5], samples=1, max_new_tokens=10)
    >>> next(prompts).text[:44]
    'A special magic number is hidden within the '
    """
    chosen = [TASKS[task] if isinstance(task, str) else task for task in tasks]
    sentences = sentences_of(haystack)
    # One haystack for all samples, tasks and lengths, as in RULER: what stands before the first needle is then read
    # once for the whole grid, half of all tokens and not a third.
    start = int(seeded_rng("haystack", seed).integers(len(sentences)))
    plan = _Plan(Haystack(sentences, count, start), count, seed, chat, max_new_tokens, wording, pools)
    for task in chosen:  # too small a length is told now, not after an hour of building prompts
        plan.check_room(task, min(lengths), range(samples))
    return (
        prompt
        for task in chosen
        for length in lengths
        for sample in range(samples)
        for prompt in plan.prompts(task, length, sample, depths, diagnose=length == diagnose_at)
    )


class Haystack:
    """The `sentences` from number `start` on, again and again, with the tokens and units before each."""

    def __init__(self, sentences: Sequence[str], count: Callable[[str], int], start: int) -> None:
        self._sentences = [*sentences[start:], *sentences[:start]]
        stop = count(".")
        # Counted after a full stop, as a sentence stands in a text: many tokenizers count its first blank otherwise.
        self._size = cache(lambda sentence: (max(1, count("." + sentence) - stop), max(1, len(split_units(sentence)))))
        # Their sums are an estimate, as tokens may join across sentences: what fits is counted in the end.
        self._tokens, self._units = [0], [0]

    def tokens(self, units: int) -> float:
        """Return the estimated tokens of so many units, see [`split_units`]."""
        while self._units[-1] < units:
            self._grow()
        return float(np.interp(units, self._units, self._tokens))

    def units(self, tokens: float) -> int:
        """Return how many units have at most so many estimated tokens."""
        while self._tokens[-1] <= tokens:
            self._grow()
        return int(np.interp(tokens, self._tokens, self._units))

    def parts(self, units: int) -> tuple[list[str], list[int]]:
        """Return the sentences of so many units, the last one cut and marked, and the tokens before each end."""
        self.tokens(units)
        whole = bisect_right(self._units, units) - 1
        parts, ends = [self._sentence(index) for index in range(whole)], self._tokens[: whole + 1]
        rest = units - self._units[whole]
        if rest:
            parts.append("".join(split_units(self._sentence(whole))[:rest]) + "...")
            ends = [*ends, round(self.tokens(units))]
        return parts, ends

    def _sentence(self, index: int) -> str:
        return self._sentences[index % len(self._sentences)]

    def _grow(self) -> None:
        tokens, units = self._size(self._sentence(len(self._tokens) - 1))
        self._tokens.append(self._tokens[-1] + tokens)
        self._units.append(self._units[-1] + units)


@dataclass(frozen=True)
class _Sample:
    """What the prompts of all depths have in common."""

    hay: Haystack
    needles: Needles
    places: tuple[float, ...]
    wording: Wording
    chat: bool

    def text(self, units: int, depth: float) -> str:
        """The prompt with so many units of haystack."""
        parts, ends = self.hay.parts(units)
        asked = int(np.abs(np.array(ends) - depth * ends[-1]).argmin())
        drawn = [int(place * len(ends)) for place in self.places]
        needles = [*self.needles.asked, *self.needles.others]
        # Where two stand together the one at the depth asked for comes first: the sort is stable.
        order = sorted(zip([asked, *drawn], needles, strict=True), key=lambda needle: needle[0])
        pieces, done = [], 0
        for end, needle in order:
            pieces += [*parts[done:end], " " + needle]
            done = end
        return self.around("".join([*pieces, *parts[done:]]).strip())

    def around(self, text: str) -> str:
        """The prompt over any text."""
        keys, wording = self.needles.keys, self.wording
        question = wording.question.format(keys=keys)
        if not self.chat:
            question = f"{question} {wording.answer.format(keys=keys)}"
        return PARAGRAPH.join(part for part in (wording.header, text, question) if part)


@dataclass(frozen=True)
class _Plan:
    """What all prompts of a grid have in common."""

    hay: Haystack
    count: Callable[[str], int]
    seed: int
    chat: bool
    max_new_tokens: int
    wording: Wording | None
    pools: Pools

    def prompts(
        self, task: NeedleTask, length: int, index: int, depths: Sequence[float], *, diagnose: bool
    ) -> Iterator[Prompt]:
        """Yield the prompts of a sample, by depth, and the other ways to ask it."""
        sample = self._sample(task, length, index)
        least = self.check_room(task, length, [index])
        budget, slack = length - self.max_new_tokens, int(_SLACK * length)
        guess = self.hay.units(budget - least + self.hay.tokens(1) - slack / 2)
        # All depths start from the units that fit at depth 0, so that long ones share them.
        units = self._fit(sample, 0.0, guess, budget, slack)
        for depth in depths:
            text = sample.text(self._fit(sample, depth, units, budget, slack), depth)
            prompt = Prompt(
                *("needle", task.name, index, text, sample.needles.answers, self.max_new_tokens),
                chat=self.chat,
                stop=() if self.chat else ("\n",),
                length=length,
                depth=float(depth),
            )
            yield prompt
        if diagnose:
            yield from other_ways(prompt, sample.around(" ".join(sample.needles.asked)), sample.around(""))

    def check_room(self, task: NeedleTask, length: int, indices: Iterable[int]) -> int:
        """Return the tokens of a prompt with one word of haystack, the most of some samples, which must all fit."""
        least = max(self.count(self._sample(task, length, index).text(1, 0.0)) for index in indices)
        if least + self.max_new_tokens > length:
            raise ValueError(
                f"`lengths` must be at least {least + self.max_new_tokens} for the task {task.name!r} (tokens of "
                f"template, question and needles {least}, of the answer {self.max_new_tokens}), got {length}. Set a "
                "larger length, shorter needles or a smaller `max_new_tokens`."
            )
        return least

    def _sample(self, task: NeedleTask, length: int, index: int) -> _Sample:
        wording = self.wording or (ONE if task.expected == 1 else SEVERAL)
        # By its own task, length and number alone, so that another grid, or more samples, keep the prompts there are.
        rng = seeded_rng("needles", self.seed, task.name, length, index)
        needles = draw_needles(task, wording, self.pools, rng)
        places = tuple(rng.random(len(needles.asked) + len(needles.others) - 1).tolist())
        return _Sample(self.hay, needles, places, wording, self.chat)

    def _fit(self, sample: _Sample, depth: float, units: int, budget: int, slack: int) -> int:
        """Units of haystack with which a prompt has at most `budget` tokens, less by `slack` or one unit at most."""
        # Each count tokenises the whole prompt, so the next guess is the estimate corrected by what is missing: two or
        # three counts, where bisection alone takes fifteen.
        low, high = 1, None
        units = max(units, low)
        while True:
            gap = budget - self.count(sample.text(units, depth))
            if 0 <= gap <= slack:
                return units
            low, high = (units, high) if gap > 0 else (low, units)
            if high is not None and high - low <= 1:
                return low
            step = self.hay.units(max(0.0, self.hay.tokens(units) + gap - slack / 2))
            if high is not None and not low < step < high:  # the estimate is of no more use
                step = (low + high) // 2
            units = max(step, low + 1)


def score_needle(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return the scores of an answer, 0 to 1.

    `recall` is the share of the expected values that the answer names, as whole words or numbers. `exact_match` is 1
    where it names all of them and, if they are numbers, no other number with as many digits.

    >>> prompt = Prompt("needle", "multi_value", 0, "Which codes?", ("1234567", "7654321"), 8)
    >>> score_needle(prompt, "They are 7654321 and 1,234,567.")
    {'exact_match': 1.0, 'recall': 1.0}
    >>> score_needle(prompt, "1234567, 7777777")
    {'exact_match': 0.0, 'recall': 0.5}
    """
    # Case does not count, nor how a character is composed or in which script digits are.
    expected = {fold(value) for value in prompt.answers}
    numbers = {value for value in expected if value.isascii() and value.isdigit()}
    lengths = {len(value) for value in numbers}

    def ungrouped(match: re.Match[str]) -> str:
        # Marks between thousands go only where the number then has an expected length: "rooms 12 345" may be two.
        digits = "".join(_DIGITS.findall(match[0]))
        return digits if len(digits) in lengths else match[0]

    text = _GROUPED.sub(ungrouped, fold(answer))
    found = {value for value in expected if re.search(whole_word(value), text)}
    # Listing every number of the text is no answer. Of values that are no numbers a wrong one cannot be told.
    wrong = {number for number in _DIGITS.findall(text) if len(number) in lengths} - numbers
    return {"exact_match": float(found == expected and not wrong), "recall": len(found) / len(expected)}
