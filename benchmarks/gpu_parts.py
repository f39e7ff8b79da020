"""The parts of `gpu.py`: each takes where it runs, yields rows as it has them, and says what it could not do."""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import memory_formula
import numpy as np
import torch
from generation import NEW_TOKENS, answer_naively, build_tokenizer, measured
from gpu_exactness import exactness, flash_attentions, trajectories  # noqa: F401 # parts too
from gpu_models import (
    SEED,
    TINY,
    CouldNot,
    Place,
    Step,
    attempt,
    build,
    compiler,
    documents,
    free,
    in_turn,
    ratio,
    synchronize,
    timed,
    twin,
)
from memory_formula import Shape

from hf_longalign import SkipPositionDataCollator
from hf_longalign.attention import ATTENTION_NAME, mark_boundaries, register_attention
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.prompt import Prompt


LLAMA, QWEN, SMALLER = (
    next(shape for shape in memory_formula.SHAPES if shape.name == name)
    for name in ("Llama-3-8B", "Qwen2.5-7B", "Qwen3-4B")
)
COMPILED_LAYERS = 8
# Dense bf16 FLOP/s by the makers' data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# Tokens/s of NeMo AutoModel on one H100: LoRA, bf16, 4,096 tokens.
PUBLIC = {"Llama-3-8B": 12_473, "Qwen2.5-7B": 14_110}
TRL = "TRL's trainer, on the same attention"
# Steps of every side: with the noise of a GPU enough to tell one percent.
ROUNDS = 60


class Side(NamedTuple):
    """What is stepped: a trainer, this package's or TRL's, on an attention."""

    attention: str = ATTENTION_NAME
    ours: bool = True
    skipped: bool = False
    compiled: bool = False


def throughput(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Measure tokens/s and MFU on packed rows of 4,096 with LoRA: with skips and without, by layer, and by TRL.

    TRL's trainer runs on this package's attention, as the other sides do, and on each flash attention that can be had.
    Nothing is recomputed in the backward pass: there is room for rows of this length.
    """
    shapes, rounds = ((LLAMA, QWEN), ROUNDS) if place.large else ((TINY,), 20)
    fewer = rounds // 3 // 2 * 2
    skipped, trl = Side(skipped=True), Side(ours=False)
    for shape in shapes:
        all_sides = {"ordinary": Side(), "skipped": skipped, TRL: trl}
        yield from stepped_in_turn(shape, all_sides, rounds, place, could_not)
        free(place.device)
        compiled = {"skipped": skipped, "skipped, compiled by layer": skipped._replace(compiled=True)}
        yield from stepped_in_turn(shape, compiled, fewer, place, could_not)
        free(place.device)
    # Last, for a kernel that fails may leave the process without a GPU; and one at a time, for transformers loads a
    # flash attention anew wherever it changes.
    for name, shape in itertools.product(flash_attentions(place.device, could_not), shapes):
        both = {TRL: trl, f"TRL's trainer, on {name}": trl._replace(attention=name)}
        yield from stepped_in_turn(shape, both, fewer, place, could_not)
        free(place.device)


def stepped_in_turn(
    shape: Shape, sides: dict[str, Side], rounds: int, place: Place, could_not: CouldNot
) -> Iterator[dict]:
    """Step all sides over the same weights; then compare the others with the first."""
    device, length, steps = place.device, 4096 if place.large else 512, {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for model in attempt(shape.name, could_not, lambda: build(shape, device, ATTENTION_NAME, dtype, lora=True)):
        for name, side in sides.items():

            def ready(side: Side = side, model: Any = model) -> Step:
                options = side._asdict()
                own = twin(model, options.pop("attention"))
                step = Step(shape, device, length, recomputed=False, model=own, **options)
                step()
                return step

            for step in attempt(f"{shape.name}, {name}", could_not, ready):
                steps[name] = step
    for times in attempt(f"{shape.name}, in turn", could_not, lambda: in_turn(steps, rounds)):
        for name, step in steps.items():
            seconds = statistics.median(times[name])
            rate = step.tokens / seconds
            # Forward and backward without gradients of the frozen weights, recomputation not counted.
            flops = rate * (4 * memory_formula.parameters(shape))
            peak = next((peak for card, peak in PEAKS.items() if card in device_name(device)), None)
            yield {"model": shape.name, "side": name, "attention": step.attention, "tokens": step.tokens,
                   "steps": rounds, "step_s": round(seconds, 4), "tokens_per_s": round(rate),
                   "tflops": round(flops / 1e12, 2), "mfu": round(flops / peak, 3) if peak else None,
                   "goal": PUBLIC.get(shape.name)}  # fmt: skip
        first = next(iter(times), None)
        for name in [name for name in times if name != first]:
            cost = {key: round(value - 1, 4) for key, value in ratio(times[name], times[first]).items()}
            goal = 0.01 if (name, first) == ("skipped", "ordinary") else None
            yield {"model": shape.name, "side": f"cost of: {name}", "beside": first, "steps": rounds,
                   "share_of_a_step": cost["ratio"], "from": cost["low"], "to": cost["high"], "goal": goal,
                   # The whole of the interval, or it has not been shown.
                   "goal_met": None if goal is None else cost["high"] <= goal}  # fmt: skip


def device_name(device: str) -> str:
    """Return the card's name."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def card_gib() -> float:
    """Return the memory of the GPU."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def compiling(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Measure what `torch.compile` gains, what the first step waits for it, and how often it compiled after the third.

    As a whole, and by layer as `accelerate launch --dynamo_use_regional_compilation` does.
    """
    device = place.device
    from accelerate.utils import compile_regions
    from torch._dynamo.utils import counters

    # As a whole all 32 layers take minutes and tell nothing more.
    few = replace(LLAMA, name=f"Llama-3-8B, {COMPILED_LAYERS} of its {LLAMA.layers} layers", layers=COMPILED_LAYERS)
    cases = [(few if place.large else TINY, how) for how in ("no", "by layer", "whole")]
    # A config that names the kind of each layer: a graph must serve all of a kind, more than dynamo's limit of eight.
    cases += [(QWEN, how) for how in ("no", "by layer") if place.large]
    length = 4096 if place.large else 512
    backend = compiler(device)
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
                    "measured": "forward and backward with the model's own loss, no optimiser",
                    "first_step_s": round(times[0], 1), "step_s": round(statistics.median(times[5:]), 4),
                    "graphs_after_step": graphs, "compiled_again_after_step_3": graphs[-1] - graphs[2]}  # fmt: skip

        yield from attempt(f"{shape.name}, compiled {how}", could_not, measure)
        free(device)


