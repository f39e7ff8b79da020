"""Mixing with general instruction data, which the long rows are trained beside."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_longalign.synthesis.rows import BadRowError, Row, read_rows


ROLES = ("system", "user", "assistant")


def draw_general(sources: Sequence[Any], share: float, long_rows: int, seed: int) -> list[dict[str, Any]]:
    """Return general rows, each `{"messages": [...], "seed_id": ...}`, that make up `share` of the whole.

    Args:
        sources: files or Hub data sets with a column `messages` of `{"role", "content"}`.
        share: general rows over all rows, from 0 up to, but not including, 1. Where the sources hold too few, all
            of them are returned.
        long_rows: how many rows they are mixed with.
        seed: seed of the draw.

    Raises:
        BadRowError: a row whose `messages` are no conversation that ends with the assistant.

    Example:

    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> draw_general([[{"messages": chat}] * 9], 0.5, long_rows=2, seed=0)[0]["messages"] == chat
    True
    """
    if not 0 <= share < 1:
        raise ValueError(f"`general_share` must be at least 0 and below 1, got {share!r}. Set the share of all rows.")
    wanted = round(share / (1 - share) * long_rows)
    if not wanted:
        return []
    rows = [row for source in sources for row in read_rows(source)]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:wanted])
    return [_checked(rows[number]) for number in chosen]


def _checked(row: Row) -> dict[str, Any]:
    if row.fault:
        raise row.fault
    messages = row.values.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRowError(row, "no conversation", "Give a list of {role, content}.", "messages")
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES or not isinstance(content, str):
            raise BadRowError(row, f"not a message: {str(message)[:60]}", f"Roles: {', '.join(ROLES)}.", "messages")
    if messages[-1]["role"] != "assistant":
        raise BadRowError(row, "does not end with the assistant", "Cut what follows its last message.", "messages")
    cleaned = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"messages": cleaned, "seed_id": f"general:{row.origin}"}
