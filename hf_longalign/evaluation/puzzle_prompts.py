"""The suite of puzzles: their prompts, their score, and why an answer is wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hf_longalign.evaluation.haystack import sentences_of
from hf_longalign.evaluation.needles import seeded_rng
from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.results import suite_result
from hf_longalign.evaluation.runner import Examinee, PromptSuite, ResultStore, answers
from hf_longalign.puzzles import draw_puzzle, set_f1
from hf_longalign.puzzles.puzzle import lengthen
from hf_longalign.records.report import Diagnosis, SuiteResult


# The ways in which a puzzle can be asked; all but the first do not depend on the length.
FULL, EVIDENCE, CLOSED_BOOK = "", ", evidence alone", ", closed book"


def puzzle_prompts(
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    count: Callable[[str], int],
    haystack: Sequence[str],
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int = 64,
    diagnose: bool = False,
) -> list[Prompt]:
    """Return the prompts of puzzles at lengths.

    Args:
        tasks: names of `hf_longalign.puzzles.TASKS`.
        lengths: in tokens, template and room for the answer included.
        samples: of each task at each length.
        count: tokens of a text, the chat template included where `chat` is set.
        haystack: texts whose sentences fill the prompts.
        seed: of all that is drawn.
        chat: whether the prompts go through the chat template.
        max_new_tokens: room for the answer.
        diagnose: ask each puzzle over its evidence alone and without any text, too.

    Raises:
        ValueError: an unknown task, or a length that has no room for a puzzle.
    """
    filler = sentences_of(haystack)
    prompts = []
    for task in tasks:
        for length in lengths:
            for index in range(samples):
                puzzle = draw_puzzle(task, seed, index)
                rng = seeded_rng("puzzle", seed, task, index)
                texts = {FULL: lengthen(puzzle, length - max_new_tokens, count, filler, rng).text}
                if diagnose and length == lengths[0]:  # the shorter ways do not depend on the length
                    texts |= {EVIDENCE: puzzle.open_evidence(), CLOSED_BOOK: puzzle.closed_book()}
                prompts += [
                    Prompt(
                        "puzzles",
                        task + way,
                        index,
                        text,
                        puzzle.answers,
                        max_new_tokens,
                        chat=chat,
                        length=None if way else length,
                        prefix="" if chat else "\nAnswer:",
                        stop=() if chat else ("\n",),
                    )
                    for way, text in texts.items()
                ]
    return prompts


def score_puzzle(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return how well the names in an answer agree with those expected, and whether they are just those.

    >>> score_puzzle(Prompt("puzzles", "latest", 0, "", ("BRELMOK",), 8), "It is BRELMOK or TARNIKU.")
    {'set_f1': 0.6666666666666666, 'exact_match': 0.0}
    """
    score = set_f1(answer, prompt.answers)
    return {"set_f1": score, "exact_match": float(score == 1)}


class PuzzleSuite(PromptSuite):
    """Puzzles, with the reason why an answer at the longest length is wrong where they were asked in all ways."""

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> SuiteResult:
        """Return the scores over the long texts, and the diagnosis of each task."""
        found = {examinee.label: answers(examinee, self.prompts, store) for examinee in examinees}
        # The shorter ways to ask are no results of their own: they have no length, and would be rows of every table.
        full = [number for number, prompt in enumerate(self.prompts) if prompt.length is not None]
        over_texts = {label: [texts[number] for number in full] for label, texts in found.items()}
        prompts = [self.prompts[number] for number in full]
        result = suite_result(self.name, prompts, over_texts, self.scorer, haystack=self.haystack)
        reasons = {label: diagnoses(self.prompts, texts) for label, texts in found.items()}
        tasks = [
            replace(task, diagnosis={label: by_task[task.task] for label, by_task in reasons.items() if by_task})
            for task in result.tasks
        ]
        return replace(result, tasks=tasks)


def diagnoses(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Mapping[str, Diagnosis]:
    """Return by task why answers at the longest length are wrong; empty where puzzles were asked in one way alone.

    Example: found in neither way, then found in the evidence alone.

    >>> ways = (("latest", 4096), ("latest, evidence alone", None), ("latest, closed book", None))
    >>> prompts = [Prompt("puzzles", way, i, "", ("ABCDE",), 8, length=n) for i in (0, 1) for way, n in ways]
    >>> texts = ["no", "no", "no", "no", "ABCDE", "no"]
    >>> diagnoses(prompts, [Completion(text, 1) for text in texts])["latest"]
    Diagnosis(right=0.0, cannot_find=0.5, cannot_use=0.5, closed_book=0.0)
    """
    # At the longest length, where most answers are wrong. Right means every name and no other: the reasons must add
    # up.
    longest = max((prompt.length for prompt in prompts if prompt.length is not None), default=None)
    right: dict[str, dict[int, bool]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        if prompt.length in (longest, None):
            right.setdefault(prompt.task, {})[prompt.index] = score_puzzle(prompt, completion.text)["exact_match"] == 1
    found = {}
    for task in right:
        if task + EVIDENCE in right:
            indices = sorted(right[task])
            full, evidence, closed = (
                np.array([right[task + way][index] for index in indices]) for way in (FULL, EVIDENCE, CLOSED_BOOK)
            )
            found[task] = Diagnosis(
                right=float(full.mean()),
                cannot_find=float((~full & evidence).mean()),
                cannot_use=float((~full & ~evidence).mean()),
                closed_book=float(closed.mean()),
            )
    return found
