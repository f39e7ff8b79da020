"""The parts of `gpu.py`: each takes where it runs, returns rows, and notes what it could not do."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import memory_formula
import numpy as np
import torch
import transformers
from generation import NEW_TOKENS, answer_naively, build_tokenizer, measured
from gpu_models import SEED, Step, build, collate, documents, free, run, synchronize, timed
from memory_formula import Shape

from hf_longalign import SkipPositionDataCollator
from hf_longalign.attention import ATTENTION_NAME, mark_boundaries, register_attention
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.prompt import Prompt


TINY = Shape("tiny", 2, 128, 4, 2, 32, 256, 512)
LLAMA, QWEN, SMALLER = (
    next(shape for shape in memory_formula.SHAPES if shape.name == name)
    for name in ("Llama-3-8B", "Qwen2.5-7B", "Qwen3-4B")
)
COMPILED_LAYERS = 8
# Dense bf16 FLOP/s by the makers' data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# Tokens/s of NeMo AutoModel on one H100: LoRA, bf16, 4,096 tokens.
PUBLIC = {"Llama-3-8B": 12_473, "Qwen2.5-7B": 14_110}


class Place(NamedTuple):
    """Where a part runs, and whether in the sizes of real models or in those that a CPU can do."""

    device: str
    large: bool


def attentions(device: str, could_not: list[str]) -> list[str]:
    """Return the backends that packed rows with skips run on here."""
    flash = {
        "flash_attention_2": find_spec("flash_attn") is not None,
        "flash_attention_3": find_spec("flash_attn_interface") is not None,
        "kernels-community/vllm-flash-attn3": find_spec("kernels") is not None,
    }
    there = [name for name, found in flash.items() if found and device == "cuda"]
    could_not += [f"{name}: not installed, or no GPU" for name in flash if name not in there]
    return [ATTENTION_NAME, *there]


def exactness(place: Place, could_not: list[str]) -> list[dict]:
    """Hold every backend against eager attention in float32, document by document: loss and gradients."""
    device = place.device
    rows, shape = documents(7, 40, TINY.vocabulary), TINY
    reference = build(shape, device, "eager", torch.float32).train()
    single = [collate([row], False, True, 2048, device) for row in rows]
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in single)
    reference.zero_grad()
    for batch in single:
        count = int((batch["labels"][:, 1:] != -100).sum())
        (reference(**batch, use_cache=False).loss * count / targets).backward()
    expected = [weight.grad.clone() for weight in reference.parameters()]
    results = []
    for attention in attentions(device, could_not):
        for dtype in (torch.float32, torch.bfloat16) if attention == ATTENTION_NAME else (torch.bfloat16,):
            for packed in (False, True):
                try:
                    model = build(shape, device, attention, torch.float32).to(dtype).train()
                    _, gradients = run(model, collate(rows, packed, True, 2048, device))
                except Exception as error:  # noqa: BLE001 # a kernel that does not run here is an answer
                    could_not.append(
                        f"{attention} {dtype} packed={packed}: {type(error).__name__}: {str(error)[:200]}"
                    )
                    continue
                worst = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True))
                results.append(
                    {"attention": attention, "dtype": str(dtype), "packed": packed, "gradient_error": round(worst, 6),
                     "exact": worst < (1e-4 if dtype == torch.float32 else 0.1)}
                )  # fmt: skip
    if device == "cuda":
        results += flex_exactness(could_not)
    return results


def flex_exactness(could_not: list[str]) -> list[dict]:
    """Compare softcap, sinks and windows over skips on the GPU with the CPU's formula, in float32."""
    results = []
    for name, sizes in {
        "Gemma2": {"attn_logit_softcapping": 50.0, "sliding_window": 48},
        "GptOss": {"sliding_window": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        "Mistral": {"sliding_window": 48},
    }.items():
        config = getattr(transformers, f"{name}Config")(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, **sizes,
        )  # fmt: skip
        try:
            torch.manual_seed(SEED)
            register_attention()
            model = getattr(transformers, f"{name}ForCausalLM")._from_config(
                config, attn_implementation=ATTENTION_NAME
            )
            rows = documents(7, 60, 512)
            _, expected = run(model.train(), collate(rows, True, True, 2048, "cpu"))
            _, actual = run(model.cuda(), collate(rows, True, True, 2048, "cuda"))
            worst = max(
                float((a.cpu() - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(actual, expected, strict=True)
            )
            results.append({"attention": f"flex, {name}", "gradient_error": round(worst, 6), "exact": worst < 1e-3})
        except Exception as error:  # noqa: BLE001 # see above
            could_not.append(f"flex, {name}: {type(error).__name__}: {str(error)[:300]}")
    return results


def trajectories(place: Place, could_not: list[str]) -> list[dict]:
    """Train 50 steps on every backend, packed and padded: the loss curves are one."""
    device = place.device
    steps, results, reference = 50 if place.large else 10, [], None
    half = torch.bfloat16 if device == "cuda" else torch.float32
    cases = [("eager", False, torch.float32), ("sdpa", False, torch.float32)]
    cases += [(name, packed, half) for name in attentions(device, could_not) for packed in (False, True)]
    for attention, packed, dtype in cases:
        try:
            model = build(TINY, device, attention, torch.float32).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses = []
            for step in range(steps):
                rows = documents(5, 30 + step, TINY.vocabulary)
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    loss = model(**collate(rows, packed, True, 2048, device), use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        except Exception as error:  # noqa: BLE001 # see above
            could_not.append(f"trajectory of {attention} packed={packed}: {type(error).__name__}: {str(error)[:200]}")
            continue
        reference = losses if reference is None else reference
        apart = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        results.append({"attention": attention, "packed": packed, "dtype": str(dtype), "steps": steps,
                        "last_loss": round(losses[-1], 5), "furthest_apart": round(apart, 6)})  # fmt: skip
    return results


def attempt(name: str, could_not: list[str], make: Callable[[], dict]) -> list[dict]:
    """Return one row, or say why there is none."""
    try:
        return [make()]
    except Exception as error:  # noqa: BLE001 # want of memory or of a package is an answer
        could_not.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        return []


def throughput(place: Place, could_not: list[str]) -> list[dict]:
    """Measure tokens/s and MFU with and without skips, and TRL's own trainer, on packed rows of 4,096 with LoRA.

    Nothing is recomputed in the backward pass: there is room for rows of this length.
    """
    device = place.device
    results, length = [], 4096 if place.large else 512
    for shape in (LLAMA, QWEN) if place.large else (TINY,):
        for side, ours, skipped in [("TRL", False, False), ("ordinary", True, False), ("skipped", True, True)]:

            def measure(shape: Shape = shape, side: str = side, ours: bool = ours, skipped: bool = skipped) -> dict:
                step = Step(shape, device, length, ours=ours, skipped=skipped, recomputed=False)
                seconds = timed(step, 10 if place.large else 3)
                rate = step.tokens / seconds
                row = {"model": shape.name, "side": side, "tokens": step.tokens, "step_s": round(seconds, 4),
                       "tokens_per_s": round(rate)}  # fmt: skip
                # Forward and backward without gradients of the frozen weights, recomputation not counted.
                flops = rate * (4 * memory_formula.parameters(shape))
                peak = next((peak for card, peak in PEAKS.items() if card in device_name(device)), None)
                row["tflops"] = round(flops / 1e12, 2)
                row["mfu"] = round(flops / peak, 3) if peak else None
                row["goal"] = PUBLIC.get(shape.name)
                return row

            results += attempt(f"{shape.name}, {side}", could_not, measure)
            free(device)
        ours_rows = {row["side"]: row["step_s"] for row in results if row["model"] == shape.name}
        if {"ordinary", "skipped"} <= ours_rows.keys():
            cost = ours_rows["skipped"] / ours_rows["ordinary"] - 1
            results.append(
                {"model": shape.name, "side": "cost of skips", "share_of_a_step": round(cost, 4), "goal": 0.01}
            )
    return results


def device_name(device: str) -> str:
    """Return the card's name."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def card_gib() -> float:
    """Return the memory of the GPU."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def compiling(place: Place, could_not: list[str]) -> list[dict]:
    """Measure what `torch.compile` gains, what the first step waits for it, and how often it compiled after the third.

    As a whole, and by layer as `accelerate launch --dynamo_use_regional_compilation` does.
    """
    device = place.device
    from accelerate.utils import compile_regions
    from torch._dynamo.utils import counters

    # As a whole all 32 layers take minutes and tell nothing more.
    few = replace(LLAMA, name=f"Llama-3-8B, {COMPILED_LAYERS} of its {LLAMA.layers} layers", layers=COMPILED_LAYERS)
    cases = [(few if place.large else TINY, how) for how in ("no", "by layer", "whole")]
    cases += [(LLAMA, how) for how in ("no", "by layer") if place.large]
    results, length = [], 4096 if place.large else 512
    backend = "inductor" if device == "cuda" else "aot_eager"
    compilers = {"no": lambda model, **_: model, "by layer": compile_regions, "whole": torch.compile}
    for shape, how in cases:

        def measure(shape: Shape = shape, how: str = how) -> dict:
            register_attention()
            torch._dynamo.reset()
            model = build(shape, device, ATTENTION_NAME, torch.bfloat16, lora=True).train()
            called = compilers[how](model, backend=backend)
            collator = SkipPositionDataCollator(
                0, 131_072, skip_probability=1.0, padding_free=True, few_shapes=True, pad_to_multiple_of=length
            )
            times, graphs = [], []
            counters.clear()
            for index in range(12):
                batch = collator(documents(3 + 5 * (index % 4), length // 24, shape.vocabulary))
                batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
                mark_boundaries(batch)
                synchronize(device)
                start = time.perf_counter()
                called(**batch, use_cache=False).loss.backward()
                synchronize(device)
                times.append(time.perf_counter() - start)
                graphs.append(counters["stats"]["unique_graphs"])
            return {"model": shape.name, "compiled": how, "backend": None if how == "no" else backend,
                    "first_step_s": round(times[0], 1), "step_s": round(statistics.median(times[5:]), 4),
                    "graphs_after_step": graphs, "compiled_again_after_step_3": graphs[-1] - graphs[2]}  # fmt: skip

        results += attempt(f"{shape.name}, compiled {how}", could_not, measure)
        free(device)
    return results


def span(place: Place, could_not: list[str]) -> list[dict]:
    """Time a sample that spans 128k positions: by 4k real tokens with skips, and by 128k real tokens."""
    device = place.device
    results, shape = [], TINY
    short, long = (4096, 131_072) if place.large else (256, 8192)
    if place.large:
        fits = [shape for shape in (LLAMA, SMALLER) if memory_formula.longest_row(shape, card_gib()) >= long]
        shape = fits[0] if fits else SMALLER
    for tokens in (short, long):

        def measure(tokens: int = tokens) -> dict:
            step = Step(shape, device, tokens, ours=True, skipped=True, recomputed=True, count=1)
            positions = 131_072 if tokens == short else tokens
            return {"model": shape.name, "real_tokens": step.tokens, "positions": positions,
                    "seconds_per_sample": round(timed(step, *(3, 2) if tokens == short else (1, 0)), 4)}  # fmt: skip

        results += attempt(f"{tokens} real tokens", could_not, measure)
        free(device)
    if len(results) == 2:
        ratio = results[1]["seconds_per_sample"] / results[0]["seconds_per_sample"]
        results.append({"model": shape.name, "times_cheaper": round(ratio, 1), "goal": 50 if place.large else None})
    return results


def saved_bytes(shape: Shape, tokens: int = 64) -> float:
    """Count what one layer keeps for its backward pass, bytes per token, by saved-tensor hooks."""
    model = build(shape, "cpu", ATTENTION_NAME, torch.bfloat16, lora=True).train()
    decoder = model.get_base_model().model
    states = torch.randn(1, tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotations = decoder.rotary_emb(states, positions)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rotations)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.layers[0](states, position_embeddings=rotations, position_ids=positions, attention_mask=None)
    return sum(storage.nbytes() for storage in kept.values()) / tokens


def memory(place: Place, could_not: list[str]) -> list[dict]:
    """Check the formula of recipes/MEMORY.md: a layer's bytes by counting; on a GPU the whole, to the longest row."""
    device = place.device
    rng, results = np.random.default_rng(SEED), []
    for _ in range(6):
        key_heads, groups, width = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([16, 32, 64]))
        heads = key_heads * groups
        hidden, ffn = 16 * heads * int(rng.integers(1, 5)), 64 * int(rng.integers(1, 9))
        shape = Shape("layer", 1, hidden, heads, key_heads, width, ffn, 32)
        counted, reckoned = saved_bytes(shape), memory_formula.layer_bytes(shape)
        results.append(
            {"layer": [shape.hidden, heads, key_heads, width, shape.ffn], "counted": counted, "formula": reckoned}
        )
    if not place.large:
        could_not.append("memory: the whole of a step and the longest row need a GPU and its sizes")
        return results
    for tokens in (8192, 32_768, int(memory_formula.longest_row(LLAMA, card_gib()) * 0.95) // 1024 * 1024):

        def measure(tokens: int = tokens) -> dict:
            count = max(1, tokens // 4096)
            step = Step(LLAMA, device, tokens, ours=True, skipped=True, recomputed=True, count=count)
            step()
            allocated = torch.cuda.max_memory_allocated()
            reckoned = memory_formula.fixed_bytes(LLAMA) + tokens * memory_formula.bytes_per_token(LLAMA)
            return {"model": LLAMA.name, "tokens": tokens, "peak_gib": round(allocated / 2**30, 2),
                    "formula_gib": round(reckoned / 2**30, 2)}  # fmt: skip

        results += attempt(f"a packed row of {tokens}", could_not, measure)
        free(device)
    return results


def evaluation(place: Place, could_not: list[str]) -> list[dict]:
    """Measure two questions about one text, longer and longer, as the suites ask them and by plain `generate`."""
    results, shape = [], LLAMA if place.large else TINY
    dtype = torch.bfloat16 if place.device == "cuda" else torch.float32
    model, tokenizer = build(shape, place.device, "sdpa", dtype).eval(), build_tokenizer(shape.vocabulary)
    rng = np.random.default_rng(SEED)
    for length in (8192, 32_768, 131_072) if place.large else (256, 1024):

        def measure(length: int = length) -> dict:
            words = [str(word) for word in rng.integers(3, shape.vocabulary, length - NEW_TOKENS - 1)]
            prompts = [
                Prompt("needle", "single", number, " ".join([*words, str(3 + number)]), ("",), NEW_TOKENS, chat=False)
                for number in range(2)
            ]
            generator = LocalGenerator(model, tokenizer)
            for _ in range(2):  # the first time loads kernels, each side its own
                _, naive, naive_peak = measured(lambda: answer_naively(model, tokenizer, prompts))
                _, own, own_peak = measured(lambda: list(generator.generate(prompts)))
            return {"model": shape.name, "prompt": length, "questions": len(prompts), "seconds": round(own, 2),
                    "generate_seconds": round(naive, 2), "times_faster": round(naive / own, 2),
                    # Beside the weights, which torch counts on a GPU alone.
                    **({"extra_gib": round(own_peak / 2**30, 2), "generate_extra_gib": round(naive_peak / 2**30, 2)}
                       if place.device == "cuda" else {})}  # fmt: skip

        results += attempt(f"a prompt of {length}", could_not, measure)
        free(place.device)
    return results
