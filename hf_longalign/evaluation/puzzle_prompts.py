"""The suite of puzzles: their prompts and their score."""

from collections.abc import Callable, Sequence

from hf_longalign.evaluation.haystack import sentences_of
from hf_longalign.evaluation.needles import seeded_rng
from hf_longalign.evaluation.prompt import Prompt, other_ways
from hf_longalign.puzzles import draw_puzzle, set_f1
from hf_longalign.puzzles.puzzle import lengthen


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
    diagnose_at: int | None = None,
) -> list[Prompt]:
    """Return the prompts of puzzles at lengths; the arguments are as for needles.

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
                prompt = Prompt(
                    "puzzles",
                    task,
                    index,
                    lengthen(puzzle, length - max_new_tokens, count, filler, rng).text,
                    puzzle.answers,
                    max_new_tokens,
                    chat=chat,
                    length=length,
                    prefix="" if chat else "\nAnswer:",
                    stop=() if chat else ("\n",),
                )
                prompts.append(prompt)
                if length == diagnose_at:
                    prompts += other_ways(prompt, puzzle.open_evidence(), puzzle.closed_book())
    return prompts


def score_puzzle(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return how well the names in an answer agree with those expected, and whether they are just those.

    >>> score_puzzle(Prompt("puzzles", "latest", 0, "", ("BRELMOK",), 8), "It is BRELMOK or TARNIKU.")
    {'set_f1': 0.6666666666666666, 'exact_match': 0.0}
    """
    score = set_f1(answer, prompt.answers)
    return {"set_f1": score, "exact_match": float(score == 1)}
