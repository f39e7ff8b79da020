"""What a reader must know of a trained model to load, repeat and judge it, and of a synthesised data set."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_longalign.records.base import Record


@dataclass(frozen=True)
class RopeRecord(Record):
    """What defines a model's positions, named as in transformers' config."""

    model_type: str
    max_position_embeddings: int | None = None
    rope_parameters: dict[str, Any] | None = None

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The parameters by layer type, as Gemma 3 has them, or the ones of all layers."""
        parameters = self.rope_parameters or {}
        return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


@dataclass(frozen=True)
class PositionsRecord(Record):
    """How positions were skipped; of ordinary positions ("none") only the strategy is known."""

    strategy: str = "none"
    target_length: int | None = None
    skip_probability: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Histogram(Record):
    """Relative distances by bin: `edges` `(bins + 1,)`, `pairs` of tokens, share of distances `covered`."""

    edges: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class CoverageRecord(Record):
    """Which relative distances below `target_length` a run has trained; spans and distances are in positions."""

    target_length: int
    documents: int = 0
    skip_share: float = 0.0
    skip_span_mean: float = 0.0
    skip_span_max: int = 0
    skip_distance_max: int = 0
    skip_distance_coverage: float = 0.0
    histogram: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True)
class DistancesRecord(Record):
    """Mean loss of evaluation `rows` whose blocks were moved apart to each of `lengths`, before and after training."""

    lengths: list[int]
    rows: int
    before: list[float] | None = None
    after: list[float] | None = None


@dataclass(frozen=True)
class AnswersRecord(Record):
    """Beginnings of greedy answers to prompts of `lines`, of `tokens`: see `hf_longalign.known_answers`."""

    lines: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    chat: bool = True


@dataclass(frozen=True)
class BatchesRecord(Record):
    """How rows became batches and a loss; `max_length` in tokens."""

    loss_weighting: str = "token"
    packing: bool = False
    padding_free: bool = False
    max_length: int | None = None
    attention: str | None = None


@dataclass(frozen=True)
class RunRecord(Record):
    """How a run went; `batch_size` in rows a step over all devices, `seconds` only where it ran from start to end."""

    steps: int = 0
    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    optimizer: str | None = None
    precision: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class HubSource(Record):
    """A model or data set of the Hub: never a path of a machine. `revision` is a commit."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TrainingRecord(Record):
    """The record of a training run: `longalign_config.json` beside the weights."""

    VERSION: ClassVar[int] = 1

    rope: RopeRecord  # of the base model, as trained
    positions: PositionsRecord = field(default_factory=PositionsRecord)
    training: BatchesRecord = field(default_factory=BatchesRecord)
    run: RunRecord = field(default_factory=RunRecord)
    seed: int | None = None  # of the trainer
    base: HubSource | None = None  # where it came from the Hub
    architecture: str | None = None  # class of the model in transformers, adapter and wrappers aside
    data: HubSource | None = None  # where it came from the Hub
    coverage: CoverageRecord | None = None  # `None` with ordinary positions
    distances: DistancesRecord | None = None  # where they were watched
    base_weights: dict[str, list[float]] = field(default_factory=dict)  # see `hf_longalign.adapter.weights_sample`
    answers: AnswersRecord | None = None  # of merged models, by which a server is checked
    hardware: str | None = None  # number and name of the devices
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries
    hf_longalign: str | None = None  # version of this package
    version: int = 1  # of this format


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
