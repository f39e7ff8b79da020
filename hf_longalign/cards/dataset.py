"""The card of a synthesised data set: what it holds, what it was made from and how, and how to train on it."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import DatasetCardData

from hf_longalign.cards.page import REPOSITORY, check_license, render


TITLE = "Long-context instruction data"
SUMMARIES = {"gov_report", "qmsum", "multi_news"}
# Upper ends of the Hub's size categories, exclusive.
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Small models to train with, by the positions that they are made for or that their RoPE is often scaled to.
MODELS = ((32_768, "Qwen/Qwen2.5-0.5B-Instruct"), (131_072, "Qwen/Qwen3-4B-Instruct-2507"))


@dataclass(frozen=True)
class DataSource:
    """A file or Hub data set that seeds were read from: `rows` were used, for `task` where it is one."""

    name: str
    rows: int
    task: str = ""
    on_hub: bool = False


@dataclass(frozen=True)
class Cost:
    """What replies took; `usd` where prices are known."""

    replies: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None


@dataclass(frozen=True)
class DataRecord:
    """What is known of a data set; what is empty or `None` is not known and not told."""

    method: str  # "context", "given" or "instruction"
    splits: dict[str, dict[str, int]]  # rows by configuration and split
    tasks: dict[str, int]  # rows of `chat` by task
    rejected: dict[str, int] = field(default_factory=dict)  # seeds by reason
    generator: str = ""  # "openai", "batch", "transformers", "vllm" or "documents"
    model: str = ""  # that wrote
    judge_model: str = ""  # where it is another one
    sampling: dict[str, Any] = field(default_factory=dict)
    longbench_prompts: list[str] = field(default_factory=list)  # tasks whose rows stand in LongBench's own prompts
    prompts: tuple[int, str] | None = None  # how many different ones led to the contexts, digest of their digests
    checks: list[str] = field(default_factory=list)  # that every context passed
    neutralised: int = 0  # rows of `chat` with marks of chat templates that were made plain words of
    lengths: list[int] = field(default_factory=list)  # of every row of `chat`, in `unit`
    unit: str = "tokens"  # or "words", where no tokenizer counted
    depths: list[float] = field(default_factory=list)  # `gold_depth` of the rows that have distractors
    contexts: tuple[int, int] | None = None  # the least and the most of a row
    seeds: list[DataSource] = field(default_factory=list)  # where the instructions and answers come from
    decontaminated: list[str] = field(default_factory=list)  # evaluation sets that nothing may overlap with
    ngram: int | None = None  # so many words in a row are an overlap
    cost: Cost | None = None  # of the replies that the rows, rejected ones included, were made from
    settings: dict[str, Any] = field(default_factory=dict)  # the others that were in use, by name
    languages: list[str] = field(default_factory=list)  # ISO 639 codes
    hf_longalign: str | None = None  # version of this package


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
