"""The columns of the configurations: `chat` to train on, `contexts` and `rejected` to see where it comes from."""

from typing import Any

from datasets import Features, Value

from hf_longalign.synthesis.outcome import Outcome
from hf_longalign.text import word_count


CONFIGS = ("chat", "contexts", "rejected")
SCORES = ("closed_book", "answer_loss", "answerable_with", "answerable_without")

_TEXT, _COUNT, _SHARE = Value("string"), Value("int32"), Value("float64")
_PROVENANCE = {
    "seed_id": _TEXT,
    "generator": _TEXT,
    "model": _TEXT,
    "prompt_hash": _TEXT,
    "journal_keys": [_TEXT],
    "attempts": _COUNT,
    "checks": [{"name": _TEXT, "outcome": _TEXT, "detail": _TEXT}],
    **dict.fromkeys(SCORES, _SHARE),
}
_CONTEXTS = {
    "task": _TEXT,
    "instruction": _TEXT,
    "answer": _TEXT,
    "title": _TEXT,
    "context": _TEXT,
    "words": _COUNT,
    "origin": _TEXT,
    **_PROVENANCE,
}
_CHAT = {
    "messages": [{"role": _TEXT, "content": _TEXT}],
    "parts": [{"message": _COUNT, "start": _COUNT, "end": _COUNT, "kind": _TEXT}],
    "task": _TEXT,
    "instruction": _TEXT,
    "answer": _TEXT,
    "reference": _TEXT,
    "gold_index": _COUNT,
    "gold_depth": _SHARE,
    "n_contexts": _COUNT,
    "context_tokens": _COUNT,
    "total_tokens": _COUNT,
    "context_ids": [_TEXT],
    **_PROVENANCE,
}
_FEATURES = {"chat": _CHAT, "contexts": _CONTEXTS, "rejected": {**_CONTEXTS, "reason": _TEXT}}


def features(config_name: str) -> Features:
    """Return the columns of a configuration.

    Example:

    >>> sorted(features("chat")["parts"].feature)
    ['end', 'kind', 'message', 'start']
    """
    return Features(_FEATURES[config_name])


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as a row of `rejected`, the configuration with the most columns."""
    seed = outcome.seed
    return {
        "task": seed.task,
        "instruction": seed.instruction,
        "answer": seed.answer,
        "title": outcome.title,
        "context": outcome.context,
        "words": word_count(outcome.context),
        "origin": seed.origin,
        "seed_id": seed.seed_id,
        "generator": outcome.provenance.generator,
        "model": outcome.provenance.model,
        "prompt_hash": outcome.provenance.prompt_hash,
        "journal_keys": list(outcome.provenance.journal_keys),
        "attempts": outcome.provenance.attempts,
        "checks": [check.to_dict() for check in outcome.checks],
        **{name: outcome.scores.get(name) for name in SCORES},
        "reason": outcome.reason,
    }


def part(message: int, span: tuple[int, int], kind: str) -> dict[str, Any]:
    """Return one entry of `parts`: characters `start` to `end` of `messages[message]["content"]`."""
    return {"message": message, "start": span[0], "end": span[1], "kind": kind}


def general_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of general data with the columns of `chat`; what it does not have is null."""
    filled: dict[str, Any] = dict.fromkeys(_CHAT)
    return {**filled, "parts": [], "context_ids": [], "journal_keys": [], "checks": [], "n_contexts": 0, **row}
