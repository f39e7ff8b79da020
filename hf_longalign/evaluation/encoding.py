"""Turning a prompt into the tokens a model reads: through the chat template or plain."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Return the token ids a model is given: `(tokens,)`, with the special tokens of template or tokenizer.

    Args:
        tokenizer: the model's.
        text: what the user says.
        chat: wrap it into the chat template as one user message, with the generation prompt after it.

    Raises:
        ValueError: `chat` without a chat template.
    """
    if not chat:
        return tokenizer(text)["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError(
            f"`chat=True` needs a tokenizer with a chat template, got {tokenizer.name_or_path!r} without one. "
            "Set `chat` to False (`--chat false`), or take an instruction-tuned model."
        )
    messages = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def token_counter(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Callable[[str], int]:
    """Return a function from a text to the tokens a model is given for it, template included."""
    return lambda text: len(encode_text(tokenizer, text, chat=chat))


def decode_answer(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """Return the text of generated tokens up to the first stop text, without special tokens."""
    text = str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    ends = [index for index in map(text.find, stop) if index >= 0]
    return text[: min(ends)] if ends else text
