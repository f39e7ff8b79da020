"""Choosing seeds by difficulty, before a context is paid for: what a model knows by heart needs no context.

Two measures: closed-book answerability (in `answering`), and the loss of the answer under a local model.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_longalign.synthesis.prompts import answer_prompt
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.text import digest


USES = ("record", "select", "stratify", "weight")
_STRATA = 4


def answer_losses(seeds: Sequence[Seed], model_name: str, batch_size: int = 8) -> list[float]:
    """Return the mean loss per answer token, in nats, of each answer given its instruction alone.

    Args:
        seeds: the pairs.
        model_name: a causal language model, by name or path; its chat template is used where it has one.
        batch_size: pairs per forward pass.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    rows = [_prompt_and_answer(seed, tokenizer) for seed in seeds]
    losses = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]) + len(rows[number][1]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        losses[numbers] = _batch_losses(model, [rows[number] for number in numbers], device)
    return [float(loss) for loss in losses]


def _prompt_and_answer(seed: Seed, tokenizer: Any) -> tuple[list[int], list[int]]:
    content = answer_prompt(seed, find_task(seed.task))[0][1]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(content, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return prompt, tokenizer(seed.answer, add_special_tokens=False)["input_ids"]


def _batch_losses(model: Any, rows: list[tuple[list[int], list[int]]], device: str) -> np.ndarray:
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, (prompt, answer) in enumerate(rows):
        whole = torch.tensor(prompt + answer)
        ids[number, : len(whole)], mask[number, : len(whole)] = whole, 1
        labels[number, len(prompt) : len(whole)] = whole[len(prompt) :]
    with torch.inference_mode():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
    token_losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:].to(device), reduction="none"
    )
    targets = (labels[:, 1:] != -100).sum(1).clamp(min=1).to(device)
    return (token_losses.sum(1) / targets).cpu().numpy()


def choose_seeds(seeds: Sequence[Seed], hardness: Sequence[float], use: str, share: float, seed: int = 0) -> list[int]:
    """Return the indices of the seeds to keep, in order, the same share of every task.

    Args:
        seeds: the pairs.
        hardness: how hard each is; higher is harder.
        use: "record" keeps all; "select" keeps the hardest; "stratify" keeps the same number from each quarter of the
            hardness; "weight" draws, the hardest three times as likely as the easiest.
        share: the share of each task that is kept, above 0 and up to 1.
        seed: seed of the draw. Each pair's draw depends on its own id alone.

    Example:

    >>> pairs = [Seed(str(number), "qasper", "Why?", "So.") for number in range(4)]
    >>> choose_seeds(pairs, [0.1, 0.9, 0.5, 0.7], "select", 0.5)
    [1, 3]
    """
    if use not in USES:
        raise ValueError(f"`difficulty_use` must be one of {', '.join(USES)}, got {use!r}.")
    if not 0 < share <= 1:
        raise ValueError(
            f"`difficulty_share` must be above 0 and at most 1, got {share!r}. Set it to the share to keep."
        )
    if use == "record":
        return list(range(len(seeds)))
    tasks = defaultdict(list)
    for number, pair in enumerate(seeds):
        tasks[pair.task].append(number)
    kept: list[int] = []
    for members in tasks.values():
        ranked = sorted(members, key=lambda number: (-hardness[number], number))
        kept += _choose(ranked, seeds, use, round(share * len(ranked)), seed)
    return sorted(kept)


def _choose(ranked: list[int], seeds: Sequence[Seed], use: str, count: int, seed: int) -> list[int]:
    """Choose `count` of one task's seeds, given from the hardest to the easiest."""
    if use == "select":
        return ranked[:count]
    draws = [_draw(seeds[number], seed) for number in ranked]
    if use == "weight":
        weights = np.linspace(3, 1, len(ranked))
        keys = [draw ** (1 / weight) for draw, weight in zip(draws, weights, strict=True)]
        return [ranked[place] for place in np.argsort(-np.array(keys), kind="stable")[:count]]
    chosen: list[int] = []
    for part in range(_STRATA):
        stratum = list(zip(draws, ranked, strict=True))[
            part * len(ranked) // _STRATA : (part + 1) * len(ranked) // _STRATA
        ]
        quota = (part + 1) * count // _STRATA - part * count // _STRATA
        chosen += [number for _, number in sorted(stratum)[:quota]]
    return chosen


def _draw(pair: Seed, seed: int) -> float:
    """A uniform number in (0, 1) that depends on the seed and the pair's id alone."""
    return (int(digest("difficulty", str(seed), pair.seed_id), 16) + 1) / (2**64 + 1)
