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
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from hf_longalign.synthesis.checks import NEUTRALISED, PASSED, Check
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.disk import table_row
from hf_longalign.synthesis.outcome import SCORES
from hf_longalign.synthesis.pool import Pool, offer
from hf_longalign.synthesis.tasks import find_task, prompt_parts
from hf_longalign.synthesis.tokens import TokenCounter
from hf_longalign.text import digest, sentence_ends


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
    """One context: its text, its index in the pool, and its tokens (0 where none are counted)."""

    text: str
    source: int
    tokens: int = 0


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
        sources: the index of each context in the pool.
        gold_depth: the share of the distractors' characters that stands before the gold context, 0.0 to 1.0.
        tokens: tokens of the whole sample; 0 without a budget.
    """

    content: str
    contexts: tuple[tuple[int, int], ...]
    question: tuple[int, int]
    sources: tuple[int, ...]
    gold_index: int
    gold_depth: float
    tokens: int = 0


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
        limit: at most so many distractors; `None` for as many as there are, or fit.
        ruler: the budget; the sample never exceeds it and is at most 2 % shorter while there are candidates.

    Raises:
        BudgetError: the gold context alone exceeds the budget.

    >>> pieces = iter([Piece("Red.", 1), Piece("Blue.", 2)])
    >>> made = compose(Piece("Green.", 0), pieces, ("Text:\\n", "Which?"), np.random.default_rng(0), limit=2)
    >>> made.content
    'Text:\\nRed.\\n\\nGreen.\\n\\nBlue.\\n\\nWhich?'
    >>> made.gold_index, [made.content[start:end] for start, end in made.contexts]
    (1, ['Red.', 'Green.', 'Blue.'])
    """
    if ruler is None:
        return _arrange(gold, list(islice(candidates, limit)), prompt, rng)
    # The gold context alone first: a row that cannot be made must not use up candidates.
    made = _fit(gold, [], prompt, rng, ruler)
    if made.tokens > ruler.budget:
        raise BudgetError(f"the gold context and its prompt have {made.tokens} tokens, the budget is {ruler.budget}")
    # A token more than the separator has: joining can split what was one token.
    joint = ruler.count(SEPARATOR) + 1
    chosen: list[Piece] = []
    # More than once, since counts of pieces do not add up: what `_fit` had to shorten leaves room again.
    while made.tokens < (1 - FILL_TOLERANCE) * ruler.budget:
        room, added = ruler.budget - made.tokens, []
        for piece in islice(candidates, None if limit is None else limit - len(chosen)):
            room -= joint + piece.tokens
            if room < 0:  # the first that does not fit is cut to what is left
                left = room + piece.tokens
                shorter = _cut(piece, left, ruler) if left >= _LEAST_CUT_TOKENS else None
                added += [shorter] if shorter else []
                break
            added.append(piece)
        if not added:
            break
        chosen += added
        made = _fit(gold, chosen, prompt, rng, ruler)
    return made


def _fit(
    gold: Piece, chosen: list[Piece], prompt: tuple[str, str], rng: np.random.Generator, ruler: Ruler
) -> Composition:
    """Arrange the pieces; as long as the whole is too long, shorten the last one taken, at the end leave it out."""
    while True:
        made = _arrange(gold, chosen, prompt, rng)
        made = replace(made, tokens=ruler.measure(made.content))
        if made.tokens <= ruler.budget or not chosen:
            return made
        last = chosen.pop()
        shorter = _cut(last, last.tokens - (made.tokens - ruler.budget), ruler)
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
    return Piece(text, piece.source, ruler.count(text)) if text else None


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
    )


# Where more than this share of the other contexts could be meant, the instruction does not tell which one is.
_VAGUE_SHARE = 0.2
_VAGUE_SAMPLE = 50


@dataclass(frozen=True)
class _Begun:
    """What is decided about a row before its distractors are chosen, and which texts were passed over since."""

    record: dict[str, Any]
    rng: np.random.Generator
    conflicts: Callable[[int], bool]
    reference: str | None
    prompt: tuple[str, str]
    passed_over: list[int] = field(default_factory=list)


