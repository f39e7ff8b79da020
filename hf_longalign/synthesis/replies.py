"""Reading replies: a reply that does not hold what was asked for is an error with a reason, never data."""

import re

from hf_longalign.synthesis.prompts import Facts, Outline


_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]", re.IGNORECASE)
_THOUGHT_START = re.compile(r"\s*(?:<(?:think|thinking|thought|reasoning)>|\[THINK\])", re.IGNORECASE)
_LABEL = r"^[ \t>#*_]*{label}[ \t*_]*:[ \t*_]*"
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+(\S.*)$", re.MULTILINE)
_SECTION = re.compile(r"^[ \t>#*_]*Section[ \t]+(\d+)[ \t*_]*[:.][ \t*_]*(\S.*)$", re.MULTILINE | re.IGNORECASE)
_VERDICT = re.compile(r"^\W*(supported|not supported|yes|no)\b\W*(.*)", re.IGNORECASE | re.DOTALL)


class ReplyError(ValueError):
    """A reply that cannot be read; the message is the reason given to the model when it is asked again."""


def read_context(text: str) -> tuple[str | None, str]:
    """Return the title, if there is one, and the context of a reply that opens with "Context:".

    Raises:
        ReplyError: the reply has no "Context:", or nothing after it, or anything but a title before it.

    Example:

    >>> read_context("Title: Dams\\nContext:\\nThe dam was built in 1912.")
    ('Dams', 'The dam was built in 1912.')
    """
    before, context = _cut(spoken(text), "Context")
    title, rest = _title(before)
    if rest:
        raise ReplyError(f'it must open with the title and "Context:", but opened with {_start(rest)!r}')
    if not context:
        raise ReplyError('nothing followed "Context:"')
    return title, context


def read_facts(text: str) -> Facts:
    """Return the listed facts.

    Raises:
        ReplyError: no title, or a list is missing or empty.
    """
    before, rest = _cut(spoken(text), "Evidence")
    evidence, distraction = _cut(rest, "Distraction")
    title, _ = _title(before)
    found = [tuple(match.strip() for match in _BULLET.findall(part)) for part in (evidence, distraction)]
    for label, facts in zip(("Evidence", "Distraction"), found, strict=True):
        if not facts:
            raise ReplyError(f'no fact was listed below "{label}:"')
    return Facts(title or "", *found)


def read_outline(text: str, sections: int) -> Outline:
    """Return the plan of a long context.

    Raises:
        ReplyError: the sections are not numbered from 1 to `sections`.
    """
    text = spoken(text)
    plan = _SECTION.findall(text)
    if [int(number) for number, _ in plan] != list(range(1, sections + 1)):
        raise ReplyError(f'the plan must have {sections} lines "Section <number>: ...", got {len(plan)}')
    title, _ = _title(text)
    return Outline(title or "", tuple(line.strip() for _, line in plan))


def read_pair(text: str) -> tuple[str, str]:
    """Return the question and the answer.

    Raises:
        ReplyError: one of them is missing.

    Example:

    >>> read_pair("Question: When?\\nAnswer: In 1912.")
    ('When?', 'In 1912.')
    """
    _, rest = _cut(spoken(text), "Question")
    question, answer = _cut(rest, "Answer")
    if not question or not answer:
        raise ReplyError("the question or the answer was empty")
    return question, answer


def read_verdict(text: str) -> tuple[bool, str]:
    """Return a judge's verdict and its reason.

    Raises:
        ReplyError: the reply opens with none of the words asked for.

    Example:

    >>> read_verdict("Not supported: the text names another year.")
    (False, 'the text names another year.')
    """
    match = _VERDICT.match(spoken(text))
    if match is None:
        raise ReplyError(f"no verdict in {_start(text)!r}")
    return match[1].lower() in ("supported", "yes"), match[2].strip()


def spoken(text: str) -> str:
    """Return a reply without the thoughts some models put in front of it.

    Many chat templates open the thoughts in the prompt, so that a reply holds their end alone, and a thought may draft
    all that is asked for: what stands before the last end of a thought is thought.

    Raises:
        ReplyError: the thoughts have no end.

    Example:

    >>> spoken("I could write <think>Context: ...</think> first.</think>Context: The dam.")
    'Context: The dam.'
    """
    ends = list(_THOUGHT_END.finditer(text))
    if not ends and _THOUGHT_START.match(text):
        raise ReplyError("it ended inside its thoughts")
    return text[ends[-1].end() :].strip() if ends else text.strip()


def _cut(text: str, label: str) -> tuple[str, str]:
    match = re.search(_LABEL.format(label=label), text, re.MULTILINE | re.IGNORECASE)
    if match is None:
        raise ReplyError(f'"{label}:" was missing')
    return text[: match.start()].strip(), text[match.end() :].strip()


def _title(text: str) -> tuple[str | None, str]:
    """The title line, and what else stands in the text."""
    match = re.search(_LABEL.format(label="Title") + "(.*)$", text, re.MULTILINE | re.IGNORECASE)
    if match is None:
        return None, text.strip()
    title = match[1].strip(" \t*_\"'“”.")
    return title or None, (text[: match.start()] + text[match.end() :]).strip()


def _start(text: str) -> str:
    return " ".join(text.split())[:60]
