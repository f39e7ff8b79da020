"""Pieces of Markdown: tables and code."""

import re
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    r"""Return a table; `right` are the columns aligned to the right. Empty text without rows.

    >>> print(table(("a", "b"), [(1, "x|y")], right=[0]))
    | a | b |
    | ---: | --- |
    | 1 | x\|y |
    """
    body = [tuple(row) for row in rows]
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    lines = [head, rule, *body] if body else []
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: Any) -> str:
    """Return a value as a cell of a table shows it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return " ".join(str(value).replace("|", "\\|").split())


def plain(text: Any) -> str:
    """Return text on one line that Markdown and HTML show as it is.

    >>> plain("a_b <!-- x -->")
    'a\\\\_b &lt;!-- x --&gt;'
    """
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]])", r"\\\1", line)


def code(text: Any) -> str:
    """Return text as inline code.

    >>> code("a`b")
    '``a`b``'
    """
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def fenced(language: str, text: str) -> str:
    """Return a block of code, in a fence longer than any inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
