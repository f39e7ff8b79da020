"""Where the blocks of a prepared row begin, taken from its text, and written into its labels.

TRL's preparation keeps `input_ids` and `labels` alone through packing, so the blocks travel inside the labels
([`~hf_longalign.blocks.mark_blocks`]); the collator reads them back.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_longalign.blocks import block_response, blocks_from_offsets, mark_blocks


logger = logging.getLogger(__name__)


class Cut(NamedTuple):
    """A block that begins at a character of the rendered text."""

    start: int
    response: bool


class Rendered(NamedTuple):
    """The text that was tokenised, and where each message's content begins in it (-1: not found)."""

    text: str
    contents: list[str]
    starts: list[int]


class BlockMarker:
    """Marks the blocks of a row of a TRL data set after tokenisation; made to be mapped over it.

    Blocks come from the row's `block_lengths`, else from its text: an instruction, a response, and inside a message
    the `parts` of it (contexts, documents, the question), each a dict of `message` (index into the messages; 0 for
    plain text, 0 and 1 for prompt and completion) and the character offsets `start` and `end` in its content. A row
    that has neither is left alone: the collator then takes the runs of -100 in its labels.

    Args:
        tokenizer: the tokenizer that made `input_ids`; offsets need a fast one.
        text_field: the column of plain text.
        chat_template: the template TRL tokenises with, `None` for the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_field: str, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.chat_template = chat_template

    def __call__(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Return the row's `labels`, marked where its blocks begin.

        Raises:
            ValueError: `block_lengths` that do not add up, or `parts` that cannot be found in the text.
        """
        labels = np.asarray(row["labels"], dtype=np.int64)
        if row.get("block_lengths") is not None:
            lengths = np.asarray(row["block_lengths"])
            return {"labels": mark_blocks(labels, lengths, block_response(labels, lengths)).tolist()}
        parts = row.get("parts") or []
        messages = self._messages(row)
        if messages is None or (len(messages) == 1 and not parts):
            return {"labels": row["labels"]}
        rendered = self._render(row, messages)
        offsets = self._offsets(row["input_ids"], rendered.text, required=bool(parts))
        if offsets is None:
            return {"labels": row["labels"]}
        cuts = _merge(self._message_cuts(row, messages, rendered) + _part_cuts(messages, rendered, parts))
        lengths, kept = blocks_from_offsets(offsets, [cut.start for cut in cuts])
        response = np.array([False, *(cut.response for cut in cuts)])[kept]
        return {"labels": mark_blocks(labels, lengths, response).tolist()}

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The row as messages, looked for as TRL does; `None` where a message is not plain text."""
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        elif prompt and completion:
            messages = [*prompt, *completion]
        elif row.get("messages"):
            messages = row["messages"]
        elif isinstance(row.get(self.text_field), str):
            messages = [{"role": "user", "content": row[self.text_field]}]
        else:
            return None
        # A message that calls tools has no content.
        return messages if all(isinstance(message.get("content") or "", str) for message in messages) else None

    def _is_chat(self, row: dict[str, Any]) -> bool:
        return isinstance(row["prompt"], list) if row.get("prompt") else bool(row.get("messages"))

    def _template(self, row: dict[str, Any], messages: Sequence[dict[str, Any]], **kwargs: Any) -> str:
        tools = row.get("tools")
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value] # a str, for `tokenize=False`
            list(messages),
            tokenize=False,
            chat_template=self.chat_template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
            **kwargs,
        )

    def _render(self, row: dict[str, Any], messages: list[dict[str, Any]]) -> Rendered:
        contents = [message.get("content") or "" for message in messages]
        text = self._template(row, messages) if self._is_chat(row) else "".join(contents)
        starts, cursor = [], 0
        for index, content in enumerate(contents):
            # Many templates trim a message; its offsets then count from the trimmed text.
            if text.find(content, cursor) < 0:
                contents[index] = content.strip()
            starts.append(text.find(contents[index], cursor) if contents[index] else -1)
            if starts[-1] >= 0:
                cursor = starts[-1] + len(contents[index])
        return Rendered(text, contents, starts)

    def _offsets(self, input_ids: list[int], text: str, *, required: bool) -> np.ndarray | None:
        """`(tokens, 2)` character span of each token, or `None` where the text does not give back the very tokens."""
        if not self.tokenizer.is_fast:
            if required:
                raise ValueError("`parts` need character offsets: load a fast tokenizer (`use_fast=True`).")
            logger.warning_once(  # type: ignore[attr-defined]
                "A slow tokenizer gives no character offsets; the blocks are the runs of ignored labels."
            )
            return None
        for special in (False, True):
            encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            if list(encoded["input_ids"]) == list(input_ids):
                return np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        if required:
            raise ValueError(
                "`parts` cannot be placed: the rendered text does not tokenise to the row's `input_ids` "
                f"({len(input_ids)} tokens). Give a `block_lengths` column instead."
            )
        logger.warning_once(  # type: ignore[attr-defined]
            "A row's text does not tokenise to its `input_ids`; its blocks are the runs of ignored labels."
        )
        return None

    def _message_cuts(self, row: dict[str, Any], messages: list[dict[str, Any]], rendered: Rendered) -> list[Cut]:
        """A response begins where it is generated from; the next instruction where the template has closed it."""
        cuts = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._prefix(row, messages[:index], rendered.text, add_generation_prompt=True)
            start = rendered.starts[index] if start is None else start
            if start < 0:
                continue
            cuts.append(Cut(start, True))
            if index + 1 < len(messages):
                end = self._prefix(row, messages[: index + 1], rendered.text)
                end = _end(rendered, index) if end is None else end
                cuts += [Cut(end, False)] if end > start else []
        return cuts

    def _prefix(self, row: dict[str, Any], messages: list[dict[str, Any]], text: str, **kwargs: Any) -> int | None:
        """Characters of `text` that the first messages take; `None` where they are rendered in another way alone.

        Not by looking for the content of a message: "a" is found in the "assistant" of its header.
        """
        if not messages or not self._is_chat(row):
            return None
        try:
            prefix = self._template(row, messages, **kwargs)
        except TemplateError:  # a template may refuse a conversation that ends here
            return None
        return len(prefix) if text.startswith(prefix) else None


def _end(rendered: Rendered, index: int) -> int:
    """Where a message's content ends; if the template changed it (dropped thoughts), where the next one's begins."""
    if rendered.starts[index] < 0:
        return rendered.starts[index + 1]
    return rendered.starts[index] + len(rendered.contents[index])


def _part_cuts(messages: list[dict[str, Any]], rendered: Rendered, parts: list[dict[str, Any]]) -> list[Cut]:
    """A part begins a block; the text after it begins one too unless it is only the space before the next part."""
    cuts = []
    for part in parts:
        index, start, end = part["message"], part["start"], part["end"]
        if not (0 <= index < len(messages) and 0 <= start < end <= len(messages[index].get("content") or "")):
            raise ValueError(
                f"`parts` must give a message and character offsets inside it, got {part!r} for {len(messages)} "
                "messages. Count the offsets in the message's `content`."
            )
        if rendered.starts[index] < 0:
            raise ValueError(
                f"`parts` name message {index}, but the chat template does not show its content as it stands. "
                "Give a `block_lengths` column instead."
            )
        content = messages[index]["content"]
        trimmed = 0 if rendered.contents[index] == content else len(content) - len(content.lstrip())
        origin = rendered.starts[index] - trimmed
        response = messages[index]["role"] == "assistant"
        cuts.append(Cut(origin + start, response))
        following = [other["start"] for other in parts if other["message"] == index and other["start"] >= end]
        if content[end : min(following, default=len(content))].strip():
            cuts.append(Cut(origin + end, response))
    return cuts


def _merge(cuts: list[Cut]) -> list[Cut]:
    """Sorted cuts, one per character; at the same one the message's own cut is a response, a part's keeps it."""
    merged: dict[int, bool] = {}
    for cut in cuts:
        merged[cut.start] = merged.get(cut.start, False) or cut.response
    return [Cut(start, response) for start, response in sorted(merged.items())]
