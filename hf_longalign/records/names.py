"""The one table of suites and metrics: what a report, a picture and a card call them, and what the Hub does."""

import re
from typing import NamedTuple


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
