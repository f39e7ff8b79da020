"""What stands between a prompt and a model: the chat template, tokens, and a model that is only read with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, prefix: str = "") -> list[int]:
    """Return the token ids a model is given: `(tokens,)`, with the special tokens of template or tokenizer.

    Args:
        tokenizer: the model's.
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
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    # The beginning of an answer has tokens of its own, as RULER gives it: it does not join those of the template.
    return encoded["input_ids"] + (tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else [])


def token_counter(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Callable[[str], int]:
    """Return a function from a text to the tokens a model is given for it, template included."""
    return lambda text: len(encode_text(tokenizer, text, chat=chat))


def decode_answer(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """Return the text of generated tokens up to the first stop text, without special tokens."""
    text = str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    ends = [index for index in map(text.find, stop) if index >= 0]
    return text[: min(ends)] if ends else text


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards each of its modules back into the mode it was in.

    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    >>> with eval_mode(model):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
