"""Instruction synthesis, the baseline of the paper: a model writes one question-answer pair about a given text.

The opposite of context synthesis: here the target is synthetic (https://arxiv.org/abs/2502.15592).
"""

import asyncio
from dataclasses import replace

from hf_longalign.synthesis.dialogue import Ask, Count, Dialogue, GiveUpError, ignore_count
from hf_longalign.synthesis.outcome import Outcome, Provenance
from hf_longalign.synthesis.prompts import pair_prompt
from hf_longalign.synthesis.replies import read_pair
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.verify import PASSED, Check, failures, verify_context
from hf_longalign.synthesis.writer import Plan


async def write_pair(chunk: Seed, plan: Plan, ask: Ask, *, count: Count = ignore_count) -> Outcome:
    """Have a model write an instruction and an answer for a text.

    Args:
        chunk: a seed with a context and nothing else.
        plan: the model, the sampling and what the pair is held to.
        ask: gets the reply to a request, from the journal or from the generator.
        count: is told "retried" and "rejected".

    Returns:
        The outcome, whose seed holds the pair.
    """
    context = chunk.context or ""
    dialogue = Dialogue(ask, plan.model, plan.sampling, plan.retries, count=count)
    seed, checks, reason = chunk, [], None
    try:
        while True:
            (question, answer), _ = await dialogue.get(
                "pair", lambda why: pair_prompt(context, reason=why), read_pair, reason
            )
            seed = replace(chunk, instruction=question, answer=answer)
            found = await asyncio.to_thread(verify_context, context, seed, plan.rules, written=False)
            checks = [Check("parse", PASSED), *found]
            reason = failures(checks)
            if not reason:
                count("usable")
                break
            dialogue.refuse(reason)
    except GiveUpError as error:
        reason = str(error)
        count("rejected")
    provenance = Provenance(plan.generator, plan.model, dialogue.prompt_hash, tuple(dialogue.keys), dialogue.used + 1)
    return Outcome(seed, context, chunk.title, reason or "", tuple(checks), provenance)
