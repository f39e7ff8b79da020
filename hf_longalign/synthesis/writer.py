"""The requests made for one seed: its context, again with the reason while retries are left; verdicts; answers."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import TypeVar

from hf_longalign.endpoint.protocol import GenerationError, Reply, Request, Sampling
from hf_longalign.synthesis.checks import FAILED, OPEN, PASSED, VERDICTS, Check, Rules, failures, verify_context
from hf_longalign.synthesis.outcome import Outcome, Provenance
from hf_longalign.synthesis.prompts import (
    ReplyError,
    answer_prompt,
    context_prompt,
    facts_prompt,
    judge_prompt,
    messages_of,
    outline_prompt,
    pair_prompt,
    read_context,
    read_facts,
    read_outline,
    read_pair,
    read_verdict,
    section_prompt,
    spoken,
)
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.text import clean, digest, holds, normalise, token_f1, word_count


T = TypeVar("T")
Ask = Callable[[Request], Awaitable[Reply]]
# Counts "retried" and "rejected" seeds, "usable" and "unusable" replies, the latter with reason and key.
Count = Callable[..., None]

# Enough to go on from; the whole text before would be paid for again with every section.
_TAIL_WORDS = 200
# A model that thinks before a short answer needs some room; more than this is no answer.
_ANSWER_TOKENS = 512
_SHORT_WORDS = 3


class GiveUpError(Exception):
    """No usable context, and no retry left; the message is the reason."""


@dataclass(frozen=True)
class Plan:
    """How contexts are written, for the processes that ask; the fields are options, see `SynthesisOptions`.

    `judge` is the model that judges support, if one does. `answering` is the one that answers: the judge's where there
    is one, so that no model marks its own texts.
    """

    generator: str
    model: str
    sampling: Sampling
    rules: Rules
    words: int = 2000
    reply_words: int = 2000
    facts_first: bool = False
    template: str | None = None
    retries: int = 2
    judge: str | None = None
    answering: str = ""

    @property
    def sections(self) -> int:
        """Sections per context; 1 for one that is written in a single reply."""
        return max(1, ceil(self.words / self.reply_words))


@dataclass
class Dialogue:
    """The requests made for one seed: their keys, the last one of its own, and how many retries they have used."""

    plan: Plan
    ask: Ask
    count: Count
    used: int = 0
    keys: list[str] = field(default_factory=list)
    last: str = ""
    prompt_hash: str = ""

    async def get(
        self, purpose: str, prompt: str, read: Callable[[str], T], reason: str | None
    ) -> tuple[T, str | None]:
        """Ask until the reply can be read; returns what was read and the finish reason. Raises `GiveUpError`.

        `reason` says why the text before was refused, if there was one.
        """
        sampling = self.plan.sampling
        while True:
            messages = messages_of(prompt, reason)
            # Another seed: the same prompt twice would otherwise get the journal's reply, the one that failed.
            request = Request(messages, self.plan.model, sampling.again(self.used), purpose)
            try:
                reply = await self.ask(request)
            except GenerationError as error:
                self.count("unusable", error.kind, request.key)
                raise GiveUpError(f"{error.kind}: {clean(error.told)}") from None
            self.keys.append(request.key)
            self.last = request.key
            self.prompt_hash = digest(*(part for message in messages for part in message))
            try:
                return read(reply.text), reply.finish_reason
            except ReplyError as error:
                cut = f"it was cut off at the limit of {sampling.token_limit} tokens; be shorter: "
                reason = f"parse: {cut if reply.finish_reason == 'length' else ''}{error}"
                self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Count the last reply as unusable and use up a retry; raises `GiveUpError` where none is left."""
        self.count("unusable", reason, self.last)
        self.retry(reason)

    def retry(self, reason: str) -> None:
        """Use up a retry; raises `GiveUpError` where none is left."""
        if self.used >= self.plan.retries:
            raise GiveUpError(reason)
        self.used += 1
        self.count("retried")

    async def settle(self, begun: Outcome, attempt: Callable[[str | None], Awaitable[Outcome]]) -> Outcome:
        """Attempt until an outcome is accepted, or no retry is left: then it is the last one, with the last reason."""
        best = begun
        try:
            if begun.reason:
                self.retry(begun.reason)
            while True:
                # Kept only with its checks: the retries may end in the middle of the next attempt.
                best = await attempt(best.reason or None)
                if best.accepted:
                    self.count("usable")
                    break
                self.refuse(best.reason)
        except GiveUpError as error:
            best = replace(best, reason=str(error))
            self.count("rejected")
        keys, attempts = tuple(self.keys), self.used + 1
        origin = Provenance(self.plan.generator, self.plan.model, self.prompt_hash, keys, attempts)
        return replace(best, provenance=origin)


