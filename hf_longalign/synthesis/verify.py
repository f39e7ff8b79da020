"""The checks of one context. Each has a name, can be left out, and says what is wrong in words a model can act on.

Checks that compare contexts with each other live elsewhere: near-duplicates in `duplicates`, conflicts between a gold
context and its distractors in `conflicts`.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from hf_longalign.synthesis.language import identify_language
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.text import content_words, normalise, word_count


PASSED, FAILED, OPEN = "passed", "failed", "open"

_REFUSAL = re.compile(
    r"\bas an ai\b|\blanguage model\b|\bI(?:'m| am) sorry, but I\b|"
    r"\bI (?:cannot|can't|can not|won't|am unable to|am not able to) "
    r"(?:assist|help|fulfil|fulfill|comply|provide|write|create|generate)\b",
    re.IGNORECASE,
)
_META = re.compile(
    r"^\W*(?:question|answer|instruction|evidence|distraction|note)\W*:|"
    r"\b(?:missing|provided|above|following) context\b|\bthis (?:context|text) (?:provides|contains|supports)\b|"
    r"\bword count\b|\bleads? to the answer\b|\bdistracting (?:detail|information)\b|"
    r"\[(?:insert|continue|missing)[^\]]*\]|<(?:the text|fact|section \d+)>",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?…。！？:;\"'”’»)\]|*`\-\d]$")
_UNDECIDABLE = frozenset(("yes", "no", "unanswerable"))
_REFUSAL_WINDOW = 300
_LEAST_LEAK_WORDS = 4


@dataclass(frozen=True)
class Check:
    """One check's result: "passed", "failed", or "open" where it cannot tell; `detail` says why."""

    name: str
    outcome: str
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the check as it stands in a row."""
        return asdict(self)


@dataclass(frozen=True)
class Rules:
    """What a context is held to.

    Attributes:
        checks: the names of the checks to run.
        min_words: fewer words fail.
        max_words: more words fail; `None` for no limit.
        language: two-letter code of the language; `None` leaves the check open.
    """

    checks: tuple[str, ...]
    min_words: int = 1
    max_words: int | None = None
    language: str | None = None


def verify_context(
    context: str, seed: Seed, rules: Rules, *, written: bool, finish_reason: str | None = None
) -> list[Check]:
    """Run the checks of `rules` on a context.

    Args:
        context: the text.
        seed: the pair it is for.
        rules: which checks, with which limits.
        written: whether a model wrote it; a given text cannot refuse, talk about the task or be cut off.
        finish_reason: why the model stopped; "length" means in mid-sentence.

    Example:

    >>> rules = Rules(("length", "support"), min_words=3)
    >>> [str(c.outcome) for c in verify_context("Ada left.", Seed("a", "general", "Who?", "Ada"), rules, written=True)]
    ['failed', 'passed']
    """
    found = []
    for name in rules.checks:
        if name in _WRITTEN_CHECKS and written:
            found.append(_WRITTEN_CHECKS[name](context, finish_reason))
        elif name in _CONTEXT_CHECKS:
            found.append(_CONTEXT_CHECKS[name](context, seed, rules))
    return found


def failures(checks: list[Check]) -> str:
    """Return what failed, as the reason of a rejection and of the next attempt; empty if nothing did."""
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if check.outcome == FAILED)


def _complete(context: str, finish_reason: str | None) -> Check:
    if finish_reason == "length":
        return Check("complete", FAILED, "it was cut off at the reply's length limit; write a shorter text")
    if not _SENTENCE_END.search(context.rstrip()):
        return Check("complete", FAILED, f"it breaks off with {context.rstrip()[-40:]!r}")
    return Check("complete", PASSED)


def _refusal(context: str, finish_reason: str | None) -> Check:
    match = _REFUSAL.search(context[:_REFUSAL_WINDOW])
    return Check("refusal", FAILED, f"it refuses: {match[0]!r}") if match else Check("refusal", PASSED)


def _meta(context: str, finish_reason: str | None) -> Check:
    match = _META.search(context)
    return Check("meta", FAILED, f"it speaks of the task: {match[0].strip()!r}") if match else Check("meta", PASSED)


def _length(context: str, seed: Seed, rules: Rules) -> Check:
    words = word_count(context)
    if words < rules.min_words:
        return Check("length", FAILED, f"it has {words} words, at least {rules.min_words} are needed")
    if rules.max_words is not None and words > rules.max_words:
        return Check("length", FAILED, f"it has {words} words, at most {rules.max_words} are allowed")
    return Check("length", PASSED, f"{words} words")


def _support(context: str, seed: Seed, rules: Rules) -> Check:
    """The answer as it stands, then normalised; a longer answer by the share of its words that the context holds."""
    plain = normalise(seed.answer)
    if plain in _UNDECIDABLE:
        return Check("support", OPEN, f"{plain!r} can only be judged")
    if seed.answer in context:
        return Check("support", PASSED, "string")
    if f" {plain} " in f" {normalise(context)} ":
        return Check("support", PASSED, "normalised")
    words, length = content_words(seed.answer), len(plain.split())
    share = len(words & content_words(context)) / len(words) if words else 0.0
    if share >= _least_share(length):
        return Check("support", PASSED, f"{share:.2f} of the answer's words")
    return Check("support", FAILED, f"it does not hold what the answer {_short(seed.answer)!r} says")


def _least_share(length: int) -> float:
    """Up to 3 words must stand there as they are; 10 may be put in other words; a summary is new words in part.

    With 0.4, 94 % of the 150 published MultiNews summaries pass with their own articles, and 2 % with the next row's.
    """
    if length <= 3:
        return 1.1
    return 0.8 if length <= 10 else 0.4


def _leak(context: str, seed: Seed, rules: Rules) -> Check:
    instruction = normalise(seed.instruction)
    if len(instruction.split()) < _LEAST_LEAK_WORDS:
        return Check("leak", OPEN, "the instruction is too short to tell")
    if f" {instruction} " in f" {normalise(context)} ":
        return Check("leak", FAILED, "it repeats the instruction word for word")
    return Check("leak", PASSED)


def _language(context: str, seed: Seed, rules: Rules) -> Check:
    found = identify_language(context)
    if rules.language is None or found is None:
        return Check("language", OPEN, "too little text to tell")
    if found != rules.language:
        return Check("language", FAILED, f"it is written in {found!r}, not in {rules.language!r}")
    return Check("language", PASSED, found)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


_WRITTEN_CHECKS: dict[str, Callable[[str, str | None], Check]] = {
    "complete": _complete,
    "refusal": _refusal,
    "meta": _meta,
}
_CONTEXT_CHECKS: dict[str, Callable[[str, Seed, Rules], Check]] = {
    "length": _length,
    "support": _support,
    "leak": _leak,
    "language": _language,
}

# "parse" cannot be left out: a reply that cannot be read has no context. "judge" asks a model, so it is off at first.
CHECKS = (*_WRITTEN_CHECKS, *_CONTEXT_CHECKS, "duplicate", "conflict", "judge")
DEFAULT_CHECKS = tuple(name for name in CHECKS if name != "judge")
