"""From scored answers to the numbers of a report: pure, the same for the same answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from hf_longalign.evaluation.intervals import RULER_THRESHOLD, cluster_means, paired_difference, reaches, with_interval
from hf_longalign.evaluation.prompt import CLOSED_BOOK, EVIDENCE, Completion, Prompt
from hf_longalign.records.report import Diagnosis, Difference, Grid, GroupResult, ReachResult, SuiteResult, TaskResult


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

    `answers` are those to all prompts by label of the model; differences are those of later models to earlier ones.
    The first metric of the scorer is reported; `groups` are tasks by group, for averages over those that were run.
    """
    # Each answer is scored once: ROUGE-L of a long summary takes as long as many tokens.
    scores = {
        label: [scorer(prompt, answer.text) for prompt, answer in zip(prompts, texts, strict=True)]
        for label, texts in answers.items()
    }
    # The other ways to ask only tell why: as results they would be rows of every table.
    reasons = {label: diagnoses(prompts, own) for label, own in scores.items()}
    full = [number for number, prompt in enumerate(prompts) if not prompt.task.endswith((EVIDENCE, CLOSED_BOOK))]
    prompts = [prompts[number] for number in full]
    answers = {label: [texts[number] for number in full] for label, texts in answers.items()}
    scores = {label: [own[number] for number in full] for label, own in scores.items()}
    tasks = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        chosen = [number for number, prompt in enumerate(prompts) if prompt.task == task]
        own = {label: [found[number] for number in chosen] for label, found in scores.items()}
        cut = {label: sum(texts[number].cut for number in chosen) for label, texts in answers.items()}
        result = _task_result([prompts[number] for number in chosen], own, cut, haystack)
        why = {label: by_task[task] for label, by_task in reasons.items() if task in by_task}
        tasks.append(replace(result, diagnosis=why))
    means = group_means(tasks, groups or {})
    # The mean over tasks of what tasks have in common, such as LongBench-E's ranges of lengths.
    for part in sorted({part for task in tasks for part in task.parts}):
        own_means = [task.parts[part] for task in tasks if part in task.parts]
        means.append(GroupResult(part, {label: float(np.mean([m[label] for m in own_means])) for label in answers}))
    return SuiteResult(suite, tasks, means, _reaches(suite, prompts, scores))


def diagnoses(prompts: Sequence[Prompt], scores: Sequence[Mapping[str, float]]) -> dict[str, Diagnosis]:
    """Return by task why answers at its longest length are wrong, where they were asked in other ways too.

    Example: found in neither way, then found in the evidence alone.

    >>> ways = (("latest", 4096), ("latest, evidence alone", None), ("latest, closed book", None))
    >>> prompts = [Prompt("puzzles", way, i, "", ("ABCDE",), 8, length=n) for i in (0, 1) for way, n in ways]
    >>> diagnoses(prompts, [{"exact_match": score} for score in (0, 0, 0, 0, 1, 0)])["latest"]
    Diagnosis(right=0.0, cannot_find=0.5, cannot_use=0.5, closed_book=0.0)
    """
    # Right means whole: the reasons must add up.
    right = [next(iter(score.values())) == 1 for score in scores]
    ways = {(p.task, p.index): ok for p, ok in zip(prompts, right, strict=True) if p.length is None}
    longest: dict[str, int] = {}
    for prompt in prompts:
        longest[prompt.task] = max(prompt.length or 0, longest.get(prompt.task, 0))
    found = {}
    for task, length in longest.items():
        told = [
            (ok, ways[task + EVIDENCE, prompt.index], ways[task + CLOSED_BOOK, prompt.index])
            for prompt, ok in zip(prompts, right, strict=True)
            if (prompt.task, prompt.length) == (task, length) and (task + EVIDENCE, prompt.index) in ways
        ]
        if told:
            full, evidence, closed = np.array(told).T
            shares = (full, ~full & evidence, ~full & ~evidence, closed)
            found[task] = Diagnosis(*(float(share.mean()) for share in shares))
    return found


