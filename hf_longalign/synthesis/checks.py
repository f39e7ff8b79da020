"""The checks of one context. Each has a name, can be left out, and says what is wrong in words a model can act on.

Checks that compare contexts with each other live elsewhere: near-duplicates in `selection`, conflicts between a gold
context and its distractors in `pool`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

from hf_longalign.lazy import require
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tokens import ControlTokens
from hf_longalign.text import UNSPACED, content_of, holds, normalise, word_count


PASSED, FAILED, OPEN, NEUTRALISED = "passed", "failed", "open", "neutralised"

# Only at the beginning (see `_REFUSAL_WINDOW`): people in a story may say that they cannot help.
_REFUSAL = re.compile(
    r"\bas an ai\b|\blanguage model\b|\bI(?:'m| am) sorry, but I\b|"
    r"\bI (?:cannot|can't|can not|won't|am unable to|am not able to) "
    r"(?:assist|help|fulfil|fulfill|comply|provide|write|create|generate)\b|"
    r"作为(?:一个|一名)?(?:AI|人工智能|语言模型)|(?:抱歉|对不起)[，,。 ]{0,2}我(?:无法|不能)|"
    r"(?:申し訳|すみません).{0,20}(?:できません|できかねます)|죄송.{0,20}(?:없습니다|어렵습니다)|ขออภัย.{0,20}ไม่สามารถ",
    re.IGNORECASE,
)
# Words of the prompts in `prompts`, which a written text has no reason to hold.
_META = re.compile(
    r"^\W*(?:question|answer|instruction|evidence|distraction|note)\W*:|"
    r"\b(?:missing|provided|above|following) context\b|\bthis (?:context|text) (?:provides|contains|supports)\b|"
    r"\bword count\b|\bleads? to the answer\b|\bdistracting (?:detail|information)\b|"
    r"\[(?:insert|continue|missing)[^\]]*\]|<(?:the text|fact|section \d+)>",
    re.IGNORECASE | re.MULTILINE,
)
# What assistants say when they are done. In a story it would stand in quotation marks, and more would follow it.
_CHATTER = re.compile(
    r"(?:^|\n|[.!?…。！？]\s*)[\s*_#>(-]*("
    r"(?:please )?(?:feel free to|let me know|do not hesitate to|don't hesitate to|if you(?:'d| would) like|"
    r"if you need any (?=adjust|chang|edit|modif|revis)|would you like|i hope this|i can also|"
    r"(?:i'd be |i am |i'm )?happy to)\b[^\n\"”“]{0,60}?\b"
    r"(?:me\b|any\b|more|further|another|other|additional|adjust|expand|revis|chang|edit|modif|helps|meets|"
    r"longer|shorter|version|questions|you think|the text|this text|the context)"
    r"|n'hésitez pas à me|dites-moi si|lassen sie mich wissen|geben sie mir bescheid|avísame si|hágame saber"
    r"|如果(?:您|你)?(?:需要|还需要|想)|(?:希望|请)(?:这|随时|告诉我)|ご(?:要望|希望|不明)|お(?:知らせ|気軽に)|"
    r"도움이 (?:되|필요)|필요하시면|หากคุณต้องการ)[^\n\"”“]*\s*$",
    re.IGNORECASE,
)
_ENDING_CHARACTERS = 400
# Ends of sentences in the scripts that seeds were seen in, closing quotes and brackets, list items and digits.
_ENDED = re.compile(r"[.!?…。！？｡؟۔।။។:;\"'”’»)\]|*_`\-\d」』）】〉》]$")
# Thai and Lao put no mark behind a sentence.
_MARKLESS = re.compile(r"[\u0e00-\u0eff]$")
_UNSPACED = re.compile(f"[{UNSPACED}]")

# Answers that decide rather than say something, in the languages that seeds were seen in.
_VERDICT_WORDS = (
    "yes no true false unanswerable none ja nein oui non sí da да нет 예 네 아니요 아니오 ใช่ ไม่ใช่ ไม่ มี ไม่มี はい "
    "いいえ 是 是的 不是 否 对 不对 有 没有 会 不会 能 不能 無"
)
VERDICTS = frozenset(map(normalise, _VERDICT_WORDS.split()))
# "in the year 634" says no more than "634".
_WEAK = frozenset(["year", "years", "day", "month", "date", "century", "called", "named", "around", "approximately"])
_REFUSAL_WINDOW = 300
_LEAST_LEAK_WORDS = 4
_SHORT_WORDS = 3
_PHRASE_WORDS = 10

_LETTER = re.compile(r"[^\W\d_]")
_LEAST_LETTERS = 60
_LANGUAGE_SAMPLE = 1500


@dataclass(frozen=True)
class Check:
    """One check's result: "passed", "failed", "open" where it cannot tell, "neutralised"; `detail` says why."""

    name: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Rules:
    """What a context is held to: names of checks, limits in words, a two-letter code of the language.

    Where `language` is `None` that check stays open; `control` are the marks of chat templates it must not hold.
    """

    checks: tuple[str, ...]
    min_words: int = 1
    max_words: int | None = None
    language: str | None = None
    control: ControlTokens = field(default_factory=ControlTokens)


