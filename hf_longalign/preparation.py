"""`RowPreparer`: rows tokenised as TRL does it, once, with their blocks beside them.

TRL tokenises row by row, builds labels, truncates and filters in passes of their own. Here one pass over batches does
all of it: to find the blocks costs one rendering, and where TRL is left to tokenise (text, processors, slow
tokenizers), nothing is tokenised again unless `parts` need it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import (
    common_prefix_length,
    get_dataset_column_names,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)

from hf_longalign import __version__
from hf_longalign.blocks import (
    IGNORE,
    Blocks,
    block_response,
    blocks_as_prepared,
    blocks_at,
    blocks_from_labels,
    blocks_to_column,
)
from hf_longalign.turns import (
    PROMPT_COMPLETION_FRAME,
    TEXT_FRAME,
    Cut,
    Frame,
    Turns,
    content_of,
    place_turns,
    read_frame,
)


logger = logging.get_logger(__name__)

# What is read of a row, beside the column of plain text.
COLUMNS = (
    *("messages", "prompt", "completion", "tools", "chat_template_kwargs"),
    *("parts", "block_lengths", "input_ids", "labels", "completion_mask", "blocks"),
)
# Columns that are read and removed again, and what is said of the rows whose flag is not set.
FLAGS = {
    "blocks_found": "do not show their turns: their blocks are the runs of their labels.",
    "trains": "have no target within `max_length` and are left out. Raise it to train on them.",
}
BATCH_SIZE = 128
# Shapes of conversations whose frames are kept; rows that call tools have one each.
MAX_FRAMES = 1024


@dataclass
class Text:
    """The text of a row.

    Args:
        text: what is tokenised.
        messages: the messages in it.
        is_chat: whether a chat template has made it.
        turns: where they stand; `None` where that is not known.
        encoding: the tokenizer's encoding, which knows the characters of its tokens.
        marked: what a template with marks calls generated, one number per token.
    """

    text: str
    messages: list[dict[str, Any]]
    is_chat: bool
    turns: Turns | None
    encoding: Any = None
    marked: list[int] | None = None


@dataclass(eq=False)
class RowPreparer:
    """Gives the rows of a TRL data set `input_ids`, `labels` and `blocks`; made to be mapped over it in batches.

    Conversations are tokenised here, with the result of TRL's own preparation; other rows must have been tokenised.
    `blocks` holds one number per token ([`~hf_longalign.blocks.blocks_to_column`]), taken from the row's
    `block_lengths`, else from the `blocks` of a row that was prepared before, else from its turns and `parts`, else
    from the runs of ignored labels. `parts` are the contexts, documents and the question inside a message, each a dict
    of `message` (index into the messages; 0 for plain text, 0 and 1 for prompt and completion) and the character
    offsets `start` and `end` in its content.

    Args:
        tokenizer: the tokenizer of the rows.
        text_field: the column of plain text.
        chat_template: the template TRL tokenises with, `None` for the tokenizer's own.
        completion_only: whether prompts are outside the loss.
        answers_only: `"marks"`: whatever the template does not mark as generated is outside the loss. `"turns"`: so
            is whatever is no answer, for templates without such marks. `None`: neither.
        kept: the tokens that truncation leaves.

    Raises:
        ValueError: `block_lengths` that do not add up, `blocks` that are not one number per token, `parts` that
            cannot be found in the text, or `"turns"` that cannot.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    text_field: str = "text"
    chat_template: str | None = None
    completion_only: bool = False
    answers_only: str | None = None
    kept: slice = field(default_factory=lambda: slice(None))
    # In its state, for `datasets` caches what is made here, and does not see that code changes.
    version: str = field(default_factory=lambda: __version__, init=False)
    _frames: dict[str, Frame | None] = field(default_factory=dict, init=False)

    def __getstate__(self) -> dict[str, Any]:
        # By its state `datasets` tells whether it has mapped this before.
        return {**self.__dict__, "_frames": {}}

    def __call__(self, batch: Any) -> dict[str, list]:
        """Prepare a batch of rows.

        Args:
            batch: lists by column.

        Returns:
            `input_ids` (int32), `labels` (int32) and `blocks` (int8), each a list of arrays `(tokens,)`;
            `blocks_found`, whether the blocks of a row are more than the runs of its labels could tell; and `trains`,
            whether truncation leaves it a target.
        """
        names = [name for name in {*COLUMNS, self.text_field} if name in batch]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*(batch[name] for name in names), strict=True)]
        prepared: dict[str, list] = {name: [] for name in ("input_ids", "labels", "blocks", *FLAGS)}
        texts = [self._text(row) for row in rows]
        self._encode(rows, texts)
        for row, text in zip(rows, texts, strict=True):
            blocks = None if text is None else self._blocks(row, text)
            if row.get("input_ids") is None:
                ids = np.array(text.encoding.ids, dtype=np.int32)  # type: ignore[union-attr] # a conversation
                labels = np.where(self._targets(row, text, blocks), ids, IGNORE)
            else:
                ids, labels = (np.asarray(row[name], dtype=np.int32) for name in ("input_ids", "labels"))
            if row.get("block_lengths") is not None:
                lengths = np.asarray(row["block_lengths"])
                blocks = Blocks(lengths, block_response(labels, lengths))
            elif text is None and row.get("blocks") is not None:
                blocks = blocks_as_prepared(row["blocks"], ids.size)
            prepared["blocks_found"].append(blocks is not None or text is None)
            # Nothing comes before the first token that could predict it.
            prepared["trains"].append(bool((labels[self.kept][1:] != IGNORE).any()))
            if blocks is None:
                mask = row.get("completion_mask")  # TRL keeps it where the loss is on the prompt too
                blocks = blocks_from_labels(labels if mask is None else np.where(np.equal(mask, 1), labels, IGNORE))
            for name, values in (("input_ids", ids), ("labels", labels), ("blocks", blocks_to_column(blocks))):
                prepared[name].append(values[self.kept])
        return prepared

    def _text(self, row: dict[str, Any]) -> Text | None:
        """The row's text; `None` where the blocks do not depend on it."""
        prompt: Any = row.get("prompt")
        completion: Any = row.get("completion")
        if row.get("input_ids") is not None and any(row.get(name) is not None for name in ("block_lengths", "blocks")):
            return None
        if is_conversational(row):
            messages = [*prompt, *completion] if prompt else row["messages"]
            try:
                text = self._render(row, messages)
            except (TemplateError, TypeError, ValueError):
                if row.get("input_ids") is None:
                    raise
                return Text("", messages, True, None)  # by whatever template it was tokenised, it is not this one
            plain = all(isinstance(message.get("content") or "", str) for message in messages)
            return Text(text, messages, True, self._turns(row, messages, text) if plain else None)
        if not row.get("parts"):
            return None
        if isinstance(prompt, str) and isinstance(completion, str):
            frame, messages = PROMPT_COMPLETION_FRAME, [{"role": "user"}, {"role": "assistant"}]
            contents = [prompt, completion]
        elif row.get(self.text_field) is None:
            raise ValueError(
                f"`parts` need the text they count in, got a row without `{self.text_field}`. Keep it, or give "
                "`block_lengths` in tokens."
            )
        else:
            frame, messages, contents = TEXT_FRAME, [{"role": "user"}], [row[self.text_field]]
        messages = [{**message, "content": text} for message, text in zip(messages, contents, strict=True)]
        text = "".join(contents)
        return Text(text, messages, False, place_turns(text, contents, frame))

    def _render(self, row: dict[str, Any], messages: Sequence[dict[str, Any]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value] # a str, for `tokenize=False`
            list(messages), tokenize=False, **self._template_options(row), **options
        )

    def _template_options(self, row: dict[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return {"chat_template": self.chat_template, "tools": tools, **(row.get("chat_template_kwargs") or {})}

    def _turns(self, row: dict[str, Any], messages: list[dict[str, Any]], text: str) -> Turns | None:
        contents = [content_of(message) for message in messages]
        shapes = [{**message, "content": bool(content)} for message, content in zip(messages, contents, strict=True)]
        shape = repr(([[kv for kv in each.items() if kv[1] is not None] for each in shapes], row.get("tools")))
        shape += repr(row.get("chat_template_kwargs"))
        if shape not in self._frames:
            if len(self._frames) >= MAX_FRAMES:
                self._frames.clear()
            self._frames[shape] = read_frame(messages, partial(self._render, row), self.tokenizer.get_added_vocab())
        frame = self._frames[shape]
        return None if frame is None else place_turns(text, contents, frame)

    def _encode(self, rows: list[dict[str, Any]], texts: list[Text | None]) -> None:
        """Tokenise the texts in as few calls as can be."""
        waiting: dict[bool, list[Text]] = {True: [], False: []}
        for row, text in zip(rows, texts, strict=True):
            if text is None or not self.tokenizer.is_fast:
                continue
            if self.answers_only == "marks" and row.get("input_ids") is None:
                # Only the tokenizer's own rendering knows what its template marks.
                encoded: Any = self.tokenizer.apply_chat_template(
                    text.messages, return_dict=True, return_assistant_tokens_mask=True, **self._template_options(row)
                )
                text.encoding, text.marked = encoded.encodings[0], encoded["assistant_masks"]
            else:
                waiting[text.is_chat].append(text)
        for is_chat, batch in waiting.items():
            for text, encoding in zip(batch, self._tokenise([text.text for text in batch], is_chat), strict=True):
                text.encoding = encoding

    def _tokenise(self, texts: list[str], is_chat: bool) -> list[Any]:
        # A template writes the special tokens itself.
        return (self.tokenizer(texts, add_special_tokens=not is_chat).encodings or []) if texts else []

    def _targets(self, row: dict[str, Any], text: Any, blocks: Blocks | None) -> np.ndarray:
        """Bool `(tokens,)`: which tokens of a conversation are in the loss."""
        ids = text.encoding.ids
        targets = np.ones(len(ids), dtype=bool)
        if self.completion_only and row.get("prompt"):
            prompt = self._render(row, row["prompt"], add_generation_prompt=True)
            targets[: common_prefix_length(self._tokenise([prompt], True)[0].ids, ids)] = False
        if text.marked is not None:
            if 1 not in text.marked:
                raise RuntimeError(
                    "`assistant_only_loss=True` found no answer in a row: its conversation has none, or the chat "
                    "template marks none with `{% generation %}`. Leave such rows out, or mark the answers."
                )
            targets &= np.array(text.marked, dtype=bool)
        if self.answers_only == "turns":
            if blocks is None:
                raise ValueError(
                    "`assistant_only_loss=True` cannot find the answers of a row in the text that the chat template "
                    f"makes of it, {text.text[:200]!r} … Mark them in the template with `{{% generation %}}`, or set "
                    "`assistant_only_loss=False`."
                )
            targets &= _answers(text, blocks, set(self.tokenizer.get_added_vocab().values()))
        return targets

    def _blocks(self, row: dict[str, Any], text: Text) -> Blocks | None:
        """The blocks by the row's text; `None` where it does not tell them."""
        parts, given, encoding = row.get("parts") or [], row.get("input_ids"), text.encoding
        if text.turns is None or encoding is None or (given is not None and list(given) != encoding.ids):
            if parts:
                raise ValueError(
                    "`parts` need character offsets, which a slow tokenizer does not give. Load a fast one "
                    "(`use_fast=True`)."
                    if not self.tokenizer.is_fast
                    else "`parts` cannot be placed: the row's text is not what its chat template makes of other rows, "
                    "or does not tokenise to its `input_ids`. Give a `block_lengths` column instead."
                )
            return None
        # Of a part and a turn that begin at one character the response comes last, and stays.
        cuts = sorted(text.turns.cuts + _part_cuts(text, text.turns, parts))
        tokens = [_token_at(encoding, cut.start, len(text.text)) for cut in cuts]
        return blocks_at(tokens, [cut.response for cut in cuts], len(encoding.ids))


def _token_at(encoding: Any, character: int, end: int) -> int:
    """The first token that ends behind a character; the number of tokens where there is none."""
    for at in range(character, end):
        token = encoding.char_to_token(at)
        if token is not None:  # some tokenizers leave out white space
            return token
    return len(encoding.ids)


def _answers(text: Text, blocks: Blocks, special_ids: set[int]) -> np.ndarray:
    """Bool `(tokens,)`: the tokens of answers, up to the special token that ends one if there is one.

    What a template writes behind it (a line end) is never generated.
    """
    answers = np.repeat(blocks.response, blocks.lengths)
    ends = np.cumsum(blocks.lengths)
    for start, end in zip((ends - blocks.lengths)[blocks.response], ends[blocks.response], strict=True):
        last = end - 1
        while last > start and not text.text[slice(*text.encoding.token_to_chars(int(last)))].strip():
            last -= 1
        if text.encoding.ids[last] in special_ids:
            answers[last + 1 : end] = False
    return answers


def _part_cuts(text: Text, turns: Turns, parts: list[dict[str, Any]]) -> list[Cut]:
    """A part begins a block; the text after it begins one too unless it is only the space before the next part."""
    cuts = []
    for part in parts:
        index, start, end = part["message"], part["start"], part["end"]
        messages = text.messages
        if not (0 <= index < len(messages) and 0 <= start < end <= len(messages[index].get("content") or "")):
            raise ValueError(
                f"`parts` must give a message and character offsets inside it, got {part!r} for {len(messages)} "
                "messages. Count the offsets in the message's `content`."
            )
        content = messages[index]["content"]
        begin = turns.starts.get(index)
        if begin is None:
            raise ValueError(
                f"`parts` name message {index}, but the chat template does not show its content as it stands. "
                "Give a `block_lengths` column instead."
            )
        # The content begins as it stands, or trimmed; offsets count from the untrimmed one.
        origin = begin if text.text.startswith(content, begin) else begin - (len(content) - len(content.lstrip()))
        response = messages[index]["role"] == "assistant"
        cuts.append(Cut(origin + start, response))
        following = [other["start"] for other in parts if other["message"] == index and other["start"] >= end]
        if content[end : min(following, default=len(content))].strip():
            cuts.append(Cut(origin + end, response))
    return cuts


def prepare_rows(
    dataset: Any,
    preparer: RowPreparer,
    name: str,
    *,
    only_tokens: bool,
    stream_count: Callable[..., bool],
    **progress: Any,
) -> Any:
    """Map a preparer over a data set and leave out the rows that train nothing, saying how many.

    Args:
        dataset: `Dataset` or `IterableDataset`.
        preparer: what to map.
        name: what to call the data set in the log.
        only_tokens: whether the other columns may go, for packing.
        stream_count: called with the `FLAGS` of each row of a streamed data set; returns whether it stays.
        **progress: what `map` of this kind of data set takes.
    """
    columns = get_dataset_column_names(dataset)
    spent = columns if only_tokens else [column for column in columns if column == "block_lengths"]
    dataset = dataset.map(preparer, batched=True, batch_size=BATCH_SIZE, remove_columns=spent, **progress)
    if not isinstance(dataset, Dataset):
        return dataset.filter(stream_count, input_columns=list(FLAGS)).remove_columns(list(FLAGS))
    flags = {flag: np.array(dataset[flag][:], dtype=bool) for flag in FLAGS}
    for flag, message in FLAGS.items():
        if not flags[flag].all():
            logger.warning("%d of %d rows of the %s dataset %s", (~flags[flag]).sum(), len(dataset), name, message)
    trains = flags["trains"]
    if not trains.any():
        raise ValueError(
            f"`max_length` must leave a target in some row of the {name} dataset, got none in {trains.size} rows. "
            "Raise it, or check that the rows hold answers."
        )
    kept = dataset if trains.all() else dataset.select(trains.nonzero()[0])
    return kept.remove_columns(list(FLAGS))


def map_options(dataset: Any, args: Any, desc: str) -> dict[str, Any]:
    """Return what `map` and `filter` of a data set in memory or on disk take, and those of a streamed one do not."""
    return {"num_proc": args.dataset_num_proc, "desc": desc} if isinstance(dataset, Dataset) else {}


def is_fast(processing_class: Any) -> bool:
    """Whether it is a tokenizer that knows the characters of its tokens."""
    return isinstance(processing_class, PreTrainedTokenizerBase) and processing_class.is_fast


def as_conversations(dataset: Any, **progress: Any) -> Any:
    """Return the data set in ChatML's form if it holds conversations that are not tokenised yet, else `None`."""
    first = next(iter(dataset))
    if "input_ids" in first:
        return None
    if is_conversational_from_value(first):
        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations", **progress)
        first = next(iter(dataset))
    return dataset if is_conversational(first) else None


def lacks_marks(processing_class: Any, dataset: Any) -> bool:
    """Whether the answers of a data set's conversations must be found without the template's help.

    TRL's `assistant_only_loss` refuses templates without `{% generation %}` of which it knows no version with them.
    """
    sample: dict[str, Any] = next(iter(dataset), {}) if isinstance(dataset, (Dataset, IterableDataset)) else {}
    template = getattr(processing_class, "chat_template", None)
    if "input_ids" in sample or not is_conversational(sample) or not is_fast(processing_class) or not template:
        return False
    if has_generation_markers(template):
        return False
    try:
        get_training_chat_template(processing_class)
    except ValueError:
        logger.warning(
            "The chat template marks no answers with `{% generation %}`: `assistant_only_loss` takes them from where "
            "the turns stand in the text."
        )
        return True
    return False


def kept_tokens(args: SFTConfig, packing: bool) -> slice:
    """What truncation leaves of a row. TRL's "bfd" keeps the start, whatever the truncation mode.

    Raises:
        ValueError: a mode that there is not, or packing without a length.
    """
    if packing and args.max_length is None:
        raise ValueError("`max_length` must be the length of a packed row, got None. Set it, or `packing=False`.")
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(
            f"`truncation_mode` must be 'keep_start' or 'keep_end', got {args.truncation_mode!r}. Set one of them."
        )
    if args.max_length is None or (packing and args.packing_strategy != "bfd"):
        return slice(None)
    keeps_end = args.truncation_mode == "keep_end" and not packing
    return slice(-args.max_length, None) if keeps_end else slice(args.max_length)
