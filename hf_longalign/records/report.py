"""`Report`: what an evaluation measured, `report.json`; its Markdown, its pictures and the card are made from it.

`SUITES` and `METRICS` say what all of these, and the Hub, call the suites and metrics.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from hf_longalign.records.base import Record


class Suite(NamedTuple):
    """A suite: its title, and the Hub id of the data behind it ("": made by the package, or each task its own)."""

    title: str
    dataset: str = ""


class Metric(NamedTuple):
    """A metric: its title, and its id on the Hub (https://huggingface.co/metrics)."""

    title: str
    hub_id: str


SUITES = {
    "needle": Suite("Needle in a haystack"),
    "longbench": Suite("LongBench", "zai-org/LongBench"),
    "puzzles": Suite("Puzzles"),
    "ruler": Suite("RULER"),
    "passages": Suite("Questions about passages"),
    "short": Suite("Short contexts"),
}
METRICS = {
    "exact_match": Metric("exact match", "exact_match"),
    "recall": Metric("share of values found", "recall"),
    "set_f1": Metric("F1 of the names", "f1"),
    "string_match": Metric("string match", "recall"),
    "qa_f1": Metric("F1", "f1"),
    "qa_f1_zh": Metric("F1", "f1"),
    "rouge_l": Metric("ROUGE-L", "rouge"),
    "rouge_l_zh": Metric("ROUGE-L", "rouge"),
    "classification": Metric("accuracy", "accuracy"),
    "count": Metric("share of right counts", "accuracy"),
    "retrieval": Metric("accuracy", "accuracy"),
    "retrieval_zh": Metric("accuracy", "accuracy"),
    "code_similarity": Metric("edit similarity", "edit_similarity"),
    "choice": Metric("accuracy", "accuracy"),
    "acc": Metric("accuracy", "accuracy"),
    "acc_norm": Metric("length-normalised accuracy", "accuracy"),
}


def suite_of(name: str) -> Suite:
    """Return a suite; one that the table does not know is called by its name.

    >>> suite_of("ruler").title, suite_of("mine").title
    ('RULER', 'mine')
    """
    return SUITES.get(name, Suite(name))


def metric_of(key: str) -> Metric:
    """Return a metric; lm-eval's names carry a filter behind a comma, which is not part of it.

    >>> metric_of("exact_match,strict-match").title, metric_of("rouge_l").title, metric_of("my_score")
    ('exact match', 'ROUGE-L', Metric(title='my score', hub_id='my_score'))
    """
    name = key.partition(",")[0]
    return METRICS.get(name, Metric(name.replace("_", " "), name))


@dataclass(frozen=True)
class EvaluatedModel(Record):
    """A model that was asked; scores name it by `label`. `what` says in words what it is."""

    label: str
    name: str
    revision: str | None = None
    what: str = ""


@dataclass(frozen=True)
class Score(Record):
    """A mean of scores from 0 to 1 with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference(Record):
    """What the model `label` has more than the model `reference` on the same prompts."""

    label: str
    reference: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Grid(Record):
    """Scores by depth and length (tokens): `cells` `(depths, lengths)` and `by_length`, by label of the model."""

    lengths: list[int]
    depths: list[float]
    cells: dict[str, list[list[float]]]
    by_length: dict[str, list[Score]]


@dataclass(frozen=True)
class Diagnosis(Record):
    """Why answers over a long text are right or wrong: shares of the samples, which add up to 1, and what is guessed.

    `cannot_find` fails over the long text and is right over the evidence alone; `cannot_use` fails over both.
    `closed_book`, of all samples, is right without any text: such an answer proves no reading.
    """

    right: float
    cannot_find: float
    cannot_use: float
    closed_book: float


@dataclass(frozen=True)
class TaskResult(Record):
    """The results of one task."""

    task: str
    metric: str | None = None  # key of `METRICS`; `None` where nothing was measured
    samples: int = 0  # questions asked, counted once, not per depth
    scores: dict[str, Score] = field(default_factory=dict)  # of its metric, by label of the model
    others: dict[str, dict[str, float]] = field(default_factory=dict)  # means of further metrics, by metric and label
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # its metric over "0-4k" or "hard", by label
    differences: list[Difference] = field(default_factory=list)  # between models, on the same prompts
    grid: Grid | None = None  # where prompts have depth and length
    length: int | None = None  # of the prompts in tokens, where all have the same
    haystack: str | None = None  # what needles lay in
    dataset: str | None = None  # Hub id of the data behind it, where it is not that of its suite
    cut_answers: dict[str, int] = field(default_factory=dict)  # that ended at the limit of new tokens, by label
    cut_prompts: int = 0  # shortened to fit
    left_out: int = 0  # prompts that were not asked
    diagnosis: dict[str, Diagnosis] = field(default_factory=dict)  # at the longest length, by label, if asked for
    error: str | None = None  # why it was not measured
    note: str | None = None  # what a reader must know of the number

    @property
    def scores_by_length(self) -> dict[int, dict[str, Score]]:
        """Scores by length in tokens and label of the model; empty where prompts are as long as they are."""
        if self.grid is None:
            return {} if self.length is None else {self.length: self.scores}
        by_length = self.grid.by_length
        return {n: {label: row[at] for label, row in by_length.items()} for at, n in enumerate(self.grid.lengths)}


@dataclass(frozen=True)
class GroupResult(Record):
    """The mean over the tasks of a group ("average": over all), by label of the model."""

    group: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Reach(Record):
    """An effective length in tokens with its 95 % interval; 0 where even the shortest length falls short.

    Where an end is the longest length that was asked, the model may reach further.
    """

    length: int
    low: int
    high: int


@dataclass(frozen=True)
class ReachResult(Record):
    """How far models reach over all tasks of a suite, by a `rule` told in words, by label of the model.

    `differences` between models are in tokens, with 95 % intervals over the same samples.
    """

    rule: str
    reach: dict[str, Reach]
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class SuiteResult(Record):
    """The results of a suite, a key of `SUITES`."""

    suite: str
    tasks: list[TaskResult]
    groups: list[GroupResult] = field(default_factory=list)
    reaches: list[ReachResult] = field(default_factory=list)


@dataclass(frozen=True)
class PerplexityResult(Record):
    """Perplexity by position: `edges` `(bins + 1,)` in tokens, and by label one value per bin, `None` where empty."""

    edges: list[int]
    window: int
    documents: int
    values: dict[str, list[float | None]]


@dataclass
class Speed(Record):
    """What answering took, added up over all calls of a generator; of several processes the sum."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them not computed, because an earlier prompt had them too
    generated_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Report(Record):
    """The report of an evaluation."""

    VERSION: ClassVar[int] = 1

    models: list[EvaluatedModel]  # the reference first, the model of interest last
    suites: list[SuiteResult]
    prompts: str = ""  # fingerprint of all that was asked; reports with the same one compare
    settings: dict[str, Any] = field(default_factory=dict)  # what a reader must know to ask the same again
    date: str | None = None  # ISO 8601
    perplexity: PerplexityResult | None = None
    speed: dict[str, Speed] = field(default_factory=dict)  # by label of the model
    images: list[str] = field(default_factory=list)  # file names beside `report.json`
    hf_longalign: str | None = None  # version of this package
    version: int = 1  # of this format

    @property
    def labels(self) -> list[str]:
        """Labels of the models, in order."""
        return [model.label for model in self.models]
