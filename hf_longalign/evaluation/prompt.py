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

    Attributes:
        suite: a key of `hf_longalign.records.names.SUITES`.
        task: task within the suite, such as "multi_key" or "hotpotqa".
        index: number of the sample within its task, length and depth.
        text: what the user says; without a chat template, what the model continues.
        answers: expected values (needle) or reference answers (LongBench).
        max_new_tokens: room for the answer, in tokens.
        chat: whether the text goes through the model's chat template as one user message.
        stop: texts at which generation ends; they are not part of the answer. The end-of-sequence token always does.
        length: tokens asked for, the template and the room for the answer included; `None`: as long as it is.
        depth: place of the needle, 0 at the beginning of the haystack, 1 at its end; `None`: has none.
        classes: all labels of a classification task, in the data's order.
        prefix: how the answer is made to begin, after the chat template's own beginning; no part of the answer.
        shortened: whether something was cut out of it to fit.
        parts: parts of its task that it counts to, such as "0-4k" or "hard".

    Example:

    >>> prompt = Prompt("needle", "single", 0, "Call me Ishmael. Who?", ("Ishmael",), 8)
    >>> prompt.key == Prompt("needle", "single", 0, "Call me Ishmael. Who?", ("Ishmael",), 8).key
    True
    """

    suite: str
    task: str
    index: int
    text: str
    answers: tuple[str, ...]
    max_new_tokens: int
    chat: bool = True
    stop: tuple[str, ...] = ()
    length: int | None = None
    depth: float | None = None
    classes: tuple[str, ...] = ()
    prefix: str = ""
    shortened: bool = False
    parts: tuple[str, ...] = ()

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
    """What a model answered.

    Attributes:
        text: the answer, without stop texts and special tokens.
        tokens: tokens generated, the one that ended it included; 0 where a server does not say.
        cut: whether it ended because there was no more room, and not by itself.
    """

    text: str
    tokens: int
    cut: bool = False


@dataclass
class GenerationStats:
    """Counts and seconds, added up over all calls of a generator; of several processes the sum.

    Attributes:
        prompt_tokens: tokens of the prompts answered.
        cached_tokens: those of them that were not computed, because an earlier prompt had them too.
        generated_tokens: tokens of the answers.
        seconds: time spent reading and answering.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0


def fingerprint(keys: Iterable[str]) -> str:
    """Return the SHA-256 of the keys of all that was asked: runs are comparable where it is the same."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def encode_text(tokenizer: Any, text: str, *, chat: bool, prefix: str = "") -> list[int]:
    """Return the token ids a model is given: `(tokens,)`, with the special tokens of template or tokenizer.

    Args:
        tokenizer: the model's, of transformers.
        text: what the user says.
        chat: wrap it into the chat template as one user message, with the generation prompt after it.
        prefix: how the answer begins.

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
