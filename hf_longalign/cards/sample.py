"""One row of a data set, shortened so that a person sees its shape at a glance."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from hf_longalign.cards.markdown import fenced, join


_HEAD, _TAIL, _WIDTH = 700, 500, 100
_ITEMS = 3


def show_sample(row: Mapping[str, Any]) -> str:
    """Return a section that shows the messages of a row as text and its other columns as JSON."""
    messages = [
        join(
            f"**{message['role'].capitalize()}**, {len(message['content']):,} characters:",
            fenced("text", _wrapped(shorten(message["content"]))),
        )
        for message in row.get("messages") or []
    ]
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(_short(value), ensure_ascii=False)}"
        for name, value in row.items()
        if name != "messages" and value not in (None, [])
    )
    return join("## A row", *messages, "Its other columns:", fenced("json", f"{{\n{lines}\n}}"))


def shorten(text: str, head: int = _HEAD, tail: int = _TAIL) -> str:
    r"""Return about so many characters of the beginning and the end of a long text, whole words where it has blanks.

    >>> shorten("one two three four five", head=6, tail=6)
    'one\n\n[... 16 more characters ...]\n\nfive'
    """
    if len(text) <= head + tail:
        return text
    blank = text.rfind(" ", head // 2, head)
    first = text[: blank if blank > 0 else head]
    start = len(text) - tail
    blank = text.find(" ", start, start + tail // 2) if tail else -1
    last = text[blank + 1 if blank > 0 else start :]
    note = f"[... {len(text) - len(first) - len(last):,} more characters ...]"
    return "\n\n".join(filter(None, [first, note, last]))


def _wrapped(text: str) -> str:
    lines = (textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join("\n".join(line) for line in lines)


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return shorten(value, 200, 0) if len(value) > 240 else value
    if isinstance(value, Mapping):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        kept = [_short(item) for item in value[:_ITEMS]]
        return [*kept, f"... {len(value) - _ITEMS:,} more"] if len(value) > _ITEMS + 1 else [_short(v) for v in value]
    return value