def span(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Time a sample that spans 128k positions: by 4k real tokens with skips, and by 128k real tokens."""
    device = place.device
    seconds, shape = [], TINY
    short, long = (4096, 131_072) if place.large else (256, 8192)
    if place.large:
        fits = [shape for shape in (LLAMA, SMALLER) if memory_formula.longest_row(shape, card_gib()) >= long]
        shape = fits[0] if fits else SMALLER
    for tokens in (short, long):

        def measure(tokens: int = tokens) -> dict:
            step = Step(shape, device, tokens, ours=True, skipped=True, recomputed=True, count=1)
            return {"model": shape.name, "real_tokens": step.tokens, "positions": 131_072,
                    "seconds_per_sample": round(timed(step, *(3, 2) if tokens == short else (1, 0)), 4)}  # fmt: skip

        for row in attempt(f"{tokens} real tokens", could_not, measure):
            yield row
            seconds.append(row["seconds_per_sample"])
        free(device)
    if len(seconds) == 2:
        yield {"model": shape.name, "times_cheaper": round(seconds[1] / seconds[0], 1),
               "goal": 50 if place.large else None}  # fmt: skip


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


def memory(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Check the formula of recipes/MEMORY.md: a layer's bytes by counting; on a GPU the whole, to the longest row."""
    device = place.device
    rng = np.random.default_rng(SEED)
    for _ in range(6):
        key_heads, groups, width = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([16, 32, 64]))
        heads = key_heads * groups
        hidden, ffn = 16 * heads * int(rng.integers(1, 5)), 64 * int(rng.integers(1, 9))
        shape = Shape("layer", 1, hidden, heads, key_heads, width, ffn, 32)
        counted, reckoned = saved_bytes(shape), memory_formula.layer_bytes(shape)
        yield {"layer": [shape.hidden, heads, key_heads, width, shape.ffn], "counted": counted, "formula": reckoned}
    if not place.large:
        could_not("memory: the whole of a step and the longest row need a GPU and its sizes")
        return
    for tokens in (8192, 32_768, int(memory_formula.longest_row(LLAMA, card_gib()) * 0.95) // 1024 * 1024):

        def measure(tokens: int = tokens) -> dict:
            count = max(1, tokens // 4096)
            step = Step(LLAMA, device, tokens, ours=True, skipped=True, recomputed=True, count=count)
            step()
            allocated = torch.cuda.max_memory_allocated()
            reckoned = memory_formula.fixed_bytes(LLAMA) + tokens * memory_formula.bytes_per_token(LLAMA)
            return {"model": LLAMA.name, "tokens": tokens, "peak_gib": round(allocated / 2**30, 2),
                    "formula_gib": round(reckoned / 2**30, 2)}  # fmt: skip

        yield from attempt(f"a packed row of {tokens}", could_not, measure)
        free(device)


def evaluation(place: Place, could_not: CouldNot) -> Iterator[dict]:
    """Measure two questions about one text, longer and longer, as the suites ask them and by plain `generate`."""
    shape = LLAMA if place.large else TINY
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

        yield from attempt(f"a prompt of {length}", could_not, measure)
        free(place.device)
