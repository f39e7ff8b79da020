"""What a model answers with and without the context: closed-book answerability, and whether a context is needed."""

import asyncio
from collections import Counter
from dataclasses import replace

from hf_longalign.endpoint.protocol import GenerationError, Request, Sampling
from hf_longalign.synthesis.dialogue import Ask
from hf_longalign.synthesis.prompts import answer_prompt
from hf_longalign.synthesis.replies import ReplyError, spoken
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.text import normalise


_ANSWER_TOKENS = 512


def score_answer(answer: str, reply: str) -> float:
    """Return how well `reply` gives `answer`, 0 to 1: word F1, or 1 for a short answer that stands in the reply.

    The F1 is SQuAD's (https://arxiv.org/abs/1606.05250); answers of a word that decides ("yes", "no") must open the
    reply.

    Example:

    >>> score_answer("The Georgia Peach", "It was the georgia peach, Ty Cobb.")
    1.0
    >>> score_answer("no", "There is no doubt: yes.")
    0.0
    """
    wanted, given = normalise(answer).split(), normalise(reply).split()
    if not wanted or not given:
        return 0.0
    if wanted[0] in ("yes", "no") and len(wanted) == 1:
        return float(given[0] == wanted[0])
    if len(wanted) <= 3 and f" {' '.join(wanted)} " in f" {' '.join(given)} ":
        return 1.0
    common = sum((Counter(wanted) & Counter(given)).values())
    return 2 * common / (len(wanted) + len(given))


async def score_closed_book(seed: Seed, model: str, sampling: Sampling, samples: int, ask: Ask) -> float | None:
    """Return the mean score of `samples` answers from what the model knows, or `None` if it gave none."""
    requests = [
        Request(answer_prompt(seed, find_task(seed.task)), model, _short(sampling, number), "closed_book")
        for number in range(samples)
    ]
    return await _mean_score(seed, requests, ask)


async def score_open_book(seed: Seed, context: str, model: str, sampling: Sampling, ask: Ask) -> float | None:
    """Return the score of the answer the model gives with the context before it, or `None` if it gave none."""
    prompt = answer_prompt(seed, find_task(seed.task), context)
    return await _mean_score(seed, [Request(prompt, model, _short(sampling, 0), "open_book")], ask)


async def _mean_score(seed: Seed, requests: list[Request], ask: Ask) -> float | None:
    scores = await asyncio.gather(*(_score(seed, request, ask) for request in requests))
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


async def _score(seed: Seed, request: Request, ask: Ask) -> float | None:
    try:
        return score_answer(seed.answer, spoken((await ask(request)).text))
    except (GenerationError, ReplyError):
        return None


def _short(sampling: Sampling, number: int) -> Sampling:
    return replace(sampling.again(number), max_tokens=min(_ANSWER_TOKENS, sampling.max_tokens))
