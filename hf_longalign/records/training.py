"""`TrainingRecord`: what a reader of a trained model or adapter must know to load, repeat and judge it."""

import re
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


def is_local_path(name: str) -> bool:
    """Return whether a model's name is written as a path of some machine, which no Hub id is.

    >>> is_local_path("/models/tiny"), is_local_path("./tiny"), is_local_path("C:/tiny"), is_local_path("org/tiny")
    (True, True, True, False)
    """
    return name.startswith(("/", "./", "../", "~", "\\", ".\\", "..\\")) or name[1:3] in (":\\", ":/")


def is_hub_id(name: str | None) -> bool:
    """Return whether a name can be that of a repository of the Hub; a path of this machine is none of a reader's.

    >>> is_hub_id("Qwen/Qwen3-4B"), is_hub_id("/home/me/model"), is_hub_id("outputs/run/last"), is_hub_id(None)
    (True, False, False, False)
    """
    return name is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