@dataclass(frozen=True)
class _Text:
    """A context on its way through the checks."""

    context: str
    seed: Seed
    rules: Rules
    finish_reason: str | None = None
    title: str | None = None

    @cached_property
    def normalised(self) -> str:
        """The context as answers and instructions are looked for in it."""
        return normalise(self.context)


def verify_context(
    context: str,
    seed: Seed,
    rules: Rules,
    *,
    written: bool,
    finish_reason: str | None = None,
    title: str | None = None,
) -> list[Check]:
    """Run the checks of `rules` on a context; a text that no model has `written` cannot refuse or be cut off.

    `finish_reason` says why the model stopped: "length" means in mid-sentence.
    """
    text = _Text(context, seed, rules, finish_reason, title)
    skipped = () if written else _OF_WRITTEN
    return [_OF_ONE[name](text) for name in rules.checks if name in _OF_ONE and name not in skipped]


def failures(checks: list[Check]) -> str:
    """Return what failed, as the reason of a rejection and of the next attempt; empty if nothing did."""
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if check.outcome == FAILED)


def complete(text: _Text) -> Check:
    """Ends where a sentence does."""
    end = text.context.rstrip()
    # Whatever its last character: a text can be cut off right behind a sentence.
    if text.finish_reason == "length":
        return Check("complete", FAILED, "it was cut off at the reply's length limit; write a shorter text")
    if _MARKLESS.search(end):
        return Check("complete", OPEN, "its script marks no end of a sentence")
    if not _ENDED.search(end):
        return Check("complete", FAILED, f"it breaks off with {end[-40:]!r}")
    return Check("complete", PASSED)


def refusal(text: _Text) -> Check:
    """Does not begin with an assistant's refusal."""
    match = _REFUSAL.search(text.context[:_REFUSAL_WINDOW])
    return Check("refusal", FAILED, f"it refuses: {match[0]!r}") if match else Check("refusal", PASSED)


def meta(text: _Text) -> Check:
    """Does not speak of the task, nor to the reader at its end."""
    match = _META.search(text.context)
    if match:
        return Check("meta", FAILED, f"it speaks of the task: {match[0].strip()!r}")
    match = _CHATTER.search(text.context[-_ENDING_CHARACTERS:])
    if match:
        return Check("meta", FAILED, f"it ends with a remark to the reader: {match[1]!r}")
    return Check("meta", PASSED)


def length(text: _Text) -> Check:
    """Has as many words as it should."""
    words, rules = word_count(text.context), text.rules
    if words < rules.min_words:
        return Check("length", FAILED, f"it has {words} words, at least {rules.min_words} are needed")
    if rules.max_words is not None and words > rules.max_words:
        return Check("length", FAILED, f"it has {words} words, at most {rules.max_words} are allowed")
    return Check("length", PASSED, f"{words} words")


def support(text: _Text) -> Check:
    """The answer word for word; a short one by its words close together, a longer one by the share of them."""
    answer, context = normalise(text.seed.answer), text.normalised
    # Comparing words cannot tell of a verdict, nor of an answer of function words alone.
    if answer in VERDICTS:
        return Check("support", OPEN, f"{answer!r} can only be judged")
    # An answer of signs alone ('+', '€') normalises to nothing and is looked for as it is.
    if holds(context, answer) if answer else text.seed.answer in text.context:
        return Check("support", PASSED, "word for word")
    words = content_of(answer) - _WEAK
    if not words - VERDICTS:
        return Check("support", OPEN, f"{_short(text.seed.answer)!r} has no word to compare: it can only be judged")
    unspaced = bool(_UNSPACED.search(answer))
    length = word_count(text.seed.answer) if unspaced else len(answer.split())
    share = len(words & content_of(context)) / len(words)
    if length <= _SHORT_WORDS and share == 1 and _close(context.split(), words):
        return Check("support", PASSED, "its words, close together")
    # 10 words may be put in other words in part; a summary is new words in a larger part. With 0.4, 94 % of the 150
    # published MultiNews summaries pass with their own articles, and 2 % with the next row's. Without blanks, pairs of
    # characters are compared: a word in other words takes the pairs at its edges along.
    least = (0.6 if unspaced else 0.8) if length <= _PHRASE_WORDS else (0.25 if unspaced else 0.4)
    if length > _SHORT_WORDS and share >= least:
        return Check("support", PASSED, f"{share:.2f} of the answer's words")
    return Check("support", FAILED, f"it does not hold what the answer {_short(text.seed.answer)!r} says")


