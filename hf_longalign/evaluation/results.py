"""From scored answers to the numbers of a report: pure, the same for the same answers."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from hf_longalign.evaluation.intervals import cluster_means, mean_interval, paired_difference
from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.reach import RULER_THRESHOLD, reaches
from hf_longalign.records.report import Difference, Grid, GroupResult, ReachResult, Score, SuiteResult, TaskResult


Scorer = Callable[[Prompt, str], Mapping[str, float]]


def suite_result(
    suite: str,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Completion]],
    scorer: Scorer,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    haystack: str | None = None,
) -> SuiteResult:
    """Return the results of a suite, all scores from 0 to 1.

    Args:
        suite: its name.
        prompts: all prompts.
        answers: by label of the model, one per prompt; differences are those of later models to earlier ones.
        scorer: scores an answer, by metric; the first metric is the one to report.
        groups: tasks by group, for averages over tasks; tasks that were not run are left out of it.
        haystack: what needles lay in, in words.
    """
    tasks = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        chosen = [number for number, prompt in enumerate(prompts) if prompt.task == task]
        own = {label: [texts[number] for number in chosen] for label, texts in answers.items()}
        tasks.append(_task_result([prompts[number] for number in chosen], own, scorer, haystack))
    reach = [
        _reach(prompts, answers, scorer, rule, threshold)
        for rule, threshold in (("85 % of its own short score", None), ("RULER's, 85.6 %", RULER_THRESHOLD))
        if suite == "ruler" or threshold is None
    ]
    means = group_means(tasks, groups or {}) + _part_means(prompts, answers, scorer)
    return SuiteResult(suite, tasks, means, [found for found in reach if found is not None])


def group_means(tasks: Sequence[TaskResult], groups: Mapping[str, Sequence[str]]) -> list[GroupResult]:
    """Return the mean of the tasks of each group, and of all tasks where there are several.

    Example:

    >>> tasks = [TaskResult(name, scores={"base": Score(value)}) for name, value in (("a", 0.2), ("b", 0.6))]
    >>> group_means(tasks, {"letters": ["a", "c"]})
    [GroupResult(group='letters', scores={'base': 0.2}), GroupResult(group='average', scores={'base': 0.4})]
    """
    done = {task.task: task.scores for task in tasks if task.scores}
    wanted = {name: [task for task in members if task in done] for name, members in groups.items()}
    if len(done) > 1:
        wanted["average"] = list(done)
    means = []
    for name, members in wanted.items():
        # A model that lacks a task has no mean: one of other tasks would not compare.
        labels = (
            [label for label in done[members[0]] if all(label in done[task] for task in members)] if members else []
        )
        if labels:
            scores = {label: float(np.mean([done[task][label].value for task in members])) for label in labels}
            means.append(GroupResult(name, scores))
    return means


def _part_means(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Completion]], scorer: Scorer
) -> list[GroupResult]:
    """The means of the parts that tasks have in common, such as LongBench-E's ranges of lengths: over the tasks."""
    found = []
    for part in sorted({part for prompt in prompts for part in prompt.parts}):
        tasks = {prompt.task for prompt in prompts if part in prompt.parts}
        scores = {}
        for label, texts in answers.items():
            values: dict[str, list[float]] = {task: [] for task in tasks}
            for prompt, answer in zip(prompts, texts, strict=True):
                if part in prompt.parts:
                    values[prompt.task].append(next(iter(scorer(prompt, answer.text).values())))
            scores[label] = float(np.mean([np.mean(own) for own in values.values()]))
        found.append(GroupResult(part, scores))
    return found


def _task_result(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Completion]], scorer: Scorer, haystack: str | None
) -> TaskResult:
    scored = {
        label: [scorer(prompt, answer.text) for prompt, answer in zip(prompts, texts, strict=True)]
        for label, texts in answers.items()
    }
    first, *others = next(iter(scored.values()))[0]
    values = {label: np.array([score[first] for score in scores], dtype=float) for label, scores in scored.items()}
    samples = [prompt.sample for prompt in prompts]
    means = {label: cluster_means(array, samples) for label, array in values.items()}
    cut = {label: sum(answer.cut for answer in texts) for label, texts in answers.items()}
    lengths = {prompt.length for prompt in prompts}
    grid = _grid(prompts, values)
    return TaskResult(
        task=prompts[0].task,
        metric=first,
        samples=len(set(samples)),
        scores={label: with_interval(array) for label, array in means.items()},
        others={
            name: {label: float(np.mean([score[name] for score in scores])) for label, scores in scored.items()}
            for name in others
        },
        differences=[
            Difference(label, reference, *paired_difference(means[reference], means[label]))
            for reference, label in combinations(means, 2)
        ],
        grid=grid,
        length=next(iter(lengths)) if len(lengths) == 1 and grid is None else None,
        haystack=haystack if grid is not None else None,
        cut_answers={label: number for label, number in cut.items() if number},
        cut_prompts=sum(prompt.shortened for prompt in prompts),
    )


def with_interval(means: np.ndarray) -> Score:
    """Return the mean over samples with its 95 % interval."""
    return Score(float(means.mean()), *mean_interval(means))


def _grid(prompts: Sequence[Prompt], values: Mapping[str, np.ndarray]) -> Grid | None:
    """Means by depth and length, and by length alone with intervals; `None` where prompts have no length.

    Prompts without a depth have one row, called 0.5: where the evidence is spread over the text.
    """
    if any(prompt.length is None for prompt in prompts):
        return None
    lengths = sorted({prompt.length for prompt in prompts if prompt.length is not None})
    placed = [0.5 if prompt.depth is None else prompt.depth for prompt in prompts]
    depths = sorted(set(placed))
    if len(lengths) == 1 and len(depths) == 1:
        return None
    rows = np.array([depths.index(depth) for depth in placed])
    columns = np.array([lengths.index(prompt.length) for prompt in prompts])  # type: ignore[arg-type]
    cells: dict[str, list[list[float]]] = {}
    by_length: dict[str, list[Score]] = {}
    for label, array in values.items():
        cells[label] = [
            [float(array[(rows == row) & (columns == column)].mean()) for column in range(len(lengths))]
            for row in range(len(depths))
        ]
        by_length[label] = [
            with_interval(
                cluster_means(array[columns == column], [p.index for p in prompts if p.length == lengths[column]])
            )
            for column in range(len(lengths))
        ]
    return Grid(lengths, depths, cells, by_length)


def _reach(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Completion]],
    scorer: Scorer,
    rule: str,
    threshold: float | None,
) -> ReachResult | None:
    """The effective length over all tasks of a suite; `None` where prompts have fewer than two lengths."""
    lengths = sorted({prompt.length for prompt in prompts if prompt.length is not None})
    if len(lengths) < 2 or any(prompt.length is None for prompt in prompts):
        return None
    by_length: dict[str, dict[int, np.ndarray]] = {}
    for label, texts in answers.items():
        values = [
            next(iter(scorer(prompt, answer.text).values())) for prompt, answer in zip(prompts, texts, strict=True)
        ]
        by_length[label] = {}
        for length in lengths:
            chosen = [number for number, prompt in enumerate(prompts) if prompt.length == length]
            samples = [prompts[number].sample for number in chosen]
            by_length[label][length] = cluster_means([values[number] for number in chosen], samples)
    found = reaches(by_length, threshold=threshold)
    return ReachResult(rule, found)