@dataclass
class Composer:
    """Composes rows of a pool. A row depends on the options, the pool and the row's own id alone.

    Attributes:
        counter: counts tokens; `None` where nobody asks for their number.
        nearest: int32 `(rows, sources, neighbours)`, the closest texts of every row, -1 where there are no more;
            `None` without hard distractors.
    """

    pool: Pool
    options: SynthesisOptions
    counter: TokenCounter | None
    nearest: np.ndarray | None
    _tokens: dict[tuple[int, bool], int] = field(default_factory=dict)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row of the gold context `index`; a `BudgetError` where it alone exceeds the budget."""
        begun = self._begin(index)
        made = self._compose(index, begun, self._candidates(index, begun))
        record, messages = begun.record, to_messages(made.content, begun.record["answer"])
        context_tokens = total_tokens = None
        if self.counter is not None:
            total_tokens = made.tokens or self.counter.count_chat(messages)
            # The tokens of contexts as the difference of two whole chats: the template's own tokens belong to neither.
            bare = made.content[: made.contexts[0][0]] + made.content[made.question[0] :]
            context_tokens = total_tokens - self.counter.count_chat(to_messages(bare, record["answer"]))
        checks = record["checks"]
        # The row's own text has said so already; this says it of the others.
        if any(self.pool.neutralised[source] for source in made.sources if source != index):
            kept_checks = [check for check in checks if check["name"] != "control_tokens"]
            checks = [*kept_checks, asdict(Check("control_tokens", NEUTRALISED, "in a distractor"))]
        if "conflict" in self.options.checks:
            checks = [*checks, asdict(Check("conflict", PASSED, f"{len(begun.passed_over)} passed over"))]
        kept = ("seed_id", "generator", "model", "prompt_hash", "journal_keys", "attempts", *SCORES)
        parts = [*(("context", span) for span in made.contexts), ("question", made.question)]
        return {
            "messages": messages,
            "parts": [{"message": 0, "start": start, "end": end, "kind": kind} for kind, (start, end) in parts],
            **{name: record[name] for name in ("task", "instruction", "answer", *kept)},
            "reference": begun.reference,
            "gold_index": made.gold_index,
            "gold_depth": made.gold_depth,
            "n_contexts": len(made.contexts),
            "context_tokens": context_tokens,
            "total_tokens": total_tokens,
            "context_ids": [self.pool.ids[source] for source in made.sources],
            "checks": checks,
        }

    def over_budget(self, index: int) -> str | None:
        """Return why `row` would raise `BudgetError`, or `None` if it would not."""
        try:
            self._compose(index, self._begin(index), iter(()))
        except BudgetError as error:
            return str(error)
        return None

    def _compose(self, index: int, begun: _Begun, candidates: Iterator[Piece]) -> Composition:
        counter, budget, ruler, answer = self.counter, self.options.target_tokens, None, begun.record["answer"]
        if counter is not None and budget is not None:
            ruler = Ruler(budget, counter.count, lambda text: counter.count_chat(to_messages(text, answer)))
        gold, limit = self._piece(index, begun.reference is not None), self.options.distractor_limit
        return compose(gold, candidates, begun.prompt, begun.rng, limit=limit, ruler=ruler)

    def _begin(self, index: int) -> _Begun:
        record, options = table_row(self.pool.table, index), self.options
        # By the row's id, never one generator for all: rows are made by many processes in any order, and must be the
        # same.
        rng = np.random.default_rng(int(digest("compose", str(options.seed), record["seed_id"]), 16))
        task, conflicts = find_task(record["task"]), self.pool.conflict(index)
        named = options.reference == "all"
        if options.reference == "auto" and options.distractor_limit != 0:  # one context alone needs no name
            # A summary's instruction never tells which text is meant; any other is tried on a sample: where many could
            # be meant, it does not tell either.
            others = offer(self.pool.groups(index, ("same_task",)), rng, own=index)
            sample = [] if task.is_summary else [conflicts(other) for other in islice(others, _VAGUE_SAMPLE)]
            named = task.is_summary or sum(sample) > _VAGUE_SHARE * len(sample)
        reference = self.pool.reference(index, task.noun) if named else None
        return _Begun(record, rng, conflicts, reference, prompt_parts(task, record["instruction"], reference))

    def _candidates(self, index: int, begun: _Begun) -> Iterator[Piece]:
        options = self.options
        nearest, hard_share = (self.nearest[index], options.hard_share) if self.nearest is not None else ((), 0.0)
        groups = self.pool.groups(index, options.distractor_sources)
        for other in offer(groups, begun.rng, own=index, nearest=nearest, hard_share=hard_share):
            # A prompt that names its context may hold rivals, which makes it harder; two of one name would not be told
            # apart.
            if begun.reference is not None:
                unfit = self.pool.name(other) == self.pool.name(index)
            else:
                unfit = "conflict" in options.checks and begun.conflicts(other)
            if unfit:
                begun.passed_over.append(other)
            else:
                yield self._piece(other, begun.reference is not None)

    def _piece(self, index: int, named: bool) -> Piece:
        text = f"{self.pool.name(index)}\n{self.pool.text(index)}" if named else self.pool.text(index)
        tokens = 0
        if self.counter is not None and self.options.target_tokens is not None:
            if (index, named) not in self._tokens:
                # A context distracts in many rows: counting it anew each time would take most of the time.
                self._tokens[index, named] = self.counter.count(text)
            tokens = self._tokens[index, named]
        return Piece(text, index, tokens)


def to_messages(content: str, answer: str) -> list[dict[str, str]]:
    """Return the conversation of a prompt and its answer."""
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
