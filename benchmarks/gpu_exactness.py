"""Whether every attention that can be had here computes what eager attention does, document by document."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from gpu_models import SEED, TINY, CouldNot, Place, attempt, build, collate, documents
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

from hf_longalign.attention import ATTENTION_NAME, exactness_problem, register_attention


# Largest relative error that is rounding. Documents that see each other are wrong by about 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
FLEX_TOLERANCE = 1e-3  # of one device against another
# Batches of one length: flex attention is compiled for a length.
FLEX_MULTIPLE = {"flex_attention": 128}


class Outcome(NamedTuple):
    """What a forward and a backward pass over some documents give, in float32.

    `logits` has a tensor (tokens, vocabulary) for each document, `gradients` one for each weight.
    """

    loss: float
    logits: list[torch.Tensor]
    gradients: list[torch.Tensor]


def outcome(model: Any, rows: list[dict], packed: bool, device: str, multiple: int | None = None) -> Outcome:
    """Train documents with skipped positions in one batch, without a step."""
    model.zero_grad(set_to_none=True)
    output = model(**collate(rows, packed, True, 2048, device, multiple), use_cache=False)
    output.loss.backward()
    lengths = [len(row["input_ids"]) for row in rows]
    logits = output.logits.detach().float()
    documents = (
        list(logits[0, : sum(lengths)].split(lengths))
        if packed
        else [row[:length] for row, length in zip(logits, lengths, strict=True)]
    )
    # Copies: a model that is moved takes its gradients along.
    gradients = [weight.grad.float().clone() for weight in model.parameters() if weight.grad is not None]
    return Outcome(output.loss.item(), documents, gradients)


def one_by_one(model: Any, rows: list[dict], device: str) -> Outcome:
    """Return what `outcome` shall be, from documents that cannot see each other: each in a forward pass of its own."""
    targets = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    alone = [outcome(model, [row], False, device) for row in rows]
    shares = [count / sum(targets) for count in targets]
    gradients = zip(*(document.gradients for document in alone), strict=True)
    return Outcome(
        sum(share * document.loss for share, document in zip(shares, alone, strict=True)),
        [document.logits[0] for document in alone],
        [sum(share * part for share, part in zip(shares, parts, strict=True)) for parts in gradients],
    )


def errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """Return the relative error of the loss, and the worst of a document's logits and of a weight's gradient."""

    def worst(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        pairs = ((one.cpu(), other.cpu()) for one, other in zip(some, others, strict=True))
        # Not Python's `max`, which passes over a NaN.
        return torch.stack([(one - other).norm() / other.norm().clamp(min=1e-9) for one, other in pairs]).max().item()

    return {
        "loss_error": abs(actual.loss - expected.loss) / abs(expected.loss),
        "logit_error": worst(actual.logits, expected.logits),
        "gradient_error": worst(actual.gradients, expected.gradients),
    }


def mask_attentions(device: str, could_not: CouldNot) -> list[str]:
    """Return the attentions of transformers that take a mask."""
    if device == "cuda":
        return ["eager", "sdpa", "flex_attention"]
    could_not("flex_attention: has no backward pass on a CPU")
    return ["eager", "sdpa"]


def flash_attentions(device: str, could_not: CouldNot) -> list[str]:
    """Return the flash attentions that can be had here; what a kernel of the Hub lacks only its use can tell."""
    there = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
        "kernels-community/flash-attn2": is_kernels_available,
        "kernels-community/vllm-flash-attn3": is_kernels_available,
    }
    found = []
    for name, available in there.items():
        if device == "cuda" and available():
            found.append(name)
        else:
            could_not(f"{name}: {'not installed' if device == 'cuda' else 'needs a GPU'}")
    return found


def exactness(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Hold every attention against eager in float32, document by document: loss, logits and gradients."""
    device, rows = place.device, documents(7, 40, TINY.vocabulary)
    reference = build(TINY, device, "eager", torch.float32).train()
    expected = one_by_one(reference, rows, device)

    def compared(attention: str, dtypes: list[torch.dtype]) -> Iterator[dict]:
        problem = exactness_problem(reference.config, attention, packed=True, skipped=True)
        if problem is not None:
            could_not(f"{attention}, packed: refused. {problem}")
        for packed, dtype in itertools.product((False, True) if problem is None else (False,), dtypes):

            def measure(dtype: torch.dtype = dtype, packed: bool = packed) -> dict:
                # Built in its dtype: rotary frequencies stay in float32, as where a model is loaded.
                model = build(TINY, device, attention, dtype).train()
                model.load_state_dict(reference.state_dict())
                found = errors(outcome(model, rows, packed, device, FLEX_MULTIPLE.get(attention)), expected)
                bound = TOLERANCE[dtype]
                return {"attention": attention, "dtype": str(dtype), "packed": packed, **rounded(found),
                        "exact": all(error < bound for error in found.values()), "bound": bound}  # fmt: skip

            yield from attempt(f"{attention}, {dtype}, packed={packed}", could_not, measure)

    for attention in [*mask_attentions(device, could_not), ATTENTION_NAME]:
        yield from compared(attention, [torch.float32, torch.bfloat16])
    if device == "cuda":
        yield from flex_exactness(could_not)
    # Last: a kernel that fails may leave the process without a GPU.
    for attention in flash_attentions(device, could_not):
        yield from compared(attention, [torch.bfloat16])


