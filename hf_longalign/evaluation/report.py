"""The report of an evaluation as Markdown: pure text from the numbers of `report.json`."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hf_longalign.cards.markdown import table


TITLES = {
    "needle": "Needle in a haystack",
    "longbench": "LongBench",
    "ruler": "RULER",
    "short": "Short contexts",
}
IMAGES = {
    "needle_accuracy": "Accuracy by context length, with 95 % intervals",
    "needle_heatmap": "Accuracy by depth and length, mean of all tasks",
    "perplexity": "Perplexity by position",
    "coverage": "Relative distances covered in training, against the lengths evaluated",
}


def render_report(report: Mapping[str, Any]) -> str:
    """Return `report.md` for a report; what was not measured is left out.

    Args:
        report: `models` (`label`, `name`, `revision`), `suites` (see [`suite_results`]), `settings`, `prompts` (the
            fingerprint of all that was asked), and optionally `perplexity`, `speed`, `images`.

    Example:

    >>> task = {"task": "single", "metric": "exact_match", "samples": 4, "scores": {"base": {"value": 0.5, "low": 0.15,
    ...         "high": 0.85}}}
    >>> suite = {"suite": "needle", "metric": "exact_match", "tasks": [task], "groups": []}
    >>> models = [{"label": "base", "name": "org/model", "revision": None}]
    >>> text = render_report({"models": models, "suites": [suite], "settings": {"seed": 0}, "prompts": "ab"})
    >>> "| single | exact_match | 4 | 50.0 (15.0–85.0) |" in text
    True
    """
    labels = [model["label"] for model in report["models"]]
    parts = [f"# Evaluation of {report['models'][-1]['name']}", _models(report["models"])]
    for suite in report["suites"]:
        parts += [f"## {TITLES.get(suite['suite'], suite['suite'])}", *_suite(suite, labels)]
        parts += _pictures(report, ("needle_accuracy", "needle_heatmap") if suite["suite"] == "needle" else ())
        parts += _task_pictures(report, suite)
    if report.get("perplexity"):
        parts += ["## Perplexity by position", _perplexity(report["perplexity"], labels)]
    parts += _pictures(report, ("perplexity",))
    parts += _pictures(report, ("coverage",), title="## Positions covered in training")
    if report.get("speed"):
        parts += ["## Speed", _speed(report["speed"])]
    parts += ["## Settings", table(("setting", "value"), list(report["settings"].items())), _comparable(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _models(models: Sequence[Mapping[str, Any]]) -> str:
    return table(("", "model", "revision"), [(m["label"], f"`{m['name']}`", m.get("revision") or "") for m in models])


def _suite(suite: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    tasks = [task for task in suite["tasks"] if task.get("scores")]
    compares = len(labels) > 1
    head = ["task", "metric", "samples", *labels, *(["difference"] if compares else [])]
    rows = []
    for task in tasks:
        scores = [_score(task["scores"].get(label)) for label in labels]
        rows.append(
            [task["task"], task["metric"], task["samples"], *scores, *([_difference(task)] if compares else [])]
        )
        for metric, values in task.get("others", {}).items():
            means = [values.get(label) for label in labels]
            rows.append([task["task"], metric, task["samples"], *_means(means, compares)])
    for group in suite["groups"]:
        means = [group["scores"].get(label) for label in labels]
        rows.append([f"**{group['group']}**", "", "", *_means(means, compares, mark="**")])
    parts = [table(head, rows)] if rows else []
    parts += [_by_length(task, labels) for task in tasks if task.get("grid")]
    for title, key in (("Not run:", "error"), ("Notes:", "note")):
        told = [f"- {task['task']}: {task[key]}" for task in suite["tasks"] if task.get(key)]
        parts += [f"{title}\n\n" + "\n".join(told)] if told else []
    return parts


def _means(values: Sequence[float | None], compares: bool, mark: str = "") -> list[str]:
    shown = ["" if value is None else f"{mark}{100 * value:.1f}{mark}" for value in values]
    change = "" if not compares or values[0] is None or values[1] is None else _signed(values[1] - values[0])
    return [*shown, change] if compares else shown


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text[1:] == "0.0" else text


def _score(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ""
    if score.get("low") is None:
        return f"{100 * score['value']:.1f}"
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"


def _difference(task: Mapping[str, Any]) -> str:
    change = task.get("difference")
    if change is None:
        return ""
    if change.get("low") is None:
        return _signed(change["value"])
    sure = change["low"] > 0 or change["high"] < 0
    text = f"{_signed(change['value'])} ({_signed(change['low'])} to {_signed(change['high'])})"
    return f"**{text}**" if sure else text


def _by_length(task: Mapping[str, Any], labels: Sequence[str]) -> str:
    grid = task["grid"]
    rows = [(label, *(f"{100 * cell['value']:.1f}" for cell in grid["by_length"][label])) for label in labels]
    return table((f"{task['task']}, by length", *(f"{length:,}" for length in grid["lengths"])), rows)


def _perplexity(perplexity: Mapping[str, Any], labels: Sequence[str]) -> str:
    edges = perplexity["edges"]
    head = ("position", *(f"{low:,}–{high - 1:,}" for low, high in pairwise(edges)))
    rows = [
        (label, *("" if value is None else f"{value:.2f}" for value in perplexity["perplexity"][label]))
        for label in labels
    ]
    note = f"{perplexity['documents']:,} documents, windows of {perplexity['window']:,} tokens."
    return f"{note}\n\n{table(head, rows)}"


def _speed(speed: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            label,
            *(f"{counts[name]:,.0f}" for name in ("prompt_tokens", "cached_tokens", "generated_tokens")),
            f"{counts['seconds']:,.1f}",
            f"{counts['prompt_tokens'] / max(counts['seconds'], 1e-9):,.0f}",
        )
        for label, counts in speed.items()
    ]
    head = ("", "prompt tokens", "of them from the cache", "generated", "seconds", "prompt tokens/s")
    note = "Needle and LongBench, all runs and processes: seconds are summed over processes, tokens/s are of one."
    return f"{note}\n\n{table(head, rows)}"


def _pictures(report: Mapping[str, Any], stems: Sequence[str], title: str | None = None) -> list[str]:
    shown = [
        f"![{IMAGES.get(stem, stem)}]({name})"
        for stem in stems
        for name in report.get("images", [])
        if name == f"{stem}.png"
    ]
    return [title, *shown] if title and shown else shown


def _task_pictures(report: Mapping[str, Any], suite: Mapping[str, Any]) -> list[str]:
    """The heatmap of each task, folded away."""
    shown = _pictures(report, [f"{suite['suite']}_{task['task']}" for task in suite["tasks"]])
    return ["<details><summary>Each task by depth and length</summary>", *shown, "</details>"] if shown else []


def _comparable(report: Mapping[str, Any]) -> str:
    return (
        "Scores are percentages with 95 % intervals; a difference in bold is larger than chance at that level. "
        f"Reports compare where the fingerprint of all that was asked is the same: `{report['prompts']}`."
    )
