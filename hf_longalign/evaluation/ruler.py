"""What RULER in lm-eval needs to ask every model the same, and to come to an end."""

import random
import sys
from collections.abc import Callable, Iterator

import numpy as np


class SeededLengths(list[int]):
    """Lengths of RULER's samples that set the seeds when lm-eval reads them, right before it makes the samples.

    lm-eval seeds before it loads a task, and what is imported while loading draws numbers too, once per process; the
    words of `ruler_cwe` come from a generator that it never seeds again. Without this, the model that is asked second
    gets other questions.

    Example:

    >>> lengths = SeededLengths([4096])
    >>> draws = [random.random() for _ in range(2) for length in lengths]
    >>> draws[0] == draws[1]
    True
    """

    def __iter__(self) -> Iterator[int]:
        """Set the seeds."""
        random.seed(0)
        np.random.seed(0)
        words = sys.modules.get("lm_eval.tasks.ruler.cwe_utils")
        if words is not None:
            words.RNG.seed(0)
        return super().__iter__()


def least_length(task: str, length: int, count: Callable[[str], int]) -> int:
    """Return the tokens below which lm-eval makes a task's samples empty or looks for one that fits for ever.

    Of `ruler_vt` and `ruler_fwe` it does the latter, heeding no interrupt; of `ruler_cwe` the lists have no words. The
    other tasks raise an error by themselves, for them this is 0.

    Args:
        task: one of `RULER_TASKS`.
        length: tokens asked for, on which the number of words depends.
        count: tokens of a text.
    """
    if task == "ruler_vt":
        from lm_eval.tasks.ruler import vt_utils

        # Its example must fit into 500 tokens at any length.
        example = count(vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0]) + 30
        text, names = vt_utils.generate_input_output(10, 1, 4)
        return 500 + count(f"{text} {names}") + 30 if example <= 500 else sys.maxsize
    if task == "ruler_cwe":
        from lm_eval.tasks.ruler import cwe_utils

        example, text, words = cwe_utils.generate_input_output(10, length)
        return count(f"{example}\n{text} " + " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))) + 120
    if task == "ruler_fwe":
        from lm_eval.tasks.ruler import fwe_utils

        return count(fwe_utils.TEMPLATE) + 64
    return 0
