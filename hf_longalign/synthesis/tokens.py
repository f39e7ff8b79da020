"""Counting tokens as training will see them: with the chat template of the tokenizer."""

from typing import Any


class TokenCounter:
    """Counts the tokens of texts and of whole conversations.

    Args:
        tokenizer: a name, a path, or a tokenizer.

    Raises:
        ValueError: the tokenizer has no chat template, so the length of a sample is unknown.
    """

    def __init__(self, tokenizer: Any):
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`tokenizer` must have a chat template, got one without. Use the tokenizer of a chat model or set "
                "`tokenizer.chat_template`."
            )
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, special tokens not added."""
        # Not `tokenizer(text)`, which warns about texts beyond the model's range and keeps the offsets of every token.
        return len(self._tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def count_chat(self, messages: list[dict[str, str]]) -> int:
        """Return the number of tokens of a conversation in the chat template."""
        return self.count(self._tokenizer.apply_chat_template(messages, tokenize=False))
