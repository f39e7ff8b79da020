"""How fast samples are composed: 10 contexts each, and filled up to 128k tokens.

    python benchmarks/composition.py --output benchmarks/results/composition.json

1,600 seeds of eight tasks with made-up contexts of 600 words on average (words drawn from a Zipf distribution over
20,000 made-up words, lengths log-normal), a byte-level BPE tokenizer of 16,000 tokens trained on a part of them. One
process. CPU time is what counts where the machine is shared; wall time stands beside it.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_longalign.synthesis.builder import ContextSynthesisBuilder


TASKS = ("narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news")
CHAT_TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"


def make_seeds(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return seeds whose contexts hold their answers."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 20_000)]
    weights = 1 / np.arange(1, len(words) + 1)
    found = []
    for number in range(count):
        size = int(np.clip(rng.lognormal(np.log(540), 0.45), 100, 4000))
        drawn = [words[index] for index in rng.choice(len(words), size, p=weights / weights.sum())]
        sentences = [" ".join(drawn[start : start + 15]).capitalize() + "." for start in range(0, size, 15)]
        answer = " ".join(rng.choice(words, 2))
        sentences[int(rng.integers(len(sentences)))] += f" It was {answer}."
        question = " ".join(rng.choice(words, 8)).capitalize() + "?"
        task = TASKS[number * len(TASKS) // count]
        found.append({"instruction": question, "answer": answer, "task": task, "context": " ".join(sentences)})
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of `work`, its CPU seconds and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def measure(seeds: list[dict[str, str]], folder: str, **options: Any) -> dict[str, float]:
    """Verify the contexts, compose every row, and return the rates."""
    builder = ContextSynthesisBuilder(
        cache_dir=folder, seeds=seeds, min_words=50, checks=["length", "support", "duplicate", "conflict"],
        show_progress=False, **options,
    )  # fmt: skip
    _, outcome_cpu, _ = timed(builder.prepare_outcomes)
    _, cpu, wall = timed(lambda: builder.download_and_prepare())
    rows = builder.as_dataset(split="train")
    found = {
        "rows": len(rows),
        "contexts_per_row": float(np.mean(rows["n_contexts"])),
        "outcomes_cpu_s": round(outcome_cpu, 2),
        "compose_cpu_s": round(cpu, 2),
        "compose_wall_s": round(wall, 2),
        "rows_per_cpu_s": round(len(rows) / cpu, 2),
    }
    tokens = [count for count in rows["total_tokens"] if count is not None]
    if tokens:
        found["mean_tokens"] = round(float(np.mean(tokens)), 1)
        found["tokens_per_cpu_s"] = round(sum(tokens) / cpu)
    if options.get("target_tokens"):
        found["least_filled"] = round(min(tokens) / options["target_tokens"], 4)
    return found


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/composition.json"))
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    seeds = make_seeds(args.rows)
    tokenizer = make_tokenizer([seed["context"] for seed in seeds[::4]])
    with tempfile.TemporaryDirectory() as folder:
        fill = {"tokenizer": tokenizer, "distractor_sources": ["same_task", "other_tasks"]}
        results = {
            "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
            "10 contexts": measure(seeds, f"{folder}/1"),
            "10 contexts, tokens counted": measure(seeds, f"{folder}/2", tokenizer=tokenizer),
            "10 contexts, half of them hard": measure(seeds, f"{folder}/3", hard_share=0.5),
            "filled to 32,768 tokens": measure(seeds, f"{folder}/4", target_tokens=32_768, **fill),
            "filled to 131,072 tokens": measure(seeds, f"{folder}/5", target_tokens=131_072, **fill),
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
