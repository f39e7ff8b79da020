"""Needle prompts of exact length: needles at the right depth of a haystack that just fits in the model's tokens."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hf_longalign.evaluation.haystack import PARAGRAPH, sentences_of, split_units
from hf_longalign.evaluation.needles import (
    TASKS,
    Needles,
    NeedleTask,
    Pools,
    Wording,
    draw_needles,
    seeded_rng,
    wording_of,
)
from hf_longalign.evaluation.prompt import Prompt, other_ways


# A long prompt may be this much shorter than asked for: it saves counting it again for one more word.
_SLACK = 0.0025


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
    pools: Pools | None = None,
    diagnose_at: int | None = None,
) -> Iterator[Prompt]:
    """Return the prompts of a grid of lengths and depths, task by task, those that share a haystack together.

    A prompt and its answer fill their length: `count(text) + max_new_tokens` is at most `length`, and less by at most
    1 % or one word. The first needle asked for stands at the end of a sentence, the one nearest to its depth in tokens
    of the haystack; all others at ends drawn uniformly. A prompt depends on the seed and its own task, length, depth
    and sample, not on the rest of the grid.

    Args:
        haystack: texts, see [`read_texts`], [`noise`]; they begin again where they are too short.
        count: tokens the model is given for a text, template included, see [`token_counter`].
        lengths: in tokens, the template and the room for the answer included.
        depths: 0 at the beginning of the haystack, 1 at its end.
        tasks: names of `TASKS`, or tasks with other numbers of needles.
        samples: prompts per task, length and depth.
        seed: of keys, values, places of the others and beginnings of the haystack.
        chat: whether `count` applies the chat template. Without it the text ends with the beginning of the answer, and
            the answer ends with its line.
        max_new_tokens: room for the answer; RULER's default.
        wording: the words around keys and values; by default RULER's.
        pools: what keys and values are drawn from.
        diagnose_at: the length whose samples are asked over their needles alone and without any text, too.

    Raises:
        ValueError: an empty haystack, or a length too small for the needles; the message names the smallest.

    Example:

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
    plan = _Plan(Haystack(sentences, count, start), count, seed, chat, max_new_tokens, wording, pools or Pools())
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
        index = bisect_left(self._units, units, lo=1)
        share = (units - self._units[index - 1]) / (self._units[index] - self._units[index - 1])
        return self._tokens[index - 1] + share * (self._tokens[index] - self._tokens[index - 1])

    def units(self, tokens: float) -> int:
        """Return how many units have at most so many estimated tokens."""
        while self._tokens[-1] <= tokens:
            self._grow()
        index = max(1, bisect_right(self._tokens, tokens))
        share = (tokens - self._tokens[index - 1]) / (self._tokens[index] - self._tokens[index - 1])
        return self._units[index - 1] + int(share * (self._units[index] - self._units[index - 1]))

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
                suite="needle",
                task=task.name,
                index=index,
                text=text,
                answers=sample.needles.answers,
                max_new_tokens=self.max_new_tokens,
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
        wording = self.wording or wording_of(task)
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
