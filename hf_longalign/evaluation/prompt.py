"""One question to a model and what counts as its answer: what every suite makes, every generator reads."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A question, its length in the model's tokens, and the answers it is scored against.

    >>> prompt = Prompt("needle", "single", 0, "Call me Ishmael. Who?", ("Ishmael",), 8)
    >>> prompt.key == Prompt("needle", "single", 0, "Call me Ishmael. Who?", ("Ishmael",), 8).key
    True
    """

    suite: str  # a key of `hf_longalign.records.report.SUITES`
    task: str  # within the suite, such as "multi_key" or "hotpotqa"
    index: int  # number of the sample within its task, length and depth
    text: str  # what the user says; without a chat template, what the model continues
    answers: tuple[str, ...]  # expected values or reference answers
    max_new_tokens: int  # room for the answer
    chat: bool = True  # whether the text goes through the model's chat template as one user message
    stop: tuple[str, ...] = ()  # texts at which generation ends, no part of the answer
    length: int | None = None  # tokens asked for, template and room included; `None`: as long as it is
    depth: float | None = None  # place of the needle, 0 at the beginning of the haystack, 1 at its end
    classes: tuple[str, ...] = ()  # all labels of a classification task, in the data's order
    prefix: str = ""  # how the answer is made to begin, after the template's own beginning; no part of the answer
    shortened: bool = False  # whether something was cut out of it to fit
    parts: tuple[str, ...] = ()  # parts of its task that it counts to, such as "0-4k" or "hard"

    @property
    def sample(self) -> tuple[str, int | None, int]:
        """What its answers go together with: the prompts of one sample differ in the depth of the needle alone."""
        return self.task, self.length, self.index

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything above, 64 hexadecimal digits: equal prompts have equal keys."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


# What is behind the name of a task whose questions are asked in another way than over the whole text.
EVIDENCE, CLOSED_BOOK = ", evidence alone", ", closed book"


def other_ways(prompt: Prompt, evidence: str, closed_book: str) -> list[Prompt]:
    """Return a prompt over its evidence alone and without any text: why it is answered wrong in full.

    Such prompts have neither length nor depth, and are no results of their own.
    """
    texts = {EVIDENCE: evidence, CLOSED_BOOK: closed_book}
    return [replace(prompt, task=prompt.task + way, text=text, length=None, depth=None) for way, text in texts.items()]


@dataclass(frozen=True)
class Completion:
    """What a model answered."""

    text: str  # without stop texts and special tokens
    tokens: int  # generated, the one that ended it included; 0 where a server does not say
    cut: bool = False  # whether it ended because there was no more room, and not by itself


def fingerprint(keys: Iterable[str]) -> str:
    """Return the SHA-256 of the keys of all that was asked: runs are comparable where it is the same."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def encode_text(tokenizer: Any, text: str, *, chat: bool, prefix: str = "") -> list[int]:
    """Return the token ids a model is given: `(tokens,)`, with the special tokens of template or tokenizer.

    With `chat` the text is one user message, with the generation prompt after it; `prefix` begins the answer.

    Raises:
        ValueError: `chat` without a chat template.
    """
    if not chat:
        return tokenizer(text + prefix)["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError(
            f"`chat=True` needs a tokenizer with a chat template, got {tokenizer.name_or_path!r} without one. "
            "Set `chat` to False (`--chat false`), or take an instruction-tuned model."
        )
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    # The beginning of an answer has tokens of its own, as RULER gives it: it does not join those of the template.
    return encoded["input_ids"] + (tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else [])


def token_counter(tokenizer: Any, *, chat: bool) -> Callable[[str], int]:
    """Return a function from a text to the tokens a model is given for it, template included."""
    return lambda text: len(encode_text(tokenizer, text, chat=chat))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the stop texts.

    >>> cut_at("42. And", (".", "!"))
    '42'
    """
    return text[: min((index for index in map(text.find, stop) if index >= 0), default=len(text))]
