"""Answering a grid of needle questions: `LocalGenerator` against naive `generate`, one prompt after another.

    python benchmarks/generation.py                    # on the GPU if there is one, else on the CPU
    python benchmarks/generation.py --model FOLDER     # a real model and the suite's own single needles

Both answer the same prompts with the same model in turn in one process, so that noise meets both: a haystack, the same
for all lengths and depths of a sample, with a needle put in and a question after it. What counts is the ratio, `x`.
`cached` is the share of prompt tokens that were not computed; `equal` the share of answers that are the same, token
for token, which rounding lets fall short of 1 in half precision, above all with random weights. The last row asks all
lengths at once (not of a real model, for the time). On a CPU times are CPU seconds, which other work on the machine
lengthens less; on CUDA they are wall-clock, and peak memory is what torch allocated at most beside the weights.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.haystack import noise
from hf_longalign.evaluation.needles import needle_prompts
from hf_longalign.evaluation.prompt import Prompt, encode_text, token_counter


RESULTS = Path(__file__).parent / "results"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEW_TOKENS = 24
WORDS = 8192
CPU_MODEL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
GPU_MODEL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
CPU_GRID = {1024: 4, 2048: 2, 4096: 1}  # samples by length
GPU_GRID = {4096: 8, 16_384: 4, 65_536: 2, 131_072: 1}
REAL_GRID = {1024: 4, 4096: 2, 8192: 1}


def build_model(device: str) -> LlamaForCausalLM:
    """Make a Llama from config: about 0.5B parameters on CUDA, 8 million on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **(GPU_MODEL if device == "cuda" else CPU_MODEL),
        num_key_value_heads=2,
        vocab_size=151_936 if device == "cuda" else WORDS,
        max_position_embeddings=131_072,
        initializer_range=0.1,  # so that answers depend on the prompt
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation="sdpa",
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )
    return LlamaForCausalLM(config).to(device, config.dtype).eval()


def build_tokenizer(vocabulary: int = WORDS) -> PreTrainedTokenizerFast:
    """Words are numbers, one token each."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def build_prompts(length: int, samples: int) -> list[Prompt]:
    """Prompts of one length over all depths; a sample's share the haystack up to the shallower needle."""
    rng = random.Random(length)
    prompts = []
    for sample in range(samples):
        haystack = random.Random(sample).choices(range(WORDS), k=length - NEW_TOKENS - 24)
        needle, question = rng.choices(range(WORDS), k=12), rng.choices(range(WORDS), k=12)
        for depth in DEPTHS:
            cut = round(depth * len(haystack))
            text = " ".join(map(str, [*haystack[:cut], *needle, *haystack[cut:], *question]))
            prompts.append(
                Prompt("needle", "single", sample, text, ("",), NEW_TOKENS, chat=False, length=length, depth=depth)
            )
    return prompts


def needles(tokenizer: PreTrainedTokenizerFast, length: int, samples: int) -> list[Prompt]:
    """The needle suite's prompts for a real model, through its chat template."""
    count, grid = token_counter(tokenizer, chat=True), {"lengths": [length], "depths": DEPTHS, "samples": samples}
    return list(needle_prompts(haystack=noise(), count=count, tasks=["single"], max_new_tokens=NEW_TOKENS, **grid))


def answer_naively(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> list[tuple[str, int]]:
    """Answer one prompt after another through `generate`: texts and their numbers of tokens."""
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=ends)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([encode_text(tokenizer, prompt.text, chat=prompt.chat)], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        written = output[0, ids.shape[1] :]
        answers.append((tokenizer.decode(written, skip_special_tokens=True), len(written)))
    return answers


def measured(answer: Any) -> tuple[Any, float, int]:
    """What a function returns, its seconds, and on CUDA the bytes it allocated at most."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = clock()
    result = answer()
    if cuda:
        torch.cuda.synchronize()
    return result, clock() - start, torch.cuda.max_memory_allocated() - before if cuda else 0


def compare(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    repeats: int,
    batch_tokens: int,
) -> dict[str, Any]:
    """Answer prompts by both, in turn."""
    naive_times, own_times, ratios = [], [], []
    for _ in range(repeats):
        expected, naive, naive_peak = measured(lambda: answer_naively(model, tokenizer, prompts))
        generator = LocalGenerator(model, tokenizer, batch_tokens=batch_tokens)
        found, own, own_peak = measured(lambda generator=generator: dict(generator.generate(prompts)))
        naive_times.append(naive)
        own_times.append(own)
        ratios.append(naive / own)
    tokens = generator.stats.prompt_tokens + generator.stats.generated_tokens
    answered = [(found[prompt].text, found[prompt].tokens) for prompt in prompts]
    equal = sum(own == naive for own, naive in zip(answered, expected, strict=True))
    return {
        "lengths": sorted({prompt.length for prompt in prompts}),
        "prompts": len(prompts),
        "tokens_per_second": round(tokens / statistics.median(own_times)),
        "naive_tokens_per_second": round(tokens / statistics.median(naive_times)),
        "times_faster": round(statistics.median(ratios), 2),
        "cached": round(generator.stats.cached_tokens / generator.stats.prompt_tokens, 3),
        "equal": round(equal / len(prompts), 3),
        "peak_mib": round(own_peak / 2**20),
        "naive_peak_mib": round(naive_peak / 2**20),
    }


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model to take instead of a random one, in float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="how often each side answers each grid")
    parser.add_argument("--batch_tokens", type=int, default=65_536, help="as in `LocalGenerator`")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = round(os.getloadavg()[0], 1)
    if options.model:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        cases = [needles(tokenizer, length, samples) for length, samples in REAL_GRID.items()]
    else:
        model, tokenizer = build_model(device), build_tokenizer()
        grid = GPU_GRID if device == "cuda" else CPU_GRID
        cases = [build_prompts(length, samples) for length, samples in grid.items()]
    answer_naively(model, tokenizer, cases[0][:1])  # warm-up
    # All lengths at once as a case of their own: what they share is read once.
    rounds = cases if options.model else [*cases, [prompt for case in cases for prompt in case]]
    rows = []
    print(
        f"{'lengths':>15}{'prompts':>9}{'tokens/s':>10}{'naive':>9}{'x':>7}{'cached':>8}{'equal':>7}{'MiB':>8}{'naive':>8}"
    )
    for prompts in rounds:
        row = compare(model, tokenizer, prompts, options.repeats, options.batch_tokens)
        rows.append(row)
        shown = "-".join(map(str, dict.fromkeys((row["lengths"][0], row["lengths"][-1]))))
        print(
            f"{shown:>15}{row['prompts']:>9}{row['tokens_per_second']:>10}{row['naive_tokens_per_second']:>9}"
            f"{row['times_faster']:>7}{row['cached']:>8}{row['equal']:>7}{row['peak_mib']:>8}{row['naive_peak_mib']:>8}"
        )
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "cpu_count": os.cpu_count(),
        "load_average_before": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    settings = {"depths": DEPTHS, "new_tokens": NEW_TOKENS, "batch_tokens": options.batch_tokens}
    report = {"machine": machine, "settings": settings, "repeats": options.repeats, "rows": rows}
    output = options.output or RESULTS / f"generation_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
