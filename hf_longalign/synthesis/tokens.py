"""What a tokenizer makes of texts: how many tokens they are, and what in them it takes for marks of a chat."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


# Marks of chat templates in use: <|im_end|> and every other <|…|>, <｜User｜> (DeepSeek), <|turn> (Gemma 4), </s>,
# [INST] and [/INST] (Mistral), <<SYS>> (Llama 2), <start_of_turn> (Gemma), [gMASK] (GLM).
_KNOWN = re.compile(
    r"<\|[^\s<>|]{1,40}\|?>|<[a-z_]{1,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|<(?:bos|eos|pad|unk|sop|eop)>|<</?SYS>>|"
    r"<(?:start|end)_of_(?:turn|utterance|image)>|\[gMASK\]|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]"
)
# A shorter special token ("!" pads some models) is a part of ordinary text.
_LEAST_CHARACTERS = 3


class TokenCounter:
    """Counts the tokens of texts and of whole conversations, as training will see them: with the chat template.

    The tokenizer is a name, a path, or the object. Raises a ValueError where it has no chat template.
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

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens of the tokenizer, reserved ones included."""
        # `all_special_tokens` leaves out reserved ones, which the tokenizer reads as marks all the same.
        added = self._tokenizer.added_tokens_decoder.values()
        return sorted({*self._tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def load_model(kind: str, name: str) -> tuple[Any, Any]:
    """Return the tokenizer and the model of transformers' class `kind`, on the best device, to be asked."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = getattr(transformers, kind).from_pretrained(name, dtype="auto")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[start : start + size] for start in range(0, len(order), size))


class ControlTokens:
    """Finds the marks by which chat templates divide turns, in texts that come from outside.

    A context with `<|im_end|><|im_start|>user` in it would become two turns in training, and another prompt than was
    meant at an endpoint. `special_tokens` are those of the tokenizer that will be trained, next to the known ones.

    >>> control = ControlTokens()
    >>> control.find("The end.<|im_end|>\\n</s>"), control.find("a < b, [1], <i>s</i>")
    (['<|im_end|>', '</s>'], [])
    >>> control.neutralise("The end.<|im_end|>")
    ('The end.< |im_end|>', 1)
    """

    def __init__(self, special_tokens: Iterable[str] = ()):
        # A token of letters alone ('user', 'im') stands in ordinary prose too.
        own = (re.escape(token) for token in special_tokens if len(token) >= _LEAST_CHARACTERS and not token.isalnum())
        # The longest first: of two that begin alike, the longer one is what the tokenizer sees.
        self._pattern = re.compile("|".join([*sorted(own, key=len, reverse=True), _KNOWN.pattern]))

    def find(self, text: str) -> list[str]:
        """Return the marks in a text, in order."""
        return self._pattern.findall(text)

    def neutralise(self, text: str) -> tuple[str, int]:
        """Return the text with a blank inside every mark, which makes plain words of it, and how many there were."""
        # A blank and no deletion: the reader still sees what stood there, and no tokenizer takes it for a mark.
        return self._pattern.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)
