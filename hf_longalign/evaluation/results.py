"""From scored answers to the numbers of a report: pure, the same for the same answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_longalign.evaluation.intervals import mean_interval, paired_difference
from hf_longalign.evaluation.prompt import Prompt


Scorer = Callable[[Prompt, str], Mapping[str, float]]


def suite_results(
    suite: str,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[str]],
    scorer: Scorer,
    *,
    metric: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Return the results of a suite, JSON-able, all scores from 0 to 1.

    Args:
        suite: its name.
        prompts: all prompts.
        answers: by label of the model, one text per prompt.
        scorer: scores an answer; by metric.
        metric: the metric to report first; the only one of each task when `None`.
        groups: tasks by group, for averages over tasks; tasks that were not run are left out of it.

    Returns:
        `suite`, `metric` (`None`: each task its own), `groups` and `tasks`; of each task `task`, `metric`, `samples`,
        `scores` by label (`value` and the 95 % interval `low`, `high`), `others` (further metrics by label),
        `difference` of the second model to the first on the same prompts, and where prompts have length and depth a
        `grid`.
    """
    tasks = [
        _task_results(task, [(p, i) for i, p in enumerate(prompts) if p.task == task], answers, scorer, metric)
        for task in dict.fromkeys(prompt.task for prompt in prompts)
    ]
    return {"suite": suite, "metric": metric, "tasks": tasks, "groups": group_means(tasks, groups or {})}


def group_means(tasks: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return the mean of the tasks of each group, and of all tasks where there are several.

    Example:

    >>> tasks = [{"task": name, "scores": {"base": {"value": value}}} for name, value in (("a", 0.2), ("b", 0.6))]
    >>> group_means(tasks, {"letters": ["a", "c"]})
    [{'group': 'letters', 'scores': {'base': 0.2}}, {'group': 'average', 'scores': {'base': 0.4}}]
    """
    done = {task["task"]: task["scores"] for task in tasks if task.get("scores")}
    wanted = {name: [task for task in members if task in done] for name, members in groups.items()}
    if len(done) > 1:
        wanted["average"] = list(done)
    means = []
    for name, members in wanted.items():
        if members:
            labels = done[members[0]]
            scores = {label: float(np.mean([done[task][label]["value"] for task in members])) for label in labels}
            means.append({"group": name, "scores": scores})
    return means


def _task_results(
    task: str,
    numbered: Sequence[tuple[Prompt, int]],
    answers: Mapping[str, Sequence[str]],
    scorer: Scorer,
    metric: str | None,
) -> dict[str, Any]:
    scored = {label: [scorer(prompt, texts[i]) for prompt, i in numbered] for label, texts in answers.items()}
    names = list(next(iter(scored.values()))[0])
    first = metric or names[0]
    values = {label: np.array([score[first] for score in scores], dtype=float) for label, scores in scored.items()}
    result: dict[str, Any] = {
        "task": task,
        "metric": first,
        "samples": len(numbered),
        "scores": {label: with_interval(array) for label, array in values.items()},
        "others": {
            name: {label: float(np.mean([score[name] for score in scores])) for label, scores in scored.items()}
            for name in names
            if name != first
        },
    }
    if len(values) > 1:
        one, other = list(values.values())[:2]
        result["difference"] = dict(zip(("value", "low", "high"), paired_difference(one, other), strict=True))
    grid = _grid([prompt for prompt, _ in numbered], values)
    return {**result, "grid": grid} if grid else result


def with_interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean of scores from 0 to 1 and its 95 % interval as `value`, `low`, `high`."""
    low, high = mean_interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}


def _grid(prompts: Sequence[Prompt], values: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Means by depth and length, and by length alone with intervals; `None` where prompts have neither."""
    if any(prompt.length is None or prompt.depth is None for prompt in prompts):
        return None
    lengths, depths = sorted({p.length for p in prompts}), sorted({p.depth for p in prompts})  # type: ignore[type-var]
    rows = np.array([depths.index(prompt.depth) for prompt in prompts])
    columns = np.array([lengths.index(prompt.length) for prompt in prompts])
    grid: dict[str, Any] = {"lengths": lengths, "depths": depths, "by_length": {}}
    for label, array in values.items():
        cells = [
            [array[(rows == row) & (columns == column)].mean() for column in range(len(lengths))]
            for row in range(len(depths))
        ]
        grid[label] = np.array(cells).tolist()
        grid["by_length"][label] = [with_interval(array[columns == column]) for column in range(len(lengths))]
    return grid
