"""What can be known to fail before anything is paid for: too few seeds, and a budget below one sample."""

from collections import Counter
from collections.abc import Mapping, Sequence

from hf_longalign.synthesis.chat import to_messages
from hf_longalign.synthesis.config import PUBLISHED_DISTRACTORS, SynthesisOptions
from hf_longalign.synthesis.rows import BadRowError, Row
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import find_task, prompt_parts
from hf_longalign.synthesis.tokens import TokenCounter


def distractor_limit(options: SynthesisOptions) -> int | None:
    """Return how many distractors a row gets at most; `None` for as many as the budget holds."""
    if options.n_distractors is None and options.target_tokens is None:
        return PUBLISHED_DISTRACTORS
    return options.n_distractors


def available_distractors(tasks: Mapping[str, int], options: SynthesisOptions, documents: int) -> dict[str, int]:
    """Return how many distractors a row of each task can have, given the number of contexts per task."""
    total = sum(tasks.values())
    found = {}
    for task, count in sorted(tasks.items()):
        by_source = {"same_task": count - 1, "other_tasks": total - count, "documents": documents}
        found[task] = sum(by_source[source] for source in options.distractor_sources)
    return found


def check_distractors(seeds: Sequence[Seed], options: SynthesisOptions, documents: int) -> None:
    """Refuse more distractors than there can be.

    Args:
        seeds: the seeds that will get a context.
        options: the number of distractors and their sources.
        documents: how many documents there are.

    Raises:
        ValueError: names the task, its seeds and the remedies.
    """
    limit = distractor_limit(options)
    if limit is None:
        return
    share = options.difficulty_share if options.difficulty_use != "record" else 1.0
    tasks = {task: round(share * count) for task, count in Counter(seed.task for seed in seeds).items()}
    for task, available in available_distractors(tasks, options, documents).items():
        if available < limit:
            sources = ", ".join(options.distractor_sources)
            raise ValueError(
                f"`n_distractors` must be at most {available}, got {limit}: task {task!r} has {tasks[task]} seeds, "
                f"and distractors come from {sources}. Lower it, give more seeds, or add to `distractor_sources`."
            )


def check_budget(seeds: Sequence[Seed], options: SynthesisOptions, counter: TokenCounter | None) -> None:
    """Refuse a token budget that no sample fits into.

    Raises:
        ValueError: the shortest possible sample has more tokens than `target_tokens`, or nothing counts them.
    """
    if options.target_tokens is None:
        return
    if counter is None:
        raise ValueError("`tokenizer` must be given with `target_tokens`, got None. Name the one you train with.")
    counted = []
    for seed in seeds:
        head, tail = prompt_parts(find_task(seed.task), seed.instruction)
        # Its own context where it is given; else the fewest words that a written one may have.
        context = seed.context if seed.context is not None else "a " * options.min_words
        counted.append(counter.count_chat(to_messages(f"{head}{context}\n\n{tail}", seed.answer)))
        if counted[-1] <= options.target_tokens:
            return  # one fits: to count all of them takes minutes
    raise ValueError(
        f"`target_tokens` must be at least {min(counted)}, the tokens of the shortest sample with nothing but its own "
        f"context, got {options.target_tokens}. Raise it, or ask for fewer `context_words`."
    )


def check_contexts(seeds: Sequence[Seed]) -> None:
    """Refuse seeds without a context where no model writes one.

    Raises:
        BadRowError: names file, line and column.
    """
    for seed in seeds:
        if seed.context is None:
            file, _, number = seed.origin.rpartition(":")
            remedy = 'Give a column `context` or `contexts`, or a generator other than "documents" to write it.'
            raise BadRowError(Row({}, file, int(number)), "missing", remedy, "context")