def rounded(found: dict[str, float], digits: int = 7) -> dict[str, float]:
    """Round what a row holds."""
    return {key: round(value, digits) for key, value in found.items()}


def flex_exactness(could_not: CouldNot) -> Iterator[dict]:
    """Compare softcap, sinks and windows over skips on the GPU with the CPU's formula, in float32."""
    for name, sizes in {
        "Gemma2": {"attn_logit_softcapping": 50.0, "sliding_window": 48},
        "GptOss": {"sliding_window": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        "Mistral": {"sliding_window": 48},
    }.items():
        config = getattr(transformers, f"{name}Config")(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, **sizes,
        )  # fmt: skip

        def measure(name: str = name, config: Any = config) -> dict:
            torch.manual_seed(SEED)
            model = getattr(transformers, f"{name}ForCausalLM")._from_config(
                config, attn_implementation=register_attention()
            )
            rows = documents(7, 60, 512)
            expected = outcome(model.train(), rows, True, "cpu")
            found = errors(outcome(model.cuda(), rows, True, "cuda"), expected)
            exact = all(error < FLEX_TOLERANCE for error in found.values())
            return {"attention": f"{ATTENTION_NAME} by flex, {name}", "dtype": "torch.float32", "packed": True,
                    **rounded(found), "exact": exact, "bound": FLEX_TOLERANCE}  # fmt: skip

        yield from attempt(f"flex, {name}", could_not, measure)


def trajectories(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Train 50 steps on every attention, packed and padded: the loss curves are one."""
    device, steps = place.device, 50 if place.large else 10
    half = torch.bfloat16 if device == "cuda" else torch.float32
    cases = [(name, False, torch.float32) for name in mask_attentions(device, could_not)]
    own_and_flash = [ATTENTION_NAME, *flash_attentions(device, could_not)]
    cases += [(name, packed, half) for name in own_and_flash for packed in (False, True)]
    reference: list[float] = []
    for attention, packed, dtype in cases:

        def measure(attention: str = attention, packed: bool = packed, dtype: torch.dtype = dtype) -> dict:
            model = build(TINY, device, attention, torch.float32).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses = []
            for step in range(steps):
                rows = documents(5, 30 + step, TINY.vocabulary)
                batch = collate(rows, packed, True, 2048, device, FLEX_MULTIPLE.get(attention))
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            if not reference:
                reference.extend(losses)
            apart = float(np.abs(np.subtract(losses, reference)).max())  # NaN where one is
            return {"attention": attention, "packed": packed, "dtype": str(dtype), "steps": steps,
                    "last_loss": round(losses[-1], 5), "furthest_apart": round(apart, 6)}  # fmt: skip

        yield from attempt(f"trajectory of {attention}, packed={packed}", could_not, measure)
