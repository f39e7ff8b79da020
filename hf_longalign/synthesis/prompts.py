"""What a model is asked: to write a context, its facts, its outline and sections, to judge, to answer; and its reply.

The wording is this package's own. It asks for what Context Synthesis asks for (https://arxiv.org/abs/2502.15592): the
evidence that leads to the answer, distracting detail, and one coherent text of both; a reply opens with "Context:".
A reply that does not hold what was asked for is an error with a reason, never data.
"""

import re
from dataclasses import dataclass
from string import Formatter

from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import Task, fill


Messages = tuple[tuple[str, str], ...]  # role and content

TEMPLATE_FIELDS = ("instruction", "answer", "task", "genre", "words", "facts", "format")

_SYSTEM = (
    "You write source texts for reading comprehension. Reply in the requested format and with nothing else: no "
    "greeting, no explanation, no remark about the request."
)
_LOST = """\
An instruction and its correct answer are given below. The person who wrote them had {genre} at hand. That text is \
lost, and you write it anew.

Instruction: {instruction}
Answer: {answer}
"""
_DEMANDS = """\
The text must
1. hold the evidence that leads to the answer, with every name, number and date it rests on, in several places of the \
text rather than in one sentence;
2. hold detail that can distract: people, places, figures and events that resemble the evidence, yet neither \
contradict it nor make another answer right;
3. join both into one coherent text of that kind, about {words} words long, written for its own sake.

Do not repeat the instruction, and do not speak of a question, an answer or a reader who is tested. Write in the \
language of the instruction.
"""
CONTEXT_FORMAT = """\
Format of the reply:
Title: <what the text is about, in a few words>
Context:
<the text>"""
_FACTS = """\
First list what the text will have to say. Evidence: the facts that lead to the answer, one to a line, with every \
name, number and date. Distraction: as many facts that resemble the evidence, yet neither contradict it nor make \
another answer right. Do not write the text yet.

Format of the reply:
Title: <what the text is about, in a few words>
Evidence:
- <fact>
Distraction:
- <fact>"""
_GIVEN_FACTS = """\
Facts the text must hold, each in the place where it reads naturally.
Evidence:
{evidence}
Distraction:
{distraction}
"""
_OUTLINE = """\
The text will be about {words} words long, written in {sections} sections. Plan them: for each a heading and, in \
one or two sentences, what it tells and which of the facts it holds. Spread the evidence over the sections and keep \
distracting detail in each. Do not write the text yet.

Format of the reply:
Title: <what the text is about, in a few words>
Section 1: <heading> | <what it tells>
Section 2: <heading> | <what it tells>"""
_SECTION = """\
The text is written in {sections} sections, by this plan:
{plan}

Write section {number} only, about {words} words long. It goes on from the text before it without repeating it, keeps \
to its names, numbers and dates, and leaves to later sections what the plan gives to them.

The text before it {ends}

Format of the reply:
Context:
<section {number}>"""
_RETRY = "An earlier reply was rejected: {reason}. Reply so that this does not happen again.\n\n"


@dataclass(frozen=True)
class Facts:
    """What a context has to say, listed before it is written."""

    title: str
    evidence: tuple[str, ...]
    distraction: tuple[str, ...]

    def __str__(self) -> str:
        evidence, distraction = ("\n".join(f"- {fact}" for fact in part) for part in (self.evidence, self.distraction))
        return _GIVEN_FACTS.format(evidence=evidence, distraction=distraction)


@dataclass(frozen=True)
class Outline:
    """The title of a long context and the plan of its sections, each "heading | what it tells"."""

    title: str
    sections: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(f"Section {number}: {plan}" for number, plan in enumerate(self.sections, 1))


