"""The scores of a `Report` as a card's tables, as the Hub's `model-index`, and as its `.eval_results`."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from hf_longalign.cards.page import REPOSITORY, SOURCE, code, listed, plain, table
from hf_longalign.records.report import (
    Difference,
    Reach,
    ReachResult,
    Report,
    Score,
    SuiteResult,
    TaskResult,
    metric_of,
    suite_of,
)


# Pictures of a report or a training by the stems of their files, with what a page says of them.
PICTURES = {
    "needle_accuracy": "Accuracy by context length",
    "needle_heatmap": "Accuracy by depth and length",
    "perplexity": "Perplexity by position",
    "coverage": "Relative distances met in training",
    "distances": "Loss by distance",
}


class _Measured(NamedTuple):
    """One score of the model of interest, at one length where the task has several."""

    suite: SuiteResult
    task: TaskResult
    length: int | None
    score: Score

    @property
    def dataset(self) -> str:
        """The Hub id of the data; empty where there is none."""
        return self.task.dataset or suite_of(self.suite.suite).dataset

    @property
    def conditions(self) -> dict[str, Any]:
        """What a reader must know to compare the score."""
        known = {"length": self.length, "haystack": self.task.haystack, "samples": self.task.samples or None}
        return {name: value for name, value in known.items() if value is not None}


def _measured(report: Report) -> Iterator[_Measured]:
    label = report.labels[-1]
    for suite in report.suites:
        for task in suite.tasks:
            # Each length is a result of its own: the Hub would take two lengths of one task for the same test.
            by_length: list[tuple[int | None, dict[str, Score]]] = [*task.scores_by_length.items()]
            for length, scores in by_length or [(None, task.scores)]:
                if label in scores:
                    yield _Measured(suite, task, length, scores[label])


def eval_results(report: Report, repo_id: str = REPOSITORY) -> list[EvalResult]:
    """Return the scores of the model evaluated last for a `model-index`, in percent, each with its conditions.

    >>> from hf_longalign.records.report import EvaluatedModel
    >>> task = TaskResult("qasper", "qa_f1", samples=200, scores={"adapter": Score(0.4567)})
    >>> report = Report([EvaluatedModel("adapter", "a")], [SuiteResult("longbench", [task])])
    >>> found = eval_results(report, "user/a")[0]
    >>> found.dataset_type, found.metric_type, found.metric_value, found.dataset_args
    ('zai-org/LongBench', 'f1', 45.7, {'samples': 200})
    """
    results = []
    for found in _measured(report):
        metric, title = metric_of(found.task.metric or "score"), suite_of(found.suite.suite).title
        at = "" if found.length is None else f", {found.length:,} tokens"
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=found.dataset or f"{found.suite.suite}_{found.task.task}",
                dataset_name=f"{title}, {found.task.task}{at}",
                # The Hub joins what has one configuration: a length is one.
                dataset_config=found.task.task + ("" if found.length is None else f"_{found.length}"),
                dataset_args=found.conditions,
                metric_type=metric.hub_id,
                metric_name=f"{metric.title} (%)",
                metric_value=round(100 * found.score.value, 1),
                source_name=SOURCE,
                source_url=f"https://huggingface.co/{repo_id}",
            )
        )
    return results


def hub_results(report: Report, repo_id: str) -> dict[str, bytes]:
    """Return files of the Hub's `.eval_results`, by path: of the scores whose data set the Hub knows.

    Specification: https://huggingface.co/docs/hub/eval-results
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for found in _measured(report):
        if "/" not in found.dataset:  # the Hub joins results by data set, and a suite made here has none
            continue
        notes = {metric_of(found.task.metric or "score").title: "in percent", **found.conditions}
        entry = EvalResultEntry(
            dataset_id=found.dataset,
            task_id=found.task.task,
            value=round(100 * found.score.value, 1),
            date=report.date,
            source_url=f"https://huggingface.co/{repo_id}/blob/main/report.md",
            source_name="Evaluation report",
            notes=", ".join(f"{name} {value}" for name, value in notes.items()),
        )
        entries.setdefault(found.suite.suite, []).append(entry)
    return {
        f".eval_results/{suite}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False).encode()
        for suite, found in entries.items()
    }


def headline(report: Report) -> str:
    """Return one line per suite: its average of all models, and how many tasks changed beyond chance."""
    labels, rows = report.labels, []
    # One model alone is compared with nothing.
    for suite in report.suites if len(report.labels) > 1 else []:
        # The suite's own average, where it has one, else the mean of the tasks that all models have scores for.
        own = [group.scores for group in suite.groups if group.group in ("average", "overall")]
        own = [scores for scores in own if set(labels) <= set(scores)][:1]
        own = own or [
            {label: score.value for label, score in task.scores.items()}
            for task in suite.tasks
            if set(labels) <= set(task.scores)
        ]
        if not own:
            continue
        means = (percent(sum(scores[label] for scores in own) / len(own)) for label in labels)
        found = [_difference(task, labels) for task in suite.tasks]
        # Words follow the numbers: a change within its interval is none, however large.
        words = Counter(
            "no clear change" if not change.significant else "better" if change.value > 0 else "worse"
            for change in found
            if change is not None and change.low is not None
        )
        told = ", ".join(f"{words[word]} {word}" for word in ("better", "worse", "no clear change") if words[word])
        rows.append([suite_of(suite.suite).title, *means, told])
    head = ["average in percent", *labels, f"tasks, {labels[-1]} against {labels[0]}"]
    return table(head, rows, right=range(1, len(labels) + 1))


