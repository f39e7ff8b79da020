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
    """What is known of a data set; what is empty or `None` is not known and not told."""

    VERSION: ClassVar[int] = 1

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
    version: int = 1  # of this format