def check_template(template: str, name: str) -> str:
    """Return a custom prompt template, the whole user message, if it can be filled, else raise a ValueError.

    Fields: `{instruction}` and `{answer}`, which it must hold, `{task}`, `{genre}`, `{words}`, `{facts}` (empty unless
    facts are listed first) and `{format}`, the format of the reply, which is appended where it does not stand.
    """
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"`prompt_template` must double its literal braces, got {error} in {name}.") from None
    for field in sorted(fields - set(TEMPLATE_FIELDS)):
        raise ValueError(f"`prompt_template` has no field {{{field}}} ({name}). Use {', '.join(TEMPLATE_FIELDS)}.")
    for field in ("instruction", "answer"):
        if field not in fields:
            raise ValueError(f"`prompt_template` must hold {{{field}}}, got none in {name}.")
    return template if "format" in fields else template.rstrip() + "\n\n{format}"


def messages_of(content: str, reason: str | None = None) -> Messages:
    """Return the messages that ask for a text; `reason` says why the reply before was rejected."""
    retry = _RETRY.format(reason=reason) if reason else ""
    return (("system", _SYSTEM), ("user", retry + content))


def context_prompt(
    seed: Seed, task: Task, words: int, *, facts: Facts | None = None, template: str | None = None
) -> str:
    """Ask for a context in one reply, from the pair alone or from facts listed before."""
    if template is None:
        # Built before it is filled: braces in the seed must not be taken for fields.
        template = _LOST + ("\n{facts}" if facts else "") + "\n" + _DEMANDS + "\n{format}"
    pair = {"instruction": seed.instruction, "answer": seed.answer, "task": task.name, "genre": task.genre}
    return template.format(**pair, words=words, facts=facts or "", format=CONTEXT_FORMAT)


def facts_prompt(seed: Seed, task: Task) -> str:
    """Ask for the facts a context will hold: evidence and distraction."""
    return f"{_lost(seed, task)}\n{_FACTS}"


def outline_prompt(seed: Seed, task: Task, words: int, sections: int, facts: Facts | None = None) -> str:
    """Ask for the plan of a context that is longer than one reply."""
    given = f"\n{facts}" if facts else ""
    demands = _DEMANDS.format(words=words)
    plan = _OUTLINE.format(words=words, sections=sections)
    return f"{_lost(seed, task)}{given}\n{demands}\n{plan}"


def section_prompt(seed: Seed, task: Task, words: int, outline: Outline, number: int, before: str) -> str:
    """Ask for section `number` (from 1), which goes on from the last words of the text `before` it."""
    ends = f"ends with:\n{before}" if before else "is empty: this is where it begins."
    section = _SECTION.format(sections=len(outline.sections), plan=outline, number=number, words=words, ends=ends)
    return f"{_lost(seed, task)}\n{_DEMANDS.format(words=words * len(outline.sections))}\n{section}"


def judge_prompt(seed: Seed, context: str) -> Messages:
    """Ask whether a context supports the answer."""
    asked = (
        "Does the text below support the answer? It does if a careful reader who knows nothing but the text, "
        "given the instruction, would arrive at that answer and at no other.\n\n"
        f"Text:\n{context}\n\nInstruction: {seed.instruction}\nAnswer: {seed.answer}\n\n"
        'Reply with one line: "supported", or "not supported: " and the reason in a few words.'
    )
    return (("user", asked),)


def answer_prompt(seed: Seed, task: Task, context: str | None = None) -> Messages:
    """Ask the instruction itself, with its context or, closed-book, without."""
    if context is None:
        rule = "Answer from what you know, as briefly as you can. Guess if you do not know. Do not explain."
        return (("user", f"{rule}\n\nInstruction: {seed.instruction}\nAnswer:"),)
    return (("user", fill(task.template, context=context, input=seed.instruction)),)


def pair_prompt(text: str) -> str:
    """Ask for one question-answer pair about a text: instruction synthesis, the baseline of the paper."""
    return (
        f"Text:\n{text}\n\nWrite one question about the text above and its answer. The text alone must answer it, "
        "the question must make sense without pointing at the text, and the answer must be short and complete. Write "
        "in the language of the text.\n\nFormat of the reply:\nQuestion: <question>\nAnswer: <answer>"
    )


