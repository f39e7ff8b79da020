"""`DataRecord`: what is known of a synthesised data set; its card is made from it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_longalign.records.base import Record


@dataclass(frozen=True)
class DataSource(Record):
    """A file or Hub data set that seeds were read from: `rows` were used, for `task` where it is one."""

    name: str
    rows: int
    task: str = ""
    on_hub: bool = False


@dataclass(frozen=True)
class Cost(Record):
    """What replies took; `usd` where prices are known."""

    replies: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None


@dataclass(frozen=True)
class DataRecord(Record):
    """What is known of a data set; what is empty or `None` is not known and not told.

    Attributes:
        method: "context", "given" or "instruction".
        splits: rows by configuration and split.
        tasks: rows of `chat` by task.
        rejected: rejected seeds by reason.
        generator: "openai", "batch", "transformers", "vllm" or "documents".
        model: the model that wrote.
        judge_model: the model that judged, where it is another one.
        sampling: sampling settings by name.
        longbench_prompts: tasks whose rows stand in LongBench's own prompts.
        prompts: how many different prompts led to the contexts, and the digest of all their digests.
        checks: the checks every context passed.
        neutralised: rows of `chat` with marks of chat templates that were made plain words of.
        lengths: the length of every row of `chat`, in `unit`.
        unit: "tokens", or "words" where no tokenizer counted.
        depths: `gold_depth` of the rows that have distractors.
        contexts: the least and the most contexts of a row.
        seeds: where the instructions and answers come from.
        decontaminated: names of the evaluation sets that seeds and contexts must not overlap with.
        ngram: how many words in a row count as an overlap.
        cost: of the replies that the rows, rejected ones included, were made from.
        settings: the other settings that were in use, by name.
        languages: ISO 639 codes.
        hf_longalign: version of this package.
        version: of this format.
    """

    VERSION: ClassVar[int] = 1

    method: str
    splits: dict[str, dict[str, int]]
    tasks: dict[str, int]
    rejected: dict[str, int] = field(default_factory=dict)
    generator: str = ""
    model: str = ""
    judge_model: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    longbench_prompts: list[str] = field(default_factory=list)
    prompts: tuple[int, str] | None = None
    checks: list[str] = field(default_factory=list)
    neutralised: int = 0
    lengths: list[int] = field(default_factory=list)
    unit: str = "tokens"
    depths: list[float] = field(default_factory=list)
    contexts: tuple[int, int] | None = None
    seeds: list[DataSource] = field(default_factory=list)
    decontaminated: list[str] = field(default_factory=list)
    ngram: int | None = None
    cost: Cost | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    hf_longalign: str | None = None
    version: int = 1
