"""Averages of LongBench scores: by group of tasks, and by length for LongBench-E."""

from collections.abc import Mapping, Sequence

from hf_longalign.evaluation.longbench.tasks import GROUPS


def average_by_group(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean score of each group of tasks that has scores, the groups in LongBench's order.

    LongBench publishes English and Chinese apart, and the mean of the groups' means as a model's average; Context
    Synthesis publishes the plain mean of its eight tasks. To be comparable, give the tasks of one kind.

    Args:
        scores: score of each task by name; LongBench-E variants count for their task's group.

    Example:

    >>> average_by_group({"hotpotqa": 0.5, "musique": 0.25, "lcc_e": 0.75})
    {'multi-document QA': 0.375, 'code completion': 0.75}
    """
    means = {}
    for group, tasks in GROUPS.items():
        found = [score for task, score in scores.items() if task.removesuffix("_e") in tasks]
        if found:
            means[group] = sum(found) / len(found)
    return means


def average_by_length(scores: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """Return the mean score of a task's rows in each of LongBench-E's ranges of length that has rows.

    Args:
        scores: one per row.
        lengths: the rows' `length` column: words, or characters for Chinese.

    Example:

    >>> average_by_length([1.0, 0.0, 0.5], [3999, 4000, 7999])
    {'0-4k': 1.0, '4-8k': 0.25}
    """
    ranges: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
    for score, length in zip(scores, lengths, strict=True):
        ranges["0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"].append(score)
    return {name: sum(found) / len(found) for name, found in ranges.items() if found}
