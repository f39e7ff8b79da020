"""Where the turns of a conversation stand in the text that a chat template makes of it.

To look for the messages in the text would find an answer "a" in the "assistant" of its header, and lose answers that
the template changes: reasoning templates drop the thoughts of earlier turns. So the template is asked what it writes
around the messages, with a made-up word in place of each content, once for every shape of conversation:

    contents   <|user|>\\n W0 <|end|>\\n<|assistant|>\\n W1 <|end|>\\n<|user|>\\n W2 <|end|>\\n
    gaps       ----------    ------------------------    -------------------    --------
    cuts                                            ^             ^
                                        the answer begins     it ends: its end-of-turn token belongs to it

Then the gaps are followed through the real text, one after the other, whatever stands between them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

from jinja2 import TemplateError


# What renders messages: `render(messages, add_generation_prompt=False) -> text`.
Render = Callable[..., str]
Message = dict[str, Any]


class Cut(NamedTuple):
    """A block that begins at a character of a text."""

    start: int
    response: bool


class Gap(NamedTuple):
    """What a template writes between two contents.

    Args:
        text: all of it.
        least: so many characters of it stand there whatever the contents are: before an answer, a template may write
            an empty thought or the answer's own.
        cuts: the blocks that begin in it, counted from its start.
    """

    text: str
    least: int
    cuts: tuple[Cut, ...] = ()

    def agrees(self, text: str, at: int) -> int | None:
        """How many of its characters stand at a character of a text; `None` if they are too few."""
        agreed = _agreement(self.text, text[at : at + len(self.text)])
        return agreed if agreed >= self.least else None

    def cuts_at(self, at: int, agreed: int) -> list[Cut]:
        """Its cuts, where that many of its characters stand at a character of a text."""
        return [Cut(at + min(cut.start, agreed), cut.response) for cut in self.cuts]


class Frame(NamedTuple):
    """What a template writes around the messages: `contents` are their indices, `gaps` one more than those."""

    contents: tuple[int, ...]
    gaps: tuple[Gap, ...]


class Turns(NamedTuple):
    """Where the blocks of a text begin, and by message index where its content stands, if it does as it is."""

    cuts: list[Cut]
    starts: dict[int, int]


# A completion follows its prompt, and nothing stands around them.
TEXT_FRAME = Frame((0,), (Gap("", 0), Gap("", 0)))
PROMPT_COMPLETION_FRAME = Frame((0, 1), (Gap("", 0), Gap("", 0, (Cut(0, True),)), Gap("", 0)))


def content_of(message: Message) -> str:
    """A message's content; empty where it has none, or only white space, which no template is held to keep."""
    content = message.get("content") or ""
    return content if content.strip() else ""


def read_frame(messages: Sequence[Message], render: Render, special_tokens: Iterable[str]) -> Frame | None:
    """Ask a template what it writes around messages of these roles.

    Args:
        messages: the conversation; of the contents only those that are empty matter.
        render: the template; may raise Jinja's `TemplateError` for a conversation that ends early.
        special_tokens: the tokenizer's, as text.

    Returns:
        The frame, or `None` if the template refuses the words or shows them in another order.

    Example:

    >>> def render(messages, add_generation_prompt=False):
    ...     text = "".join(f"<{message['role']}>{message['content']}<end>" for message in messages)
    ...     return text + "<assistant>" * add_generation_prompt
    >>> messages = [{"role": role, "content": "…"} for role in ("user", "assistant", "user")]
    >>> frame = read_frame(messages, render, ["<end>"])
    >>> frame.gaps[1].text, frame.gaps[1].cuts
    ('<end><assistant>', (Cut(start=16, response=True),))
    >>> frame.gaps[2].text, frame.gaps[2].cuts
    ('<end><user>', (Cut(start=5, response=False),))
    >>> place_turns("<user>a<end><assistant>user<end><user>b<end>", ["a", "user", "b"], frame).cuts
    [Cut(start=23, response=True), Cut(start=32, response=False)]
    """
    words = [f"Qv{index}Zx" if content_of(message) else "" for index, message in enumerate(messages)]
    try:
        text = render(_with_contents(messages, words))
    except TemplateError:
        return None
    # Some templates leave out messages, such as those of tools.
    shown = [index for index, word in enumerate(words) if word and word in text]
    spans = {index: (text.index(words[index]), text.index(words[index]) + len(words[index])) for index in shown}
    if not shown or list(spans.values()) != sorted(spans.values()):
        return None
    # The longest of those that fit first; without any it matches nowhere.
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)")
    reader = _Reader(text, words, spans, messages, render, special)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    cuts = [cut for index in answers for cut in reader.answer(index)]
    gaps = []
    for before, after in pairwise([None, *shown, None]):
        start = 0 if before is None else spans[before][1]
        end = len(text) if after is None else spans[after][0]
        own = tuple(Cut(cut.start - start, cut.response) for cut in cuts if start <= cut.start <= end)
        least = reader.least(before, after) if after in answers else end - start
        gaps.append(Gap(text[start:end], least, own))
    return Frame(tuple(shown), tuple(gaps))


