"""Training rows made of puzzles: verifiable long-context data without an LLM, in words no evaluation uses."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hf_longalign.puzzles.puzzle import lengthen
from hf_longalign.puzzles.tasks import TASKS, draw_puzzle


def training_rows(
    tasks: Sequence[str] = tuple(TASKS),
    *,
    number: int,
    length: int,
    count: Callable[[str], int],
    filler: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return rows in TRL's chat format with the `parts` at which positions may be skipped.

    Their names, goods, topics and facts are those of the part "training", which evaluation shares none with.

    Args:
        tasks: names of `TASKS`, in turn.
        number: of rows.
        length: tokens of a question at most.
        count: tokens of a text.
        filler: sentences between the lines of a puzzle; without any, lines that look alike.
        seed: of all that is drawn.

    Raises:
        ValueError: an unknown task, or a length without room for it.

    Example:

    >>> row = training_rows(["latest"], number=1, length=120, count=lambda text: len(text.split()))[0]
    >>> [message["role"] for message in row["messages"]], sorted(row["parts"][0])
    (['user', 'assistant'], ['end', 'message', 'start'])
    """
    return list(_rows(tasks, number, length, count, filler, seed))


def _rows(
    tasks: Sequence[str], number: int, length: int, count: Callable[[str], int], filler: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    for index in range(number):
        task = tasks[index % len(tasks)]
        rng = np.random.Generator(np.random.PCG64([seed, index]))
        yield lengthen(draw_puzzle(task, seed, index, "training"), length, count, filler, rng).row()
