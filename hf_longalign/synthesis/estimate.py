"""What a run will ask and cost, without asking: requests, tokens, dollars, and the prompts themselves."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil

from hf_longalign.synthesis.budget import Budget, Spend
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.prompts import (
    Facts,
    Messages,
    Outline,
    answer_prompt,
    context_prompt,
    facts_prompt,
    outline_prompt,
    pair_prompt,
    section_prompt,
)
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.synthesis.writer import Plan


# English under the tokenizers in use; only for text that is not written yet.
_TOKENS_PER_WORD = 4 / 3
_FACT_WORDS, _OUTLINE_WORDS, _PAIR_WORDS, _SPOKEN_WORDS = 150, 40, 40, 30


@dataclass(frozen=True)
class Planned:
    """One request that will be made: what for, its prompt, words of it that are not known yet, words of its reply."""

    purpose: str
    messages: Messages
    reply_words: int
    unknown_words: int = 0


@dataclass
class Estimate:
    """What a run will ask if no reply has to be asked for twice.

    Attributes:
        requests: number of requests by purpose.
        prompt_tokens: tokens of the prompts.
        completion_tokens: tokens of the replies, if they are as long as asked for.
        spend: tokens and dollars of both.
        most: the same if every reply runs to its limit and every retry is used.
    """

    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spend: Spend = field(default_factory=Spend)
    most: Spend = field(default_factory=Spend)


def estimate(
    seeds: Sequence[Seed],
    plan: Plan,
    options: SynthesisOptions,
    *,
    writes: bool,
    budget: Budget | None = None,
    count: Callable[[str], int] | None = None,
) -> Estimate:
    """Estimate what a run over `seeds` costs.

    Args:
        seeds: the pairs, or the chunks of instruction synthesis.
        plan: how contexts are written.
        options: difficulty and answerability ask too.
        writes: whether a model writes anything; `False` where contexts are given.
        budget: the prices; without it dollars are 0.
        count: tokens of a text; by default a quarter of its bytes.
    """
    count = count or (lambda text: ceil(len(text.encode()) / 4))
    prices, found, most = budget or Budget(), Estimate(), Spend()
    kept = options.difficulty_share if options.difficulty_use != "record" else 1.0
    prompt_tokens = completion_tokens = 0.0
    for seed in seeds:
        for planned in planned_requests(seed, plan, options, writes=writes):
            share = 1.0 if planned.purpose == "closed_book" else kept
            found.requests[planned.purpose] += 1
            prompt = sum(count(text) for _, text in planned.messages) + planned.unknown_words * _TOKENS_PER_WORD
            prompt_tokens += share * prompt
            completion_tokens += share * min(planned.reply_words * _TOKENS_PER_WORD, plan.sampling.max_tokens)
            most += prices.cost(ceil(prompt), plan.sampling.max_tokens)
    for purpose in found.requests:
        if purpose != "closed_book":
            found.requests[purpose] = ceil(kept * found.requests[purpose])
    found.prompt_tokens, found.completion_tokens = ceil(prompt_tokens), ceil(completion_tokens)
    found.spend = prices.cost(found.prompt_tokens, found.completion_tokens)
    found.most = Spend(most.tokens * (1 + plan.retries), most.usd * (1 + plan.retries))
    return found


def planned_requests(seed: Seed, plan: Plan, options: SynthesisOptions, *, writes: bool) -> Iterator[Planned]:
    """Yield the requests a seed needs if every reply is good at once. A judge's are not known before the replies."""
    task = find_task(seed.task)
    if options.difficulty == "closed_book":
        for _ in range(options.difficulty_samples):
            yield Planned("closed_book", answer_prompt(seed, task), _SPOKEN_WORDS)
    if options.method == "instruction":
        yield Planned("pair", pair_prompt(seed.context or ""), _PAIR_WORDS)
    elif writes:
        yield from _writing(seed, plan)
    if options.answerability:
        words = plan.words if seed.context is None else 0
        yield Planned("open_book", answer_prompt(seed, task, seed.context or ""), _SPOKEN_WORDS, words)
        if options.difficulty != "closed_book":
            yield Planned("closed_book", answer_prompt(seed, task), _SPOKEN_WORDS)


def _writing(seed: Seed, plan: Plan) -> Iterator[Planned]:
    task, facts, unknown = find_task(seed.task), None, 0
    if plan.facts_first:
        yield Planned("facts", facts_prompt(seed, task), _FACT_WORDS)
        facts, unknown = Facts("", ("…",), ("…",)), _FACT_WORDS
    if plan.sections == 1:
        prompt = context_prompt(seed, task, plan.words, facts=facts, template=plan.template)
        yield Planned("context", prompt, plan.words, unknown)
        return
    sections = plan.sections
    outline = Outline("", ("…",) * sections)
    yield Planned(
        "outline", outline_prompt(seed, task, plan.words, sections, facts=facts), _OUTLINE_WORDS * sections, unknown
    )
    for number in range(1, sections + 1):
        words = ceil(plan.words / sections)
        shown = _OUTLINE_WORDS * sections + (200 if number > 1 else 0)
        yield Planned("section", section_prompt(seed, task, words, outline, number, ""), words, shown)