def _lost(seed: Seed, task: Task) -> str:
    return _LOST.format(genre=task.genre, instruction=seed.instruction, answer=seed.answer)


# Reasoning models of today: <think> (Qwen, DeepSeek), <thought>, <reasoning>, <seed:think>, [THINK] (Mistral), ◁think▷
# (Kimi).
_THOUGHT_END = re.compile(r"</(?:seed:think|think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷", re.IGNORECASE)
_THOUGHT_START = re.compile(
    r"\s*(?:<(?:seed:think|think|thinking|thought|reasoning)>|\[THINK\]|◁think▷)", re.IGNORECASE
)
# Models put labels in bold, in quotes or as headings, whatever the format asked for.
_LABEL = r"^[ \t>#*_]*{label}[ \t*_]*:[ \t*_]*"
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+(\S.*)$", re.MULTILINE)
_SECTION_LINE = re.compile(r"^[ \t>#*_]*Section[ \t]+(\d+)[ \t*_]*[:.][ \t*_]*(\S.*)$", re.MULTILINE | re.IGNORECASE)
# Small judges answer 'yes' where 'supported' was asked for.
_VERDICT = re.compile(r"^\W*(supported|not supported|yes|no)\b\W*(.*)", re.IGNORECASE | re.DOTALL)


class ReplyError(ValueError):
    """A reply that cannot be read; the message is the reason given to the model when it is asked again."""


def read_context(text: str) -> tuple[str | None, str]:
    """Return the title, if there is one, and the context of a reply that opens with "Context:".

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
    """Return the listed facts."""
    before, rest = _cut(spoken(text), "Evidence")
    evidence, distraction = _cut(rest, "Distraction")
    title, _ = _title(before)
    found = [tuple(match.strip() for match in _BULLET.findall(part)) for part in (evidence, distraction)]
    for label, facts in zip(("Evidence", "Distraction"), found, strict=True):
        if not facts:
            raise ReplyError(f'no fact was listed below "{label}:"')
    return Facts(title or "", *found)


def read_outline(text: str, sections: int) -> Outline:
    """Return the plan of a long context."""
    text = spoken(text)
    plan = _SECTION_LINE.findall(text)
    # One section too few would leave its facts unwritten; one too many would be paid for.
    if [int(number) for number, _ in plan] != list(range(1, sections + 1)):
        raise ReplyError(f'the plan must have {sections} lines "Section <number>: ...", got {len(plan)}')
    title, _ = _title(text)
    return Outline(title or "", tuple(line.strip() for _, line in plan))


def read_pair(text: str) -> tuple[str, str]:
    """Return the question and the answer."""
    _, rest = _cut(spoken(text), "Question")
    question, answer = _cut(rest, "Answer")
    if not question or not answer:
        raise ReplyError("the question or the answer was empty")
    return question, answer


def read_verdict(text: str) -> tuple[bool, str]:
    """Return a judge's verdict and its reason."""
    match = _VERDICT.match(spoken(text))
    if match is None:
        raise ReplyError(f"no verdict in {_start(text)!r}")
    return match[1].lower() in ("supported", "yes"), match[2].strip()


def spoken(text: str) -> str:
    """Return a reply without the thoughts some models put in front of it; raises `ReplyError` where they do not end.

    >>> spoken("I could write <think>Context: ...</think> first.</think>Context: The dam.")
    'Context: The dam.'
    """
    # Many chat templates open the thoughts in the prompt, so that a reply holds their end alone, and a thought may
    # draft all that is asked for: what stands before the last end of a thought is thought.
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
    # Quotes and a full stop are the model's habit; a title goes into prompts that quote it themselves.
    title = match[1].strip(" \t*_\"'“”.")
    return title or None, (text[: match.start()] + text[match.end() :]).strip()


def _start(text: str) -> str:
    return " ".join(text.split())[:60]