def group_means(tasks: Sequence[TaskResult], groups: Mapping[str, Sequence[str]]) -> list[GroupResult]:
    """Return the mean of the tasks of each group, and of all tasks where there are several.

    >>> from hf_longalign.records.report import Score
    >>> tasks = [TaskResult(name, scores={"base": Score(value)}) for name, value in (("a", 0.2), ("b", 0.6))]
    >>> group_means(tasks, {"letters": ["a", "c"]})
    [GroupResult(group='letters', scores={'base': 0.2}), GroupResult(group='average', scores={'base': 0.4})]
    """
    done = {task.task: task.scores for task in tasks if task.scores}
    wanted = {name: [done[task] for task in members if task in done] for name, members in groups.items()}
    if len(done) > 1:
        wanted["average"] = list(done.values())
    means = []
    for name, members in wanted.items():
        # A model that lacks a task has no mean: one of other tasks would not compare.
        labels = [label for label in (members or [{}])[0] if all(label in scores for scores in members)]
        if labels:
            means.append(
                GroupResult(name, {label: float(np.mean([s[label].value for s in members])) for label in labels})
            )
    return means


def _task_result(
    prompts: Sequence[Prompt],
    scores: Mapping[str, Sequence[Mapping[str, float]]],
    cut: Mapping[str, int],
    haystack: str | None,
) -> TaskResult:
    # Dicts keep their order: the first metric of a scorer is the one that is reported.
    first, *others = next(iter(scores.values()))[0]

    def mean(label: str, metric: str, part: str | None = None) -> float:
        pairs = zip(prompts, scores[label], strict=True)
        return float(np.mean([score[metric] for prompt, score in pairs if part is None or part in prompt.parts]))

    values = {label: np.array([score[first] for score in own], dtype=float) for label, own in scores.items()}
    samples = [prompt.sample for prompt in prompts]
    means = {label: cluster_means(array, samples) for label, array in values.items()}
    lengths = {prompt.length for prompt in prompts}
    parts = sorted({part for prompt in prompts for part in prompt.parts})
    grid = _grid(prompts, values)
    return TaskResult(
        task=prompts[0].task,
        metric=first,
        samples=len(set(samples)),
        scores={label: with_interval(array) for label, array in means.items()},
        others={name: {label: mean(label, name) for label in scores} for name in others},
        parts={part: {label: mean(label, first, part) for label in scores} for part in parts},
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


def _grid(prompts: Sequence[Prompt], values: Mapping[str, np.ndarray]) -> Grid | None:
    """Means by depth and length, and by length alone with intervals; `None` where there is but one of both."""
    if any(prompt.length is None for prompt in prompts):
        return None
    lengths = sorted({prompt.length for prompt in prompts if prompt.length is not None})
    # Prompts without a depth have one row, called 0.5: their evidence is spread over the text.
    placed = [0.5 if prompt.depth is None else prompt.depth for prompt in prompts]
    depths = sorted(set(placed))
    if len(lengths) == 1 and len(depths) == 1:
        return None
    rows = np.array([depths.index(depth) for depth in placed])
    columns = np.array([lengths.index(prompt.length or 0) for prompt in prompts])
    cells: dict[str, list[list[float]]] = {}
    by_length = {}
    for label, array in values.items():
        cells[label] = [
            [float(array[(rows == row) & (columns == column)].mean()) for column in range(len(lengths))]
            for row in range(len(depths))
        ]
        by_length[label] = [
            with_interval(cluster_means(array[columns == column], [p.index for p in prompts if p.length == length]))
            for column, length in enumerate(lengths)
        ]
    return Grid(lengths, depths, cells, by_length)


def _reaches(
    suite: str, prompts: Sequence[Prompt], scores: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[ReachResult]:
    """The effective lengths over all tasks of a suite; none where prompts have fewer than two lengths."""
    lengths = sorted({prompt.length for prompt in prompts if prompt.length is not None})
    if len(lengths) < 2 or any(prompt.length is None for prompt in prompts):
        return []
    by_length: dict[str, dict[int, np.ndarray]] = {label: {} for label in scores}
    # Over all tasks: a task alone has too few samples at one length to tell where it gives way.
    for length in lengths:
        chosen = [number for number, prompt in enumerate(prompts) if prompt.length == length]
        samples = [prompts[number].sample for number in chosen]
        for label, own in scores.items():
            values = [next(iter(own[number].values())) for number in chosen]
            by_length[label][length] = cluster_means(values, samples)
    rules: dict[str, float | None] = {"85 % of its own short score": None}
    if suite == "ruler":
        rules["RULER's, 85.6 %"] = RULER_THRESHOLD
    return [reaches(by_length, rule=rule, threshold=threshold) for rule, threshold in rules.items()]