async def write_context(seed: Seed, plan: Plan, ask: Ask, count: Count, refused: Outcome | None = None) -> Outcome:
    """Have a model write the context of a seed; one that was `refused` beside the others anew, with that reason."""
    dialogue = Dialogue(plan, ask, count)
    if refused is not None:
        # It goes on where the first writing ended, so that `retries` bounds what a seed costs in all.
        before = refused.provenance
        dialogue.used, dialogue.prompt_hash = before.attempts - 1, before.prompt_hash
        dialogue.keys += before.journal_keys

    async def attempt(reason: str | None) -> Outcome:
        title, context, finish_reason = await _text(seed, plan, dialogue, reason)
        # Some milliseconds per context: beside the event loop, so that replies go on arriving.
        found = await asyncio.to_thread(
            verify_context, context, seed, plan.rules, written=True, finish_reason=finish_reason, title=title
        )
        checks = await _judge(seed, context, [Check("parse", PASSED), *found], plan, ask, dialogue.keys)
        return Outcome(seed, context, title, failures(checks), tuple(checks))

    return await dialogue.settle(refused or Outcome(seed), attempt)


async def write_pair(chunk: Seed, plan: Plan, ask: Ask, count: Count) -> Outcome:
    """Have a model write an instruction and an answer for a text: the baseline, whose targets are synthetic."""
    context = chunk.context or ""
    dialogue = Dialogue(plan, ask, count)

    async def attempt(reason: str | None) -> Outcome:
        (question, answer), _ = await dialogue.get("pair", pair_prompt(context), read_pair, reason)
        seed = replace(chunk, instruction=question, answer=answer)
        found = await asyncio.to_thread(verify_context, context, seed, plan.rules, written=False)
        checks = [Check("parse", PASSED), *found]
        return Outcome(seed, context, chunk.title, failures(checks), tuple(checks))

    return await dialogue.settle(Outcome(chunk, context, chunk.title), attempt)


def check_given(seed: Seed, plan: Plan) -> Outcome:
    """Check the context that came with a seed: the human-annotated setting."""
    context = seed.context or ""
    checks = verify_context(context, seed, plan.rules, written=False)
    return Outcome(seed, context, seed.title, failures(checks), tuple(checks))


async def judge_given(outcome: Outcome, plan: Plan, ask: Ask) -> Outcome:
    """Let the judge decide where comparing strings did not find the answer in a given context."""
    keys: list[str] = []
    checks = await _judge(outcome.seed, outcome.context, list(outcome.checks), plan, ask, keys)
    provenance = replace(outcome.provenance, journal_keys=tuple(keys))
    return replace(outcome, checks=tuple(checks), reason=failures(checks), provenance=provenance)