def _close(context: list[str], words: set[str]) -> bool:
    """Whether all the words stand within a few words of each other."""
    if len(words) == 1:
        return True
    # All far away before the first is seen, so that the spread is too large until every word was.
    reach, last = 3 * len(words) + 2, dict.fromkeys(words, -len(context) - 100)
    for place in range(len(context)):
        # Where there are no blanks, two or four characters stand for a word.
        for length in (1, 2, 4):
            found = "".join(context[place : place + length])
            if found in last:
                last[found] = place
                if place - min(last.values()) <= reach:
                    return True
    return False


def leak(text: _Text) -> Check:
    """Does not repeat the instruction."""
    if word_count(text.seed.instruction) < _LEAST_LEAK_WORDS:
        return Check("leak", OPEN, "the instruction is too short to tell")
    if holds(text.normalised, normalise(text.seed.instruction)):
        return Check("leak", FAILED, "it repeats the instruction word for word")
    return Check("leak", PASSED)


def language(text: _Text) -> Check:
    """Is written in the language asked for."""
    found, wanted = identify_language(text.context), text.rules.language
    if wanted is None or found is None:
        return Check("language", OPEN, "too little text to tell")
    if found != wanted:
        return Check("language", FAILED, f"it is written in {found!r}, not in {wanted!r}")
    return Check("language", PASSED, found)


def control_tokens(text: _Text) -> Check:
    """Holds no mark of a chat template, nor does its seed."""
    seed = text.seed
    for part in (text.context, text.title or "", seed.instruction, seed.answer):
        found = text.rules.control.find(part)
        if found:
            return Check("control_tokens", FAILED, f"it holds {found[0]!r}, a mark of a chat template; leave it out")
    if seed.neutralised:
        return Check("control_tokens", NEUTRALISED, f"{seed.neutralised} in the seed")
    return Check("control_tokens", PASSED)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


@lru_cache(maxsize=1)
def _identifier() -> Any:
    langid = require("py3langid.langid", "synthesis")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


def identify_language(text: str) -> str | None:
    """Return the two-letter code of the language of `text` by py3langid, or `None` where it is too short to tell."""
    sample = text[:_LANGUAGE_SAMPLE]
    # Stopped at the limit: the sample is asked for each of some hundred thousand texts.
    letters = sum(1 for _ in islice(_LETTER.finditer(sample), _LEAST_LETTERS))
    # A character without blanks tells as much as three letters.
    if letters < _LEAST_LETTERS and letters + 2 * len(_UNSPACED.findall(sample)) < _LEAST_LETTERS:
        return None
    return str(_identifier().classify(sample)[0])


def majority_language(texts: Iterable[str]) -> str | None:
    """Return the language of most texts, joined since instructions are too short to be told one by one, or `None`."""
    # Twenty samples of 1,500 characters settle it; the classifier takes milliseconds for each.
    pieces = [""]
    for text in texts:
        if len(pieces[-1]) >= _LANGUAGE_SAMPLE:
            if len(pieces) == 20:
                break
            pieces.append("")
        pieces[-1] += f"{text[:_LANGUAGE_SAMPLE]} "
    found = Counter(language for language in map(identify_language, pieces) if language)
    return found.most_common(1)[0][0] if found else None


_OF_WRITTEN = ("complete", "refusal", "meta")
_OF_ONE: dict[str, Callable[[_Text], Check]] = {
    "complete": complete,
    "refusal": refusal,
    "meta": meta,
    "length": length,
    "support": support,
    "leak": leak,
    "language": language,
    "control_tokens": control_tokens,
}

# "parse" cannot be left out: a reply that cannot be read has no context. "judge" asks a model, so it is off at first.
CHECKS = (*_OF_ONE, "duplicate", "conflict", "judge")
DEFAULT_CHECKS = tuple(name for name in CHECKS if name != "judge")