def _with_contents(messages: Sequence[Message], contents: Sequence[str]) -> list[Message]:
    pairs = zip(messages, contents, strict=True)
    return [{**message, "content": content} if content else message for message, content in pairs]


class _Reader(NamedTuple):
    """Finds where an answer begins and ends in the text that a template makes of words.

    `spans` are the characters of the words that it shows, by message.
    """

    text: str
    words: list[str]
    spans: dict[int, tuple[int, int]]
    messages: Sequence[Message]
    render: Render
    special: re.Pattern

    def answer(self, index: int) -> list[Cut]:
        """The cuts of the answer that is message `index`; none where the template does not show it."""
        begin = self._reach(index, add_generation_prompt=True)
        if index in self.spans and (begin is None or begin == self._behind_last(index)):
            begin = self.spans[index][0]  # nothing is generated from: the content is all there is of the answer
        if begin is None:
            return []
        if index + 1 == len(self.messages):
            return [Cut(begin, True)]
        content_end = self.spans[index][1] if index in self.spans else begin
        end = max(self._reach(index + 1) or 0, content_end)
        if not self.special.search(self.text, content_end, end):
            # As the last message it would end otherwise (gpt-oss, Phi-3.5): what closes it here is the next token.
            closed = self.special.match(self.text, _skip_space(self.text, end))
            if closed and closed.end() <= self._next(index + 1):
                end = _skip_space(self.text, closed.end())
        return [Cut(begin, True), Cut(end, False)] if end < len(self.text) else [Cut(begin, True)]

    def least(self, before: int | None, after: int) -> int:
        """How much of the gap before an answer stands there too if answers hold thoughts."""
        start = 0 if before is None else self.spans[before][1]
        gap = self.text[start : self.spans[after][0]]
        thoughts = [
            f"<think>\n{word}Th\n</think>\n\n{word}" if word and message["role"] == "assistant" else word
            for word, message in zip(self.words, self.messages, strict=True)
        ]
        try:
            text = self.render(_with_contents(self.messages, thoughts))
        except TemplateError:
            return len(gap)
        return _agreement(gap, self._behind_word(text, before))

    def _reach(self, count: int, **options: Any) -> int | None:
        """How far the text of the first `count` messages alone agrees with that of all of them.

        Only what follows their last word is compared: a template may show tools at the last question.
        """
        if not count:
            return None
        try:
            alone = self.render(_with_contents(self.messages, self.words)[:count], **options)
        except TemplateError:  # it may refuse a conversation that ends here
            return None
        start = self._behind_last(count)
        last = max((index for index in self.spans if index < count), default=None)
        reach = start + _agreement(self._behind_word(alone, last), self.text[start : self._next(count)])
        # "<|end|>" and "<|endoftext|>" begin alike.
        inside = (token for token in self.special.finditer(self.text, start) if token.start() < reach < token.end())
        return next((token.start() for token in inside), reach)

    def _behind_word(self, text: str, index: int | None) -> str:
        return text if index is None else text[text.rfind(self.words[index]) + len(self.words[index]) :]

    def _behind_last(self, count: int) -> int:
        return max((end for index, (_, end) in self.spans.items() if index < count), default=0)

    def _next(self, count: int) -> int:
        """Where the next content begins."""
        return min((begin for index, (begin, _) in self.spans.items() if index >= count), default=len(self.text))


def _agreement(one: str, other: str) -> int:
    """How many characters two texts have in common at the start."""
    return len(commonprefix((one, other)))  # noqa: RUF071 - characters are what is wanted


def _skip_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def place_turns(text: str, contents: Sequence[str], frame: Frame) -> Turns | None:
    """Follow a frame through the text of a conversation.

    Args:
        text: the rendered conversation.
        contents: content of each message, see [`content_of`].
        frame: what the template writes around them.

    Returns:
        The turns, or `None` if the text does not follow the frame.
    """
    first, *gaps = frame.gaps
    at = first.agrees(text, 0)
    if at is None:
        return None
    cuts = first.cuts_at(0, at)
    starts: dict[int, int] = {}
    for index, gap in zip(frame.contents, gaps, strict=True):
        # Many templates trim a message.
        forms = (contents[index], contents[index].strip())
        content = next((form for form in forms if text.startswith(form, at)), None)
        agreed = None
        if content is not None:
            starts[index], begin = at, at + len(content)
            agreed = gap.agrees(text, begin)
        if gap is gaps[-1] and not gap.cuts:
            break
        if agreed is None:
            # The content was changed. What follows it is looked for, unless that could stand anywhere.
            known = gap.text[: gap.least]
            begin = text.find(known, at) if known.strip() else -1
            agreed = gap.agrees(text, begin) if begin >= 0 else None
        if agreed is None:
            return None
        cuts += gap.cuts_at(begin, agreed)
        at = begin + agreed
    return Turns(cuts, starts)
