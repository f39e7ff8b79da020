"""What became of one seed, and the columns in which it and the rows to train on are kept.

The configurations: `chat` to train on, `contexts` and `rejected` to see where it comes from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Features, Value

from hf_longalign.synthesis.checks import Check
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.text import word_count


CONFIGS = ("chat", "contexts", "rejected")
SCORES = ("closed_book", "answer_loss", "answerable_with", "answerable_without")

_TEXT, _COUNT, _SHARE = Value("string"), Value("int32"), Value("float64")
_PROVENANCE = {
    **dict.fromkeys(("seed_id", "generator", "model", "prompt_hash"), _TEXT),
    "journal_keys": [_TEXT],
    "attempts": _COUNT,
    "checks": [{"name": _TEXT, "outcome": _TEXT, "detail": _TEXT}],
    **dict.fromkeys(SCORES, _SHARE),
}
_CONTEXTS = {
    **dict.fromkeys(("task", "instruction", "answer", "title", "context"), _TEXT),
    "words": _COUNT,
    "origin": _TEXT,
    **_PROVENANCE,
}
# `parts` are characters of a message, for the trainer; the rest says where the row is from, and is not trained on.
_CHAT = {
    "messages": [{"role": _TEXT, "content": _TEXT}],
    "parts": [{"message": _COUNT, "start": _COUNT, "end": _COUNT, "kind": _TEXT}],
    **dict.fromkeys(("task", "instruction", "answer", "reference"), _TEXT),
    "gold_index": _COUNT,
    "gold_depth": _SHARE,
    **dict.fromkeys(("n_contexts", "context_tokens", "total_tokens"), _COUNT),
    "context_ids": [_TEXT],
    **_PROVENANCE,
}
_FEATURES = {"chat": _CHAT, "contexts": _CONTEXTS, "rejected": {**_CONTEXTS, "reason": _TEXT}}


@dataclass(frozen=True)
class Provenance:
    """Where a context comes from; of a given text nothing but the kind "documents" is known.

    `prompt_hash` is a digest of the last prompt, `journal_keys` are those of all replies in the order they were asked
    for, and `attempts` is how many times it was begun.
    """

    generator: str = "documents"
    model: str = ""
    prompt_hash: str = ""
    journal_keys: tuple[str, ...] = ()
    attempts: int = 0


@dataclass(frozen=True)
class Outcome:
    """One seed with its context.

    Attributes:
        context: the text; of a rejected seed the last one that was tried, or empty.
        reason: why the seed was rejected; empty for one that goes into the data.
        scores: measured difficulty and answerability by name.
    """

    seed: Seed
    context: str = ""
    title: str | None = None
    reason: str = ""
    checks: tuple[Check, ...] = ()
    provenance: Provenance = Provenance()
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether the seed goes into the data."""
        return not self.reason


def accepted(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the indices of the accepted outcomes."""
    return [number for number, outcome in enumerate(outcomes) if outcome.accepted]


def features(config_name: str) -> Features:
    """Return the columns of a configuration."""
    return Features(_FEATURES[config_name])


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as a row of `rejected`, the configuration with the most columns."""
    return {
        **{name: getattr(outcome.seed, name) for name in ("seed_id", "task", "instruction", "answer", "origin")},
        "title": outcome.title,
        "context": outcome.context,
        "words": word_count(outcome.context),
        **asdict(outcome.provenance),
        "checks": list(map(asdict, outcome.checks)),
        **{name: outcome.scores.get(name) for name in SCORES},
        "reason": outcome.reason,
    }


def general_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of general data with the columns of `chat`; what it does not have is null."""
    # Lists are empty and not null: readers loop over them.
    filled: dict[str, Any] = dict.fromkeys(_CHAT)
    return {**filled, "parts": [], "context_ids": [], "journal_keys": [], "checks": [], "n_contexts": 0, **row}
