"""One row of the `chat` configuration from one accepted context: choose distractors, compose, record."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from hf_longalign.synthesis.checks import NEUTRALISED, PASSED, Check
from hf_longalign.synthesis.compose import BudgetError, Composition, Piece, Ruler, compose
from hf_longalign.synthesis.disk import table_row
from hf_longalign.synthesis.outcome import SCORES
from hf_longalign.synthesis.pool import Pool, offer
from hf_longalign.synthesis.tasks import find_task, prompt_parts
from hf_longalign.synthesis.tokens import TokenCounter
from hf_longalign.text import digest


# Where more than this share of the other contexts could be meant, the instruction does not tell which one is.
_VAGUE_SHARE = 0.2
_VAGUE_SAMPLE = 50


@dataclass(frozen=True)
class _Begun:
    """What is decided about a row before its distractors are chosen, and which texts were looked at for it since."""

    record: dict[str, Any]
    rng: np.random.Generator
    conflicts: Callable[[int], bool]
    reference: str | None
    prompt: tuple[str, str]
    offered: dict[str, int] = field(default_factory=dict)
    passed_over: list[int] = field(default_factory=list)

    @property
    def named(self) -> bool:
        return self.reference is not None


@dataclass
class Composer:
    """Composes rows of a pool. A row depends on the seed, the pool and the row's own id alone.

    Attributes:
        sources: where distractors come from, the preferred source first.
        limit: distractors per row; `None` for as many as fit into the budget.
        budget: tokens per row, counted by `counter`; `None` for no budget.
        reference: "auto", "all" or "none".
        nearest: int32 `(rows, sources, neighbours)`, the closest texts of every row, -1 where there are no more;
            `None` without hard distractors.
    """

    pool: Pool
    sources: tuple[str, ...] = ("same_task",)
    limit: int | None = 9
    counter: TokenCounter | None = None
    budget: int | None = None
    reference: str = "auto"
    nearest: np.ndarray | None = None
    hard_share: float = 0.0
    avoid_conflicts: bool = True
    seed: int = 0
    _tokens: dict[tuple[int, bool], int] = field(default_factory=dict)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row of the gold context `index`.

        Raises:
            BudgetError: the context and its prompt alone exceed the budget.
        """
        begun = self._begin(index)
        return self._to_row(begun, self._compose(index, begun, self._candidates(index, begun), self.limit))

    def over_budget(self, index: int) -> str | None:
        """Return why `row` would raise `BudgetError`, or `None` if it would not."""
        try:
            self._compose(index, self._begin(index), iter(()), limit=0)
        except BudgetError as error:
            return str(error)
        return None

    def _compose(self, index: int, begun: _Begun, candidates: Iterator[Piece], limit: int | None) -> Composition:
        counter, ruler, answer = self.counter, None, begun.record["answer"]
        if counter is not None and self.budget is not None:
            ruler = Ruler(self.budget, counter.count, lambda text: counter.count_chat(to_messages(text, answer)))
        gold = self._piece(index, begun.named)
        return compose(gold, candidates, begun.prompt, begun.rng, limit=limit, ruler=ruler)

    def _begin(self, index: int) -> _Begun:
        record = table_row(self.pool.table, index)
        # By the row's id, never one generator for all: rows are made by many processes in any order, and must be the
        # same.
        rng = np.random.default_rng(int(digest("compose", str(self.seed), record["seed_id"]), 16))
        task, conflicts = find_task(record["task"]), self.pool.conflict(index)
        # One context alone needs no name. A summary's instruction never tells which text is meant; any other is tried
        # on a sample: where many could be meant, it does not tell either.
        named = self.reference == "all" or (self.reference == "auto" and self.limit != 0 and task.is_summary)
        if self.reference == "auto" and self.limit != 0 and not task.is_summary:
            others = offer(self.pool.groups(index, ("same_task",)), rng, own=index)
            sample = [conflicts(other) for other in islice(others, _VAGUE_SAMPLE)]
            named = sum(sample) > _VAGUE_SHARE * len(sample)
        reference = self.pool.reference(index, task.noun) if named else None
        return _Begun(record, rng, conflicts, reference, prompt_parts(task, record["instruction"], reference))

    def _candidates(self, index: int, begun: _Begun) -> Iterator[Piece]:
        nearest, hard_share = (self.nearest[index], self.hard_share) if self.nearest is not None else ((), 0.0)
        groups = self.pool.groups(index, self.sources)
        for other in offer(groups, begun.rng, own=index, nearest=nearest, hard_share=hard_share):
            # A prompt that names its context may hold rivals, which makes it harder; two of one name would not be told
            # apart.
            if begun.named:
                unfit = self.pool.name(other) == self.pool.name(index)
            else:
                unfit = self.avoid_conflicts and begun.conflicts(other)
            if unfit:
                begun.passed_over.append(other)
            else:
                begun.offered[self.pool.ids[other]] = other
                yield self._piece(other, begun.named)

    def _piece(self, index: int, named: bool) -> Piece:
        text = f"{self.pool.name(index)}\n{self.pool.text(index)}" if named else self.pool.text(index)
        tokens = 0
        if self.counter is not None and self.budget is not None:
            if (index, named) not in self._tokens:
                # A context distracts in many rows: counting it anew each time would take most of the time of
                # composing.
                self._tokens[index, named] = self.counter.count(text)
            tokens = self._tokens[index, named]
        return Piece(text, self.pool.ids[index], tokens)

    def _to_row(self, begun: _Begun, made: Composition) -> dict[str, Any]:
        record = begun.record
        messages = to_messages(made.content, record["answer"])
        context_tokens = total_tokens = None
        if self.counter is not None:
            total_tokens = made.tokens or self.counter.count_chat(messages)
            # The tokens of contexts as the difference of two whole chats: the template's own tokens belong to neither.
            bare = made.content[: made.contexts[0][0]] + made.content[made.question[0] :]
            context_tokens = total_tokens - self.counter.count_chat(to_messages(bare, record["answer"]))
        checks = record["checks"]
        if any(self.pool.neutralised[begun.offered[source]] for source in made.sources if source in begun.offered):
            # The row's own text has said so already; this says it of the others.
            kept_checks = [check for check in checks if check["name"] != "control_tokens"]
            checks = [*kept_checks, asdict(Check("control_tokens", NEUTRALISED, "in a distractor"))]
        if self.avoid_conflicts:
            checks = [*checks, asdict(Check("conflict", PASSED, f"{len(begun.passed_over)} passed over"))]
        kept = ("seed_id", "generator", "model", "prompt_hash", "journal_keys", "attempts", *SCORES)
        return {
            "messages": messages,
            "parts": [
                {"message": 0, "start": start, "end": end, "kind": kind}
                for kind, spans in (("context", made.contexts), ("question", [made.question]))
                for start, end in spans
            ],
            **{name: record[name] for name in ("task", "instruction", "answer", *kept)},
            "reference": begun.reference,
            "gold_index": made.gold_index,
            "gold_depth": made.gold_depth,
            "n_contexts": len(made.contexts),
            "context_tokens": context_tokens,
            "total_tokens": total_tokens,
            "context_ids": list(made.sources),
            "checks": checks,
        }


def to_messages(content: str, answer: str) -> list[dict[str, str]]:
    """Return the conversation of a prompt and its answer."""
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
