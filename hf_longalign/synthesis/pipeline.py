"""From seeds to outcomes: choose, write or check contexts, refuse what repeats or is contaminated, measure.

Everything that is paid for happens here, through the journal; all the rest can be repeated for free.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_longalign.endpoint.protocol import Generator, RunStopped, Sampling
from hf_longalign.options import json_object
from hf_longalign.rows import BadRowError, Row
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.checks import PASSED, Check, Rules, majority_language
from hf_longalign.synthesis.compose import to_messages
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.files import Files
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.outcome import Outcome, accepted
from hf_longalign.synthesis.prompts import check_template
from hf_longalign.synthesis.runner import Progress, Runner
from hf_longalign.synthesis.seeds import Seed, SeedSet, draw_chunks, read_seeds
from hf_longalign.synthesis.selection import Contamination, Duplicates, answer_losses, choose_seeds
from hf_longalign.synthesis.tasks import find_task, prompt_parts
from hf_longalign.synthesis.team import Team
from hf_longalign.synthesis.tokens import ControlTokens, TokenCounter
from hf_longalign.synthesis.writer import (
    Ask,
    Count,
    Plan,
    check_given,
    judge_given,
    score_answers,
    write_context,
    write_pair,
)


if TYPE_CHECKING:
    from hf_longalign.synthesis.builder import ContextSynthesisConfig


logger = logging.getLogger(__name__)

_REPEATED = "duplicate: it nearly repeats another context; choose other names, places, figures and events"


@dataclass
class Pipeline:
    """Turns the seeds of a configuration into outcomes on disk, once for all three configurations of a data set.

    Attributes:
        generator: writes, answers and judges; `None` where contexts are given and nothing is asked.
        show_progress: a bar (`True`), nothing (`False`), or a bar on a terminal and log lines elsewhere (`None`).
        team: the processes that ask together; `None` for this one alone.
        shard: index and number of the parts the seeds are split into, to fill several journals that are merged later.
        others: finished journals, from which a reply is taken over before it is asked for.
    """

    config: "ContextSynthesisConfig"
    files: Files
    generator: Generator | None
    journal: Path
    budget: Budget | None = None
    show_progress: bool | None = None
    team: Team | None = None
    shard: tuple[int, int] = (0, 1)
    others: tuple[Path, ...] = ()
    _checked: bool = field(default=False, init=False)
    _done: bool = field(default=False, init=False)

    def run(self) -> bool:
        """Ask for everything, and write the outcomes if they are not on disk; of a shard, only its replies remain.

        Returns whether this process goes on to compose: of a team, one does. Raises what `check` raises, a ValueError
        where no seed was accepted, or `RunStopped`: the budget is spent or the endpoint gone, and a rerun continues.
        """
        if not self._done and self.team is not None:
            self._done = self.team.run(self._lead, self._follow)
        elif not self._done:
            self._lead()
            self._done = True
        return self._done

    def _lead(self) -> None:
        self.check()
        if self.shard != (0, 1):
            self.outcomes()
        # Outcomes are one folder for many compositions: another `target_tokens` finds them here and asks for nothing.
        elif not self.files.has_outcomes():
            self.files.write_outcomes(self.outcomes())

    def _follow(self, part: tuple[tuple[str, Plan], list[Any]]) -> None:
        """Ask for what another process has handed out."""
        (name, plan), items = part
        self.plan = plan  # made from the seeds, which the leader alone has read
        try:
            self._ask_in_turn(name, items)
        except RunStopped as stop:
            # The leader makes up for it, or stops for the same reason and says so.
            logger.info("This process stops asking: %s", stop)

    @cached_property
    def seeds(self) -> SeedSet:
        """The seeds of this shard, or for instruction synthesis the chunks that pairs are written for."""
        config = self.config
        if config.method != "instruction":
            return read_seeds(
                config.seeds,
                contexts=config.contexts,
                on_bad_seed=config.on_bad_seed,
                per_task=config.seeds_per_task,
                control=self.files.control,
                on_control_tokens=config.on_control_tokens,
                part=self.shard,
            )
        found = SeedSet(self.shard)
        for chunk in draw_chunks(self.files.documents, config.chunk_words, config.pairs_per_document, config.seed):
            found.add(chunk)
        return found

    @cached_property
    def plan(self) -> Plan:
        """How contexts are written and what they are held to."""
        config = self.config
        # Of all seeds, not of the shard's: a context must not pass in one shard and fail in the merged run.
        language = config.language or majority_language(self.seeds.sample)
        answering = config.judge_model or config.model
        template = None
        if config.prompt_template is not None:
            path = Path(config.prompt_template)
            template = check_template(path.read_text(encoding="utf-8"), path.name)
        extra, control = json_object("extra_body", config.extra_body), self.files.control or ControlTokens()
        return Plan(
            generator=config.generator,
            model=config.model,
            sampling=Sampling(config.temperature, config.top_p, config.max_tokens, config.sampling_seed, extra),
            rules=Rules(tuple(config.checks), config.min_words, config.max_words, language, control),
            words=config.context_words,
            reply_words=config.reply_words,
            facts_first=config.facts_first,
            template=template,
            retries=config.retries,
            judge=answering if "judge" in config.checks else None,
            answering=answering,
        )

    @cached_property
    def contamination(self) -> Contamination:
        """The n-grams of the evaluation files."""
        return Contamination(self.config.decontaminate_against, self.config.decontaminate_ngram)

    def check(self) -> None:
        """Read and check all that can be checked before a request is sent, once; raises a ValueError."""
        if self._checked:
            return
        config = self.config
        config.check()
        for name, asks in (
            ("method 'instruction'", config.method == "instruction"),
            ("difficulty 'closed_book'", config.difficulty == "closed_book"),
            ("`answerability`", config.answerability),
            ("the check 'judge'", "judge" in config.checks),
        ):
            if asks and self.generator is None:
                raise ValueError(f"`generator` or `judge` must be a model for {name}, got none. Pass a generator.")
        seeds = self.seeds.seeds
        for reason, number in self.seeds.skipped.most_common():
            logger.warning("Skipped %d seeds: %s.", number, reason)
        if self.seeds.neutralised:
            logger.warning("Made words of marks of chat templates in %d seeds.", self.seeds.neutralised)
        for seed in seeds:
            if config.generator == "documents" and seed.context is None:
                # The row itself is gone by now; its place is all that the message needs.
                file, _, line = seed.origin.rpartition(":")
                remedy = 'Give a column `context` or `contexts`, or a generator other than "documents" to write it.'
                raise BadRowError(Row({}, file, int(line)), "missing", remedy, "context")
        if self.shard == (0, 1):
            check_distractors(seeds, config, len(self.files.documents))
        elif config.difficulty_use != "record":
            raise ValueError(
                f"`difficulty_use` must be 'record' with shards, got {config.difficulty_use!r}: a shard cannot "
                "compare its seeds with the others. Choose in a run over all seeds."
            )
        check_budget(seeds, config, self.files.counter)
        _ = self.plan, self.contamination  # they read the template and the evaluation files, and raise
        self._checked = True

    def outcomes(self) -> list[Outcome]:
        """Return one outcome per seed, in the order of the seeds."""
        self.check()
        # What costs nothing comes first, then the short answers, then the long contexts: what is left out early is
        # not paid for later.
        outcomes = [self._decontaminated(Outcome(seed)) for seed in self.seeds.seeds]
        outcomes = self._chosen(outcomes)
        numbers = accepted(outcomes)
        seeds = [outcomes[number].seed for number in numbers]
        if self.config.method == "instruction":
            made = self._ask("write_pair", seeds)
        elif self.config.generator != "documents":
            made = self._ask("write", seeds)
        else:
            made = [check_given(seed, self.plan) for seed in seeds]
            if self.plan.judge is not None:
                made = self._ask("judge", made)
        outcomes = _replaced(outcomes, numbers, made)
        # Only now, and beside all others: a context that was rewritten may repeat another one.
        outcomes = self._without_duplicates(outcomes)
        # Once more, because a model may have written what stands in the evaluation data.
        outcomes = [self._decontaminated(outcome) for outcome in outcomes]
        if not self.config.answerability:
            return outcomes
        numbers = accepted(outcomes)
        return _replaced(outcomes, numbers, self._ask("answers", [outcomes[number] for number in numbers]))

    def _ask(self, step: str, items: Sequence[Any]) -> list[Any]:
        """Do a step for every item, together with the team; returns the results in the order of the items."""
        if self.team is None or not items:
            return self._ask_in_turn(step, items)
        # The names of steps are handed out, not functions: bound methods would carry the whole pipeline with them.
        order = self.team.hand_out((step, self.plan), items)
        done = self._ask_in_turn(step, [items[number] for number in order])
        results = dict(zip(order, done, strict=True))
        return [results[number] for number in range(len(items))]

    def _ask_in_turn(self, step: str, items: Sequence[Any]) -> list[Any]:
        """Do a step for every item, through the journal and the generator."""
        if self.generator is None or not items:
            return []
        name, work = _STEPS[step]
        progress = Progress(len(items), name=name, show=self.show_progress)
        try:
            # Opened for a step and closed after it, so that nothing that computes in between holds the file open.
            with Journal(self.journal, self.others) as journal:
                runner = Runner(self.generator, journal, budget=self.budget, progress=progress)

                def job(item: Any, ask: Ask) -> Awaitable[Any]:
                    return work(self, item, ask, runner.count)

                return runner.run(partial(job, item) for item in items)
        finally:
            progress.close()

    def _decontaminated(self, outcome: Outcome) -> Outcome:
        seed = outcome.seed
        if not outcome.accepted or not len(self.contamination):
            return outcome
        # The instruction of a summary task is the same in the evaluation data too, and gives nothing away.
        texts = [seed.answer, outcome.context or seed.context or ""]
        for text in texts if find_task(seed.task).is_summary else [seed.instruction, *texts]:
            overlap = self.contamination.overlap(text)
            if overlap:
                return replace(outcome, reason=f"contaminated: {overlap[0]!r} stands in {overlap[1]}")
        return outcome

    def _chosen(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Measure how hard the seeds are and reject those that are not chosen; the scores stay."""
        config = self.config
        if config.difficulty is None:
            return outcomes
        numbers = accepted(outcomes)
        seeds = [outcomes[number].seed for number in numbers]
        scores: list[float | None]
        if config.difficulty == "closed_book":
            scores = self._ask("closed_book", seeds)
        else:
            scores = list(answer_losses(seeds, config.difficulty_model or ""))
        outcomes = list(outcomes)
        for number, score in zip(numbers, scores, strict=True):
            if score is not None:
                outcomes[number] = replace(outcomes[number], scores={config.difficulty: score})
        # A high score says that the model knows the answer by heart; a high loss, that it does not.
        sign = -1 if config.difficulty == "closed_book" else 1
        hardness = [0.0 if score is None else sign * score for score in scores]
        kept = set(choose_seeds(seeds, hardness, config.difficulty_use, config.difficulty_share, config.seed))
        for place, number in enumerate(numbers):
            if place not in kept:
                outcomes[number] = replace(outcomes[number], reason=f"difficulty: not chosen by {config.difficulty}")
        return outcomes

    def _without_duplicates(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Refuse what nearly repeats an earlier context; a written one is written anew while retries are left."""
        if "duplicate" not in self.config.checks:
            return outcomes
        writes = self.config.generator != "documents" and self.config.method == "context"
        # Again until none is left: a rewritten context may repeat another one. Each time costs a retry, so it ends.
        duplicates = Duplicates()
        while True:
            numbers = accepted(outcomes)
            repeated = duplicates.find([outcomes[number].context for number in numbers])
            if not repeated:
                break
            places = [numbers[place] for place in repeated]
            # The later one of a pair goes, in the order of the seeds, which is the same in every run.
            refused = [replace(outcomes[place], reason=_REPEATED) for place in places]
            outcomes = _replaced(outcomes, places, self._ask("rewrite", refused) if writes else refused)
        passed = Check("duplicate", PASSED)
        return [
            replace(outcome, checks=(*outcome.checks, passed)) if outcome.accepted else outcome for outcome in outcomes
        ]


async def _answers(pipeline: Pipeline, outcome: Outcome, ask: Ask, count: Count) -> Outcome:
    # With the context and without it: a row that needs none teaches nothing.
    found = {
        "answerable_with": await score_answers(outcome.seed, pipeline.plan, ask, context=outcome.context),
        "answerable_without": await score_answers(outcome.seed, pipeline.plan, ask),
    }
    known = {name: score for name, score in found.items() if score is not None}
    return replace(outcome, scores={**outcome.scores, **known})


# What is asked for, as the user sees it, and how for one item. A process that follows another gets the name of a step.
_STEPS: dict[str, tuple[str, Callable[[Pipeline, Any, Ask, Count], Awaitable[Any]]]] = {
    "closed_book": (
        "closed-book answers",
        lambda of, seed, ask, count: score_answers(seed, of.plan, ask, samples=of.config.difficulty_samples),
    ),
    "write": ("contexts", lambda of, seed, ask, count: write_context(seed, of.plan, ask, count)),
    "write_pair": ("pairs", lambda of, chunk, ask, count: write_pair(chunk, of.plan, ask, count)),
    "judge": ("verdicts", lambda of, outcome, ask, count: judge_given(outcome, of.plan, ask)),
    "rewrite": ("rewriting", lambda of, old, ask, count: write_context(old.seed, of.plan, ask, count, old)),
    "answers": ("answers", _answers),
}


def _replaced(outcomes: Sequence[Outcome], numbers: Sequence[int], new: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with new ones in the places `numbers`; scores measured before stay."""
    changed = list(outcomes)
    for number, outcome in zip(numbers, new, strict=True):
        # A context that is written makes a new outcome, which knows nothing of what was measured before.
        changed[number] = replace(outcome, scores={**outcomes[number].scores, **outcome.scores})
    return changed


def check_distractors(seeds: Sequence[Seed], options: SynthesisOptions, documents: int) -> None:
    """Refuse more distractors than there can be."""
    limit = options.distractor_limit
    if limit is None:
        return
    share = options.difficulty_share if options.difficulty_use != "record" else 1.0
    # After difficulty has chosen; what verification will reject cannot be known yet and is warned of later.
    tasks = {task: round(share * count) for task, count in Counter(seed.task for seed in seeds).items()}
    for task, available in options.available_distractors(tasks, documents).items():
        if available < limit:
            sources = ", ".join(options.distractor_sources)
            raise ValueError(
                f"`n_distractors` must be at most {available}, got {limit}: task {task!r} has {tasks[task]} seeds, "
                f"and distractors come from {sources}. Lower it, give more seeds, or add to `distractor_sources`."
            )


def check_budget(seeds: Sequence[Seed], options: SynthesisOptions, counter: TokenCounter | None) -> None:
    """Refuse a token budget that no sample fits into."""
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
