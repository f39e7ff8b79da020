"""Composition: one gold context among distractors, in the task's prompt, to a number of contexts or to a token budget.

As in Context Synthesis (https://arxiv.org/abs/2502.15592): the contexts are shuffled and joined by a blank line.
Beyond it: a budget in tokens is filled up, the last distractor being cut to fit, and every offset is known.

    content = head + context_0 + blank line + context_1 ... context_n + blank line + tail
                     ^start  ^end                                       ^question       ^end

Lengths come from the caller: `count(text)` is the number of tokens of a text alone, `measure(content)` that of the
whole chat sample with this user message. Tokenizers are not additive, so pieces are gathered by `count` and the result
is checked by `measure`, once in most cases.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from hf_longalign.text import sentence_ends


SEPARATOR = "\n\n"
FILL_TOLERANCE = 0.02
# So many characters back a blank is looked for; Chinese has none, and is cut where it is.
_WORD_REACH = 80
# Fewer tokens than this are no text worth a separator.
_LEAST_CUT_TOKENS = 4


class BudgetError(ValueError):
    """The gold context alone does not fit into the budget."""


@dataclass(frozen=True)
class Piece:
    """One context: its text, the id of the row it comes from, and its tokens (0 where none are counted).

    `cut` says that the text was shortened to fit.
    """

    text: str
    source: str
    tokens: int = 0
    cut: bool = False


@dataclass(frozen=True)
class Ruler:
    """A budget in tokens and the two ways to hold a text against it."""

    budget: int
    count: Callable[[str], int]
    measure: Callable[[str], int]


@dataclass(frozen=True)
class Composition:
    """A composed prompt. All offsets are characters (code points) of `content`, the user message, the end exclusive.

    Attributes:
        contexts: start and end of every context; `question` those of what follows the contexts.
        sources: the id of the row each context comes from.
        gold_depth: the share of the distractors' characters that stands before the gold context, 0.0 to 1.0.
        cut: the indices of the distractors that were cut to fit: none or one, as a rule.
        tokens: tokens of the whole sample; `None` without a budget.
    """

    content: str
    contexts: tuple[tuple[int, int], ...]
    question: tuple[int, int]
    sources: tuple[str, ...]
    gold_index: int
    gold_depth: float
    cut: tuple[int, ...] = ()
    tokens: int | None = None


def compose(
    gold: Piece,
    candidates: Iterator[Piece],
    prompt: tuple[str, str],
    rng: np.random.Generator,
    *,
    limit: int | None = None,
    ruler: Ruler | None = None,
) -> Composition:
    """Put `gold` among distractors, at a uniformly drawn place.

    Args:
        gold: the context that answers the instruction; never cut.
        candidates: distractors in order of preference; as many as needed are taken.
        prompt: what stands before and after the contexts.
        rng: draws the order.
        limit: at most so many distractors; `None` with a `ruler` for as many as fit.
        ruler: the budget; the sample never exceeds it and is at most 2 % shorter while there are candidates.

    Raises:
        BudgetError: the gold context alone exceeds the budget.
        ValueError: neither `limit` nor `ruler` is given.

    Example:

    >>> pieces = iter([Piece("Red.", "b"), Piece("Blue.", "c")])
    >>> made = compose(Piece("Green.", "a"), pieces, ("Text:\\n", "Which?"), np.random.default_rng(0), limit=2)
    >>> made.content
    'Text:\\nRed.\\n\\nGreen.\\n\\nBlue.\\n\\nWhich?'
    >>> made.gold_index, [made.content[start:end] for start, end in made.contexts]
    (1, ['Red.', 'Green.', 'Blue.'])
    """
    if ruler is None:
        if limit is None:
            raise ValueError(
                "`limit` must be given where there is no budget, got None. Set the number of distractors."
            )
        return _arrange(gold, list(islice(candidates, limit)), prompt, rng)
    # The gold context alone first: a row that cannot be made must not use up candidates.
    made, tokens = _fit(gold, [], prompt, rng, ruler)
    if tokens > ruler.budget:
        raise BudgetError(f"the gold context and its prompt have {tokens} tokens, the budget is {ruler.budget}")
    # A token more than the separator has: joining can split what was one token.
    joint = ruler.count(SEPARATOR) + 1
    chosen: list[Piece] = []
    # More than once, since counts of pieces do not add up: what `_fit` had to shorten leaves room again.
    while tokens < (1 - FILL_TOLERANCE) * ruler.budget:
        places = None if limit is None else limit - len(chosen)
        added = _gather(candidates, ruler.budget - tokens, joint, places, ruler)
        if not added:
            break
        chosen += added
        made, tokens = _fit(gold, chosen, prompt, rng, ruler)
    return made


def _gather(candidates: Iterator[Piece], room: int, joint: int, places: int | None, ruler: Ruler) -> list[Piece]:
    """Take candidates while they fit into `room` tokens; the first that does not is cut to what is left."""
    taken: list[Piece] = []
    for piece in islice(candidates, places):
        room -= joint
        if piece.tokens > room:
            shorter = _cut(piece, room, ruler) if room >= _LEAST_CUT_TOKENS else None
            return [*taken, shorter] if shorter else taken
        taken.append(piece)
        room -= piece.tokens
    return taken


def _fit(
    gold: Piece, chosen: list[Piece], prompt: tuple[str, str], rng: np.random.Generator, ruler: Ruler
) -> tuple[Composition, int]:
    """Arrange the pieces; as long as the whole is too long, shorten the last one taken, at the end leave it out."""
    while True:
        made = _arrange(gold, chosen, prompt, rng)
        tokens = ruler.measure(made.content)
        if tokens <= ruler.budget or not chosen:
            return replace(made, tokens=tokens), tokens
        last = chosen.pop()
        shorter = _cut(last, last.tokens - (tokens - ruler.budget), ruler)
        if shorter:
            chosen.append(shorter)


def _cut(piece: Piece, tokens: int, ruler: Ruler) -> Piece | None:
    """The longest beginning of `piece` of at most so many tokens, ended at a sentence or at least at a word."""
    end = _longest_prefix(piece, tokens, ruler)
    blank = max(piece.text.rfind(char, max(0, end - _WORD_REACH), end) for char in " \n")
    text = piece.text[: blank if blank > 0 else end].rstrip()
    ends = sentence_ends(text)
    # Ending at a sentence may cost half of what the sample may stay below its budget, and no more.
    slack = ruler.budget * FILL_TOLERANCE / 2
    if ends and tokens - ruler.count(text[: ends[-1]]) <= slack:
        text = text[: ends[-1]]
    return Piece(text, piece.source, ruler.count(text), cut=True) if text else None


def _longest_prefix(piece: Piece, tokens: int, ruler: Ruler) -> int:
    """Bisect for nearly the longest prefix, aiming by the piece's characters per token: two or three counts."""
    if tokens <= 0:
        return 0
    low, high, found = 0, len(piece.text), 0
    pace = high / max(1, piece.tokens)
    while high - low > 1 and tokens - found > 1 + ruler.budget * FILL_TOLERANCE / 8:
        middle = min(max(low + int((tokens - found) * pace), low + 1), high - 1)
        count = ruler.count(piece.text[:middle])
        if count <= tokens:
            low, found = middle, count
        else:
            high = middle
            # It overshot: text here is denser in tokens than the piece as a whole. Aim half as far.
            pace = min(pace, (high - low) / 2 / max(1, tokens - found))
    return low


def _arrange(gold: Piece, chosen: list[Piece], prompt: tuple[str, str], rng: np.random.Generator) -> Composition:
    """Shuffle the distractors, put the gold context at a uniformly drawn index, and join."""
    pieces = [chosen[number] for number in rng.permutation(len(chosen))]
    # Drawn by index after the shuffle: uniform over places, whatever the lengths of the distractors.
    gold_index = int(rng.integers(len(chosen) + 1))
    before, others = (sum(len(piece.text) for piece in part) for part in (pieces[:gold_index], pieces))
    pieces.insert(gold_index, gold)
    spans, start = [], len(prompt[0])
    for piece in pieces:
        spans.append((start, start + len(piece.text)))
        start += len(piece.text) + len(SEPARATOR)
    return Composition(
        content=prompt[0] + SEPARATOR.join([*(piece.text for piece in pieces), prompt[1]]),
        contexts=tuple(spans),
        question=(start, start + len(prompt[1])),
        sources=tuple(piece.source for piece in pieces),
        gold_index=gold_index,
        gold_depth=before / others if others else 0.0,
        cut=tuple(number for number, piece in enumerate(pieces) if piece.cut),
    )
