"""Needles: the four tasks, the needles of a sample drawn from a seed, and the score of an answer.

After RULER (https://arxiv.org/abs/2404.06654): each needle says that a key has a value; the question asks for the
values of some keys.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np

from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.text import UNSPACED


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
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:[,.'’_ \u00a0\u2009\u202f]\d{3})+(?!\d)")
_DIGITS = re.compile(r"\d+")
_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True)
class NeedleTask:
    """How many needles there are, and how many of them are asked for.

    Attributes:
        name: what reports call it.
        queries: keys asked for.
        values: values of each key, a needle each.
        distractors: needles of other keys, not asked for.
    """

    name: str
    queries: int = 1
    values: int = 1
    distractors: int = 0

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
    """The words around keys and values, in any language.

    Attributes:
        header: stands before the haystack.
        needle: a sentence with `{key}` and `{value}`.
        question: stands after the haystack, with `{keys}`.
        answer: with `{keys}`; without a chat template the model goes on from here.
        conjunction: stands before the last of several keys.

    Example:

    >>> Wording("", "Der Code für {key} lautet {value}.", "Welcher Code?", "Der Code für {keys} lautet")
    Traceback (most recent call last):
    ValueError: `question` must hold {keys} and nothing else in braces, got 'Welcher Code?'. Correct it.
    """

    header: str
    needle: str
    question: str
    answer: str
    conjunction: str = ", and "

    def __post_init__(self) -> None:
        for name, fields in (("needle", ("key", "value")), ("question", ("keys",)), ("answer", ("keys",))):
            text = getattr(self, name)
            # A brace too many would fail in the middle of a grid, or silently print a key's name.
            try:
                found = {part for _, part, _, _ in Formatter().parse(text) if part is not None}
            except ValueError:
                found = set()
            if found != set(fields):
                wanted = " and ".join(f"{{{part}}}" for part in fields)
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

    Attributes:
        keys: at least as many as a task has keys.
        values: at least as many as a task has needles, none part of another one.

    Example:

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
        if len(set(self.keys)) < len(self.keys):
            double = next(key for key in self.keys if list(self.keys).count(key) > 1)
            raise ValueError(f"`keys` must differ, got {double!r} twice. Take one away.")
        pair = overlap(self.values)
        if pair is not None:
            raise ValueError(
                f"`values` must not be part of one another, got {pair[0]!r} in {pair[1]!r}. Take one of them away."
            )


@dataclass(frozen=True)
class Needles:
    """The needles of a sample as text.

    Attributes:
        asked: needles of the keys asked for; the first one's place is the depth of the prompt.
        others: needles of other keys.
        answers: the values of `asked`.
        keys: the keys asked for, as the question lists them.
    """

    asked: tuple[str, ...]
    others: tuple[str, ...]
    answers: tuple[str, ...]
    keys: str


def seeded_rng(*parts: str | int) -> np.random.Generator:
    """Return a random generator that depends on the parts alone, the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def wording_of(task: NeedleTask) -> Wording:
    """Return RULER's wording of a task: in the singular where one value is asked for."""
    return ONE if task.expected == 1 else SEVERAL


def draw_needles(task: NeedleTask, wording: Wording, pools: Pools, rng: np.random.Generator) -> Needles:
    """Draw the keys and values of a sample.

    Raises:
        ValueError: too few keys or values to draw from.

    >>> draw_needles(TASKS["single"], ONE, Pools(keys=["tiny-oboe"]), seeded_rng(0)).asked
    ('One of the special magic numbers for tiny-oboe is: 8601218.',)
    """
    n_keys, n_values = task.queries + task.distractors, task.expected + task.distractors
    if pools.keys:
        keys = _draw("keys", pools.keys, n_keys, rng)
    else:
        chosen = rng.choice(len(_ADJECTIVES) * len(_NOUNS), n_keys, replace=False)
        keys = [f"{_ADJECTIVES[index // len(_NOUNS)]}-{_NOUNS[index % len(_NOUNS)]}" for index in chosen]
    if pools.values:
        values = _draw("values", pools.values, n_values, rng)
    else:  # all of seven digits, none of which can stand in another
        values = [str(1_000_000 + value) for value in rng.choice(9_000_000, n_values, replace=False)]
    owners = [key for key in keys[: task.queries] for _ in range(task.values)] + keys[task.queries :]
    sentences = tuple(wording.needle.format(key=key, value=value) for key, value in zip(owners, values, strict=True))
    return Needles(
        sentences[: task.expected],
        sentences[task.expected :],
        tuple(values[: task.expected]),
        wording.join(keys[: task.queries]),
    )


def _draw(name: str, pool: Sequence[str], number: int, rng: np.random.Generator) -> list[str]:
    if len(pool) < number:
        raise ValueError(f"`{name}` must be at least {number} for this task, got {len(pool)}. Add some.")
    return [pool[index] for index in rng.choice(len(pool), number, replace=False)]


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
    expected = {_fold(value) for value in prompt.answers}
    numbers = {value for value in expected if value.isascii() and value.isdigit()}
    lengths = {len(value) for value in numbers}

    def ungrouped(match: re.Match[str]) -> str:
        # Marks between thousands go only where the number then has an expected length: "rooms 12 345" may be two.
        digits = "".join(_DIGITS.findall(match[0]))
        return digits if len(digits) in lengths else match[0]

    text = _GROUPED.sub(ungrouped, _fold(answer))
    found = {value for value in expected if _names(text, value)}
    # Listing every number of the text is no answer. Of values that are no numbers a wrong one cannot be told.
    wrong = {number for number in _DIGITS.findall(text) if len(number) in lengths} - numbers
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
    # Where words stand side by side without a blank, every character may be the edge of one.
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
