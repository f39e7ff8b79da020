"""What is asked: the suites that the options name, with their prompts and how answers are scored."""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from hf_longalign.evaluation import longbench
from hf_longalign.evaluation.harness import HarnessSuite
from hf_longalign.evaluation.haystack import as_many_as_needed, load_texts, sentences_of
from hf_longalign.evaluation.models import Examined, public_name
from hf_longalign.evaluation.needles import needle_prompts, score_needle
from hf_longalign.evaluation.options import SuiteOptions
from hf_longalign.evaluation.perplexity import DOCUMENTS, PerplexitySuite
from hf_longalign.evaluation.plan import plan_grid
from hf_longalign.evaluation.prompt import Prompt, other_ways, token_counter
from hf_longalign.evaluation.ruler import ruler_prompts, score_ruler
from hf_longalign.evaluation.ruler_data import load_questions
from hf_longalign.evaluation.runner import Maker, PromptSuite, ResultStore
from hf_longalign.puzzles import draw_puzzle, set_f1
from hf_longalign.puzzles.puzzle import lengthen, seeded_rng
from hf_longalign.rope import check_range, doubles


logger = logging.getLogger(__name__)

Suite = PromptSuite | HarnessSuite | PerplexitySuite


def make_suites(examined: Examined, options: SuiteOptions, store: ResultStore) -> list[Suite]:
    """Make what was asked for, in the order it was asked for."""
    chat = uses_chat(examined, options)
    lengths = options.lengths or doubles(1024, examined.reach)
    check_range(examined.config, max(lengths), "lengths")  # before any prompt is made, which takes minutes
    grid = plan_grid(examined.model, [one.identity for one in examined.who], options, lengths, store)
    texts = as_many_as_needed(load_texts(options.haystack, options.seed))
    count = token_counter(examined.tokenizer, chat=chat)
    asked = {"count": count, "chat": chat, "diagnose_at": max(grid.lengths) if options.diagnose else None}
    planned = {
        "needle": (options.needle_tasks, score_needle),
        "puzzles": (options.puzzles, score_puzzle),
        "ruler": (options.ruler_tasks, score_ruler),
    }
    suites: list[Suite] = []
    for name in options.suites:
        if name in planned:
            tasks, scorer = planned[name]
            make = make_prompts(name, options, texts, **asked)
            prompts: list[Prompt] = []
            missing: dict[str, str] = {}
            for task in tqdm(tasks, desc=name, disable=not store.is_main):
                made, without_room = make(task, grid.lengths, grid.samples)
                prompts += made
                missing |= without_room
            haystack = public_documents(options.haystack)
            suites.append(PromptSuite(name, prompts, scorer, missing=missing, haystack=haystack, make=make))
        elif name == "longbench":
            suites.append(longbench_suite(examined, options, chat=chat))
        elif name == "perplexity":
            given = "perplexity_documents" if options.perplexity_documents else "haystack"
            documents = load_texts(getattr(options, given), options.seed, given)
            window, limit = options.perplexity_window or max(grid.lengths), options.limit or DOCUMENTS
            suites.append(PerplexitySuite(examined.model, examined.tokenizer, documents, window=window, limit=limit))
        else:
            how: dict[str, Any] = {"max_length": examined.reach, "limit": options.limit, "chat": chat}
            suites.append(HarnessSuite(options.short_tasks, examined, store, **how))
    return suites


def make_prompts(name: str, options: SuiteOptions, texts: Sequence[str], **asked: Any) -> Maker:
    """Return what makes a suite's prompts of a task at some lengths; those of fewer samples are the first of more."""
    questions = load_questions(options.ruler_questions) if name == "ruler" and options.ruler_questions else ()
    filler = sentences_of(texts) if name == "puzzles" else []

    def make(task: str, lengths: Sequence[int], samples: int) -> tuple[list[Prompt], dict[str, str]]:
        grid = {"lengths": lengths, "samples": samples, **asked}
        if name == "ruler":  # it has a seed and room of its own: those of the published data
            return ruler_prompts(tasks=[task], **grid, essays=texts, questions=questions)
        grid |= {"seed": options.seed, "max_new_tokens": options.max_new_tokens}
        if name == "puzzles":
            return puzzle_prompts(task, filler, **grid), {}
        return list(needle_prompts(tasks=[task], **grid, haystack=texts, depths=options.depths)), {}

    return make


def longbench_suite(examined: Examined, options: SuiteOptions, *, chat: bool) -> PromptSuite:
    """Make LongBench's prompts; tasks whose data cannot be had are left out, and told."""
    source = options.longbench_source
    prompts: list[Prompt] = []
    missing: dict[str, str] = {}
    for task in longbench.expand_tasks(options.longbench_tasks):
        try:
            prompts += longbench.longbench_prompts(
                [task],
                tokenizer=examined.tokenizer,
                max_length=examined.reach,
                longbench_length=options.longbench_length,
                source=source,
                limit=options.limit,
                chat=chat,
            )
        # Offline, or a folder with some of the tasks: the others are asked, and the report says what was not.
        except (ConnectionError, FileNotFoundError) as error:
            missing[task] = str(error).replace(source, public_name(source)) if source else str(error)
    for reason in dict.fromkeys(missing.values()):
        logger.warning("Left out: %s: %s", ", ".join(task for task in missing if missing[task] == reason), reason)
    return PromptSuite("longbench", prompts, longbench.score_longbench, longbench.GROUPS, missing)


def uses_chat(examined: Examined, options: SuiteOptions) -> bool:
    """Whether questions go through the chat template."""
    return bool(examined.tokenizer.chat_template) if options.chat is None else options.chat


def public_documents(source: str | None) -> str:
    """Return what a report calls documents."""
    return "built-in sentences" if source is None else public_name(source)


def puzzle_prompts(
    task: str,
    filler: Sequence[str],
    *,
    lengths: Sequence[int],
    samples: int,
    count: Callable[[str], int],
    seed: int,
    chat: bool,
    max_new_tokens: int,
    diagnose_at: int | None,
) -> list[Prompt]:
    """Return the prompts of puzzles of a task among sentences; the other arguments are as for needles.

    Raises:
        ValueError: an unknown task, or a length that has no room for a puzzle.
    """
    room = min(max_new_tokens, 64)  # the answers are a few names
    prompts = []
    for length, index in product(lengths, range(samples)):
        puzzle, rng = draw_puzzle(task, seed, index), seeded_rng("puzzle", seed, task, index)
        prompt = Prompt(
            *("puzzles", task, index, lengthen(puzzle, length - room, count, filler, rng).text, puzzle.answers, room),
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
