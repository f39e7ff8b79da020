"""The card of a synthesised data set: what it holds, what it was made from and how, and how to train on it."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCardData

from hf_longalign.cards.page import REPOSITORY, check_license, render
from hf_longalign.records.data import DataRecord


TITLE = "Long-context instruction data"
SUMMARIES = {"gov_report", "qmsum", "multi_news"}
# Upper ends of the Hub's size categories, exclusive.
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Small models to train with, by the positions that they are made for or that their RoPE is often scaled to.
MODELS = ((32_768, "Qwen/Qwen2.5-0.5B-Instruct"), (131_072, "Qwen/Qwen3-4B-Instruct-2507"))


def dataset_card(
    record: DataRecord,
    *,
    sample: Mapping[str, Any] | None = None,
    picture: str | None = None,
    license: str | None = None,
    seeds_license: str | None = None,
    repo_id: str = REPOSITORY,
) -> str:
    """Return the README.md of a data set; what is not known does not stand in it.

    Args:
        record: of the data set.
        sample: a row of `chat`, shown shortened.
        picture: path of the picture of lengths and depths, relative to the card.
        license: licence of the data set, as the Hub names it.
        seeds_license: licence of the seeds, as the Hub names it.
        repo_id: `user/name`; unset, a placeholder stands there until it is pushed.

    Raises:
        ValueError: a licence that is no id of the Hub.

    Example:

    >>> card = dataset_card(DataRecord("given", {"chat": {"train": 2}}, {"qasper": 2}, lengths=[100, 300]))
    >>> "path: chat/train-*.parquet" in card, "| 100 | 200 | 300 | 300 |" in card
    (True, True)
    """
    check_license(license=license, seeds_license=seeds_license)
    categories = ["question-answering"] if set(record.tasks) - SUMMARIES else []
    categories += ["summarization"] if set(record.tasks) & SUMMARIES else []
    written = [] if record.method == "given" else ["context-synthesis", "synthetic"]
    metadata = DatasetCardData(
        pretty_name=TITLE,
        license=license,
        language=record.languages or None,
        task_categories=[*categories, "text-generation"],
        # Of what is trained on: contexts and rejected seeds are no further rows.
        size_categories=[size_category(sum(record.splits["chat"].values()))],
        tags=["hf_longalign", "trl", "long-context", "instruction-tuning", *written],
        configs=[
            {
                "config_name": config,
                **({"default": True} if config == "chat" else {}),
                "data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits],
            }
            for config, splits in record.splits.items()
        ],
    )
    ordered = sorted(record.lengths)
    mean, most_have = (sum(ordered) // len(ordered), ordered[round(0.9 * (len(ordered) - 1))]) if ordered else (0, 0)
    values = {
        "title": TITLE,
        "record": record,
        "name": repo_id,
        "training": _training(record),
        "sampling": ", ".join(f"{name} {value}" for name, value in record.sampling.items()),
        "seeds_license": seeds_license,
        "lengths": ordered and [ordered[0], mean, most_have, ordered[-1]],
        "picture": picture,
        "sample": _sample(sample) if sample else None,
        "citations": [
            *(["zhu2025generalizing"] if record.method != "given" else []),
            *(["bai2023longbench"] if record.longbench_prompts else []),
        ],
    }
    return render("dataset.md.jinja", metadata, values)


def size_category(rows: int) -> str:
    """Return the Hub's name for a number of rows.

    >>> size_category(999), size_category(1600)
    ('n<1K', '1K<n<10K')
    """
    return next((name for most, name in SIZES if rows < most), "n>10M" if rows >= 10**9 else "10M<n<100M")


def shorten(text: str, head: int = 700, tail: int = 500) -> str:
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


def _training(record: DataRecord) -> dict[str, Any] | None:
    """What to train with so that every row stays whole; `None` where no model is long enough."""
    if not record.lengths:
        return None
    longest = max(record.lengths) * (1 if record.unit == "tokens" else 2)  # at most two tokens a word
    found = next(((target, model) for target, model in MODELS if longest <= target), None)
    if found is None:
        return None
    return {"target": found[0], "model": found[1], "max_length": max(1024, 1 << (longest - 1).bit_length())}


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a person sees its shape at a glance: its messages as text, its other columns as JSON."""
    messages = []
    for message in row.get("messages") or []:
        text = shorten(message["content"])
        # Cards show code blocks unwrapped: a paragraph would be one line of a mile.
        lines = (textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
        wrapped = "\n".join("\n".join(line) for line in lines)
        messages.append((message["role"].capitalize(), len(message["content"]), wrapped))
    columns = (
        f"  {json.dumps(name)}: {json.dumps(_short(value), ensure_ascii=False)}"
        for name, value in row.items()
        if name != "messages" and value not in (None, [])
    )
    return {"messages": messages, "columns": "{\n" + ",\n".join(columns) + "\n}"}


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return shorten(value, 200, 0) if len(value) > 240 else value
    if isinstance(value, Mapping):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        kept = [_short(item) for item in value[:3]]
        return [*kept, f"... {len(value) - 3:,} more"] if len(value) > 4 else [_short(item) for item in value]
    return value
