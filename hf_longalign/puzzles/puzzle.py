"""A puzzle: lines that hold the evidence, lines that only look like it, and filler up to a length in tokens.

    header
    filler . line that looks alike . EVIDENCE . filler . EVIDENCE . line that looks alike . filler
    question

The header and the question say how to answer. Sizes are found by bisection with the model's own tokens.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


# What an answer is looked through for: invented names, numbers, and the word that stands for "nothing".
UNANSWERABLE = "unanswerable"
# Tokens that may be left over: about half a line.
SLACK = 8
_ITEM = re.compile(rf"\b(?i:{UNANSWERABLE})\b|\b[A-Z]{{5,10}}\b|\b\d+\b")


@dataclass(frozen=True)
class Line:
    """A line of a puzzle; `evidence` if the answer needs it."""

    text: str
    evidence: bool = False


@dataclass(frozen=True)
class Puzzle:
    """A puzzle before it is made long.

    Attributes:
        task: name of its task.
        header: what the text is, before it.
        lines: its own lines in order, with the evidence.
        alike: makes another line that looks like evidence and changes nothing; called as often as the length wants.
        question: stands after the text, and says in which form to answer.
        answers: what an answer must name: invented names, numbers or "unanswerable".
        shuffled: whether the lines may stand in any order among each other.
    """

    task: str
    header: str
    lines: tuple[Line, ...]
    alike: Callable[[], str]
    question: str
    answers: tuple[str, ...]
    shuffled: bool = True

    @cached_property
    def evidence(self) -> tuple[str, ...]:
        """The lines that the answer needs."""
        return tuple(line.text for line in self.lines if line.evidence)

    def closed_book(self) -> str:
        """Return the question without any text: who answers it knows or guesses."""
        return f"{self.header}\n\n{self.question}"

    def open_evidence(self) -> str:
        """Return the question over the evidence alone: who fails cannot use what is found."""
        return "\n\n".join([self.header, "\n".join(self.evidence), self.question])


@dataclass(frozen=True)
class LongPuzzle:
    """A puzzle at a length: its text, and where in it, in characters, the lines and last the question stand."""

    puzzle: Puzzle
    text: str
    spans: tuple[tuple[int, int], ...]

    def row(self) -> dict[str, list[dict]]:
        """Return a training row in TRL's chat format, with `parts` at which positions may be skipped."""
        return {
            "messages": [
                {"role": "user", "content": self.text},
                {"role": "assistant", "content": ", ".join(self.puzzle.answers)},
            ],
            "parts": [{"message": 0, "start": start, "end": end} for start, end in self.spans],
        }


def seeded_rng(*parts: str | int) -> np.random.Generator:
    """Return a random generator that depends on the parts alone, the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def lengthen(
    puzzle: Puzzle,
    length: int,
    count: Callable[[str], int],
    filler: Sequence[str],
    rng: np.random.Generator,
) -> LongPuzzle:
    """Return a puzzle of at most `length` tokens, and as near to it as whole lines allow.

    Args:
        puzzle: what to make long.
        length: tokens, the chat template included.
        count: tokens of a text, the chat template included.
        filler: sentences that say nothing of the puzzle, taken in turn from a random one on; as many of the lines that
            are added look like evidence.
        rng: source of places and of the filler's beginning.

    Raises:
        ValueError: the puzzle alone is longer; the message names its tokens.
    """
    start = int(rng.integers(len(filler))) if filler else 0
    made: list[str] = []
    coins: list[bool] = []
    # Places are drawn once: while the length is looked for, the evidence must not wander.
    places = rng.random(len(puzzle.lines))
    if not puzzle.shuffled:
        places.sort()

    def added(number: int) -> list[str]:
        while len(made) < number:
            coins.append(not filler or bool(rng.random() < 0.5))
            made.append(puzzle.alike() if coins[-1] else filler[(start + len(made)) % len(filler)].strip())
        return made[:number]

    def lay_out(number: int) -> LongPuzzle:
        extra, lines, last = added(number), [], 0
        for i in np.argsort(places, kind="stable"):
            # Places are shares of the whole, so a line keeps its depth whatever the length.
            cut = int(places[i] * (number + 1))
            lines += [*extra[last:cut], puzzle.lines[i].text]
            last = cut
        lines += extra[last:]
        spans, at = [], len(puzzle.header) + 2
        for line in lines:
            spans.append((at, at + len(line)))
            at += len(line) + 1
        text = "\n\n".join([puzzle.header, "\n".join(lines), puzzle.question])
        return LongPuzzle(puzzle, text, (*spans, (len(text) - len(puzzle.question), len(text))))

    least = count(lay_out(0).text)
    if least > length:
        raise ValueError(
            f"`lengths` must be at least {least} tokens for the task {puzzle.task!r}, got {length}. Set a larger one."
        )
    # Tokens rise almost evenly with the lines: a guess along the line through two measured points needs a few counts
    # where bisection needs twenty, each of which tokenises up to a million tokens.
    low, below, high, above = 0, least, 0, 0
    guess = 64
    while length - below > max(SLACK, length // 500) and (not high or high - low > 1):
        tokens = count(lay_out(guess).text)
        if tokens <= length:
            low, below = guess, tokens
        else:
            high, above = guess, tokens
        if high:
            guess = low + round((high - low) * (length - below) / (above - below))
            guess = min(max(guess, low + 1), high - 1)
        else:
            guess = low + 1 + int((length - below) * low / (below - least))
    return lay_out(low)


def named_in(answer: str) -> set[str]:
    """Return the names, numbers and "unanswerable" that an answer holds; 1,234 is 1234.

    >>> sorted(named_in("It is BRELMOK, not 1,234."))
    ['1234', 'BRELMOK']
    """
    # Names are invented capitals, so whatever a model says around them is passed over.
    found = _ITEM.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer))
    return {item.lower() if item.lower() == UNANSWERABLE else item for item in found}


def set_f1(answer: str, references: Sequence[str]) -> float:
    """Return how well the names in an answer agree with the references: F1, 0 to 1.

    >>> set_f1("BRELMOK and TARNIKU", ["BRELMOK"]), set_f1("Nobody knows.", ["BRELMOK"])
    (0.6666666666666666, 0.0)
    >>> set_f1("Unanswerable.", ["unanswerable"])
    1.0
    """
    found, wanted = named_in(answer), set(references)
    return 2 * len(found & wanted) / (len(found) + len(wanted)) if found else 0.0