async def _text(seed: Seed, plan: Plan, dialogue: Dialogue, reason: str | None) -> tuple[str | None, str, str | None]:
    """Title, text and finish reason, in as many steps as the plan has."""
    task, facts, number_of = find_task(seed.task), None, plan.sections
    if plan.facts_first:
        facts, _ = await dialogue.get("facts", facts_prompt(seed, task), read_facts, reason)
    if number_of == 1:
        prompt = context_prompt(seed, task, plan.words, facts=facts, template=plan.template)
        (title, context), finish_reason = await dialogue.get("context", prompt, read_context, reason)
        return title or (facts.title if facts else None), context, finish_reason
    prompt = outline_prompt(seed, task, plan.words, number_of, facts)
    read = partial(read_outline, sections=number_of)
    outline, finish_reason = await dialogue.get("outline", prompt, read, reason)
    written: list[str] = []
    words = ceil(plan.words / number_of)
    # One after the other, since each is shown how the one before ends.
    for number in range(1, number_of + 1):
        before = " ".join("\n\n".join(written).split(" ")[-_TAIL_WORDS:])
        prompt = section_prompt(seed, task, words, outline, number, before)
        (_, section), finish = await dialogue.get("section", prompt, read_context, None)
        written.append(section)
        # One section that was cut off makes the whole text one.
        finish_reason = finish if finish_reason != "length" else finish_reason
    return outline.title or None, "\n\n".join(written), finish_reason


async def _judge(seed: Seed, context: str, checks: list[Check], plan: Plan, ask: Ask, keys: list[str]) -> list[Check]:
    """Where comparing strings did not find the answer, a model's verdict decides; what fails anyway is not judged."""
    # A verdict costs a request with the whole context in it: only where it can still change what happens.
    number = next((number for number, check in enumerate(checks) if check.name == "support"), None)
    fails_anyway = any(check.outcome == FAILED for check in checks if check.name != "support")
    if number is None or checks[number].outcome == PASSED or fails_anyway or plan.judge is None:
        return checks
    # A model that takes no temperature takes no 0 either.
    temperature = None if plan.sampling.temperature is None else 0.0
    sampling = replace(plan.sampling, temperature=temperature, max_tokens=min(256, plan.sampling.max_tokens))
    request = Request(judge_prompt(seed, context), plan.judge, sampling, "judge")
    try:
        reply = await ask(request)
        keys.append(request.key)
        verdict, why = read_verdict(reply.text)
    except (GenerationError, ReplyError) as error:
        # No verdict is none against the context: the string check alone has the say.
        return [*checks, Check("judge", OPEN, f"no verdict: {error}")]
    if verdict:
        support = Check("support", PASSED, "judged")
        return [*checks[:number], support, *checks[number + 1 :], Check("judge", PASSED)]
    return [*checks, Check("judge", FAILED, why or "the judge found the answer unsupported")]


def score_answer(answer: str, reply: str) -> float:
    """Return how well `reply` gives `answer`, 0 to 1: word F1, or 1 for a short answer that stands in the reply.

    The F1 is SQuAD's (https://arxiv.org/abs/1606.05250); answers of a word that decides ("yes", "no") must open the
    reply.

    >>> score_answer("The Georgia Peach", "It was the georgia peach, Ty Cobb.")
    1.0
    >>> score_answer("no", "There is no doubt: yes.")
    0.0
    """
    wanted, given = normalise(answer), normalise(reply)
    if wanted in VERDICTS:
        return float(f"{given} ".startswith(f"{wanted} "))
    if wanted and word_count(answer) <= _SHORT_WORDS and holds(given, wanted):
        return 1.0
    return token_f1(given.split(), wanted.split())


async def score_answers(
    seed: Seed, plan: Plan, ask: Ask, *, context: str | None = None, samples: int = 1
) -> float | None:
    """Return the mean score of the model's answers, or `None` if it gave none; without `context` closed-book."""
    prompt = answer_prompt(seed, find_task(seed.task), context)
    purpose = "closed_book" if context is None else "open_book"
    limit = min(_ANSWER_TOKENS, plan.sampling.max_tokens)

    async def score(number: int) -> float | None:
        request = Request(prompt, plan.answering, replace(plan.sampling.again(number), max_tokens=limit), purpose)
        try:
            return score_answer(seed.answer, spoken((await ask(request)).text))
        except (GenerationError, ReplyError):
            return None

    scores = await asyncio.gather(*map(score, range(samples)))
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None