def reaches(report: Report) -> str:
    """Return how far each model reaches, a row per suite and rule; empty where no length was measured."""

    def shown(found: Reach) -> str:
        length, low, high = f"{found.length:,}" if found.length else "none", found.low, found.high
        return length if found.length == low == high else f"{length} ({low:,}–{high:,})"

    labels = report.labels
    change = [f"{labels[-1]} − {labels[0]}"] if len(labels) > 1 else []
    rows = []
    for suite in report.suites:
        for found in suite.reaches:
            moved = _difference(found, labels)
            told = reach_moved(moved) if moved else ""
            changed = [f"**{told}**" if moved and moved.significant else told] if change else []
            own = (shown(found.reach[label]) for label in labels)
            rows.append((suite_of(suite.suite).title, found.rule, *own, *changed))
    if not rows:
        return ""
    note = "The longest length up to which the score keeps to the rule, in tokens, with its 95 % interval."
    return f"{table(('effective length', 'rule', *labels, *change), rows)}\n\n{note}"


def reach_moved(moved: Difference) -> str:
    """Return by how much a model reaches further than another, in tokens, with its 95 % interval.

    >>> reach_moved(Difference("adapter", "base", 2048, -1024, 4096))
    '+2,048 (−1,024 to +4,096)'
    """
    return _shown(moved, lambda tokens: f"{int(tokens):+,}".replace("-", "−").replace("+0", "0"), " to ")


def scores_table(report: Report, suite: SuiteResult) -> str:
    """Return the tasks of a suite as a table, a column per model, with 95 % intervals where there are any."""
    labels, metrics = report.labels, _metrics(suite)
    change = [f"{labels[-1]} − {labels[0]}"] if len(labels) > 1 else []
    # Where all tasks have one metric, the note under the table names it.
    head = ["task", *(["metric"] if len(metrics) > 1 else []), "samples", *labels, *change]
    rows: list[list[Any]] = []
    for task in suite.tasks:
        if task.scores:
            metric = [metric_of(task.metric or "score").title] if len(metrics) > 1 else []
            cells = [_shown(task.scores.get(label), percent, "–") for label in labels]
            found = _difference(task, labels)
            told = _shown(found, _signed, " to ")
            changed = [f"**{told}**" if found and found.significant else told] if change else []
            rows.append([code(task.task), *metric, task.samples, *cells, *changed])
    for group in suite.groups:
        cells = [percent(group.scores[label]) if label in group.scores else "" for label in labels]
        rows.append(
            [f"*{plain(group.group)}*", *([""] if len(metrics) > 1 else []), "", *cells, *([""] if change else [])]
        )
    return table(head, rows, right=range(len(head) - len(labels) - len(change) - 1, len(head)))


def scores_note(suite: SuiteResult) -> str:
    """Return what the numbers of a suite are, and what was not measured as meant; the report holds the reasons."""
    metrics = _metrics(suite)
    name = metrics[0] if len(metrics) == 1 else "scores"
    sentences = [f"{name[0].upper()}{name[1:]} in percent."] if metrics else []
    lengths = sorted({length for task in suite.tasks if task.grid for length in task.grid.lengths})
    sentences += [f"Texts of {listed([f'{length:,}' for length in lengths])} tokens."] if lengths else []
    hay = {task.haystack for task in suite.tasks if task.haystack}
    sentences += [f"Haystack: {listed(sorted(hay))}."] if hay else []
    for told, tasks in (
        ("Not measured", [task for task in suite.tasks if task.error]),
        ("Answers cut at the limit of new tokens", [task for task in suite.tasks if any(task.cut_answers.values())]),
        ("Prompts cut or left out", [task for task in suite.tasks if task.cut_prompts or task.left_out]),
        ("With a note in the report", [task for task in suite.tasks if task.note]),
    ):
        sentences += [f"{told}: {listed([code(task.task) for task in tasks])}."] if tasks else []
    return " ".join(sentences)


def _metrics(suite: SuiteResult) -> list[str]:
    return list(dict.fromkeys(metric_of(task.metric or "score").title for task in suite.tasks if task.scores))


def percent(value: float) -> str:
    """Return a score from 0 to 1 as a table shows it.

    >>> percent(0.4567)
    '45.7'
    """
    return f"{100 * value:.1f}"


def _shown(found: Score | Difference | None, write: Callable[[float], str], to: str) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return write(found.value)
    return f"{write(found.value)} ({write(found.low)}{to}{write(found.high)})"


def _difference(task: TaskResult | ReachResult, labels: list[str]) -> Difference | None:
    return next((d for d in task.differences if (d.label, d.reference) == (labels[-1], labels[0])), None)


def _signed(value: float) -> str:
    """A difference in percent points, with a real minus; what rounds to nothing has no sign."""
    # Rounded first, for -0.04 would be shown as a loss of nothing.
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text
