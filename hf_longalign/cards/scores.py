"""The scores of an evaluation's `report.json` as tables of a card, and as the Hub's `model-index`."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_longalign.cards.markdown import code, listed, plain, table


# By suite: its title, and how the Hub names the data behind it.
SUITES = {
    "needle": ("Needle in a haystack", "needle-in-a-haystack"),
    "longbench": ("LongBench", "THUDM/LongBench"),
    "ruler": ("RULER", "ruler"),
    "short": ("Short contexts", ""),
}
METRICS = {
    "acc": "accuracy",
    "acc_norm": "length-normalised accuracy",
    "exact_match": "exact match",
    "qa_f1": "F1",
    "rouge": "ROUGE-L",
}
Report = Mapping[str, Any]


def model_index(report: Report, name: str) -> list[dict[str, Any]]:
    """Return the `model-index` of the model evaluated last: one result per task, scores in percent.

    Empty where nothing was measured. Specification: https://github.com/huggingface/hub-docs/blob/main/modelcard.md

    >>> task = {"task": "qasper", "metric": "f1", "scores": {"adapter": {"value": 0.4567}}}
    >>> report = {"models": [{"label": "adapter", "name": "a"}], "suites": [{"suite": "longbench", "tasks": [task]}]}
    >>> model_index(report, "user/a")[0]["results"][0]["metrics"]
    [{'type': 'f1', 'value': 45.7, 'name': 'f1 (%)'}]
    """
    label = report["models"][-1]["label"]
    results = []
    for suite in report["suites"]:
        title, data = SUITES.get(suite["suite"], (suite["suite"], suite["suite"]))
        for task in suite["tasks"]:
            score = (task.get("scores") or {}).get(label)
            if score is None:
                continue
            metric = _metric(suite, task)
            results.append(
                {
                    "task": {"type": "text-generation", "name": "Text generation"},
                    "dataset": {
                        "name": f"{title}, {task['task']}",
                        "type": data or task["task"],
                        "config": task["task"],
                    },
                    "metrics": [
                        {"type": metric, "value": round(100 * score["value"], 1), "name": f"{words(metric)} (%)"}
                    ],
                }
            )
    return [{"name": name, "results": results}] if results else []


def scores_table(report: Report, suite: Mapping[str, Any]) -> str:
    """Return the tasks of a suite before and after as a table, with 95 % intervals where there are any."""
    labels = [model["label"] for model in report["models"]]
    compares = len(labels) > 1
    differ = _metrics_differ(suite)
    head = ["task", *(["metric"] if differ else []), "samples", *labels, *(["change"] if compares else [])]
    rows: list[list[Any]] = []
    for task in suite["tasks"]:
        scores = task.get("scores") or {}
        if scores:
            cells = [_score(scores.get(label)) for label in labels]
            change = [_change(task, labels)] if compares else []
            metric = [words(_metric(suite, task))] if differ else []
            rows.append([code(task["task"]), *metric, task.get("samples", ""), *cells, *change])
    for group in suite.get("groups") or []:
        values = [group["scores"].get(label) for label in labels]
        cells = ["" if value is None else f"**{100 * value:.1f}**" for value in values]
        change = [_signed(values[-1] - values[0]) if None not in values else ""] if compares else []
        rows.append([f"**{plain(group['group'])}**", *([""] if differ else []), "", *cells, *change])
    return table(head, rows, right=range(2 if differ else 1, len(head)))


def metric_note(suite: Mapping[str, Any]) -> str:
    """Return what the numbers of a suite are.

    >>> metric_note({"metric": "exact_match", "tasks": []})
    'Exact match in percent'
    """
    name = "Scores" if _metrics_differ(suite) else words(_metric(suite, next(iter(suite["tasks"]), {})))
    return f"{name[0].upper()}{name[1:]} in percent"


def words(metric: str) -> str:
    """Return the name of a metric as words.

    >>> words("exact_match"), words("code_sim")
    ('exact match', 'code sim')
    """
    return METRICS.get(metric, metric.replace("_", " "))


def headline(report: Report) -> str:
    """Return one line per suite with its average before and after; empty for a single model."""
    labels = [model["label"] for model in report["models"]]
    rows = []
    for suite in report["suites"] if len(labels) > 1 else []:
        means = _means(suite, labels)
        if means:
            title = SUITES.get(suite["suite"], (suite["suite"], ""))[0]
            rows.append([title, f"{100 * means[0]:.1f}", f"**{100 * means[-1]:.1f}**", _signed(means[-1] - means[0])])
    return table(("average", "base", "this adapter", "change"), rows, right=(1, 2, 3))


def _means(suite: Mapping[str, Any], labels: Sequence[str]) -> list[float]:
    """The suite's own average, where it has one, else the mean of the tasks that both have scores for."""
    for group in suite.get("groups") or []:
        values = [group["scores"].get(label) for label in (labels[0], labels[-1])]
        if group["group"] in ("average", "overall") and None not in values:
            return values
    pairs = [
        [task["scores"][label]["value"] for label in (labels[0], labels[-1])]
        for task in suite["tasks"]
        if all((task.get("scores") or {}).get(label) for label in (labels[0], labels[-1]))
    ]
    return [sum(column) / len(pairs) for column in zip(*pairs, strict=True)] if pairs else []


def failures(suite: Mapping[str, Any]) -> str:
    """Return the tasks that could not be measured, or not as meant; the reasons stay in the report.

    >>> failures({"tasks": [{"task": "gsm8k", "error": "no network"}, {"task": "ifeval", "note": "2 were cut"}]})
    'Not measured: `gsm8k`. With a note in the report: `ifeval`.'
    """
    found = []
    for key, told in (("error", "Not measured"), ("note", "With a note in the report")):
        tasks = [code(task["task"]) for task in suite["tasks"] if task.get(key)]
        found += [f"{told}: {listed(tasks)}."] if tasks else []
    return " ".join(found)


def _metrics_differ(suite: Mapping[str, Any]) -> bool:
    return len({_metric(suite, task) for task in suite["tasks"] if task.get("scores")}) > 1


def _metric(suite: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    return str(task.get("metric") or suite.get("metric") or "score")


def _score(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ""
    text = f"{100 * score['value']:.1f}"
    return text if score.get("low") is None else f"{text} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"


def _change(task: Mapping[str, Any], labels: Sequence[str]) -> str:
    found = task.get("difference")
    if found is None:
        scores = [task["scores"].get(label) for label in (labels[0], labels[-1])]
        return "" if None in scores else _signed(scores[1]["value"] - scores[0]["value"])
    text = _signed(found["value"])
    if found.get("low") is None:
        return text
    text = f"{text} ({_signed(found['low'])} to {_signed(found['high'])})"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def _signed(value: float) -> str:
    """The difference in percent points, with a real minus; what rounds to nothing has no sign."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text
