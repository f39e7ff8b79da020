"""Time that `LongAlignSFTTrainer` takes to prepare a data set against TRL's `SFTTrainer` on the same rows.

    python benchmarks/preparation.py

Both build a trainer on the same rows in turn in one process, nothing cached; what is measured is the CPU time of
`_prepare_dataset`, which tokenises, builds labels, truncates and packs, and, on our side, finds the blocks. Ratios are
of medians.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from collator import machine
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer


RESULTS = Path(__file__).parent / "results" / "preparation.json"
MAX_LENGTH = 2048
CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}",
    "{{ '<|start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}",
)
SYLLABLES = (
    "ar",
    "ba",
    "cen",
    "do",
    "el",
    "fin",
    "gor",
    "ha",
    "in",
    "jo",
    "kal",
    "lem",
    "mo",
    "nu",
    "or",
    "pil",
    "que",
    "ras",
)
SHAPES = {  # kind of rows, words of their messages, options
    "chat": ("messages", (60, 120, 20, 120), {}),
    "chat, answers only": ("messages", (60, 120, 20, 120), {"assistant_only_loss": True}),
    "chat, packed": ("messages", (60, 120, 20, 120), {"packing": True}),
    "chat, answers only, packed": ("messages", (60, 120, 20, 120), {"packing": True, "assistant_only_loss": True}),
    "long chat of one turn": ("messages", (1200, 40), {}),
    "chat of 10 turns": ("messages", (30, 60) * 10, {}),
    "chat as prompt and completion": ("conversation", (200, 100), {}),
    "prompt and completion": ("prompt", (200, 100), {}),
    "text, packed": ("text", (300,), {"packing": True}),
}


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as most models have, trained on the words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")


def make_rows(kind: str, lengths: tuple[int, ...], words: list[str], count: int) -> Dataset:
    """Rows of TRL's formats; messages hold half to three halves of their mean number of words."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        texts = [" ".join(rng.choices(words, k=rng.randint(n // 2, n * 3 // 2))) for n in lengths]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        rows.append(
            {
                "messages": {"messages": messages},
                "conversation": {"prompt": messages[:-1], "completion": messages[-1:]},
                "prompt": {"prompt": texts[0], "completion": " " + texts[-1]},
                "text": {"text": texts[0]},
            }[kind]
        )
    return Dataset.from_list(rows)


def seconds(trainer_class: type, config: Any, model: Any, tokenizer: Any, rows: Dataset) -> float:
    """CPU seconds of the preparation alone."""
    spent = [0.0]

    class Timed(trainer_class):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any) -> Any:
            start = time.process_time()
            try:
                return super()._prepare_dataset(*args)
            finally:
                spent[0] += time.process_time() - start

    Timed(model, args=config, train_dataset=rows, processing_class=tokenizer)
    return spent[0]


def measure(count: int, rounds: int) -> list[dict[str, Any]]:
    """One result per shape."""
    rng = random.Random(1)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(3000)]
    tokenizer = make_tokenizer(words)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1, max_position_embeddings=65_536)
    )  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, lengths, options) in tqdm(SHAPES.items(), desc="shapes"):
            tokenizer.chat_template = MARKED if "assistant_only_loss" in options else CHATML
            rows = make_rows(kind, lengths, words, count)
            common = {"output_dir": folder, "max_length": MAX_LENGTH, "use_cpu": True, "bf16": False, **options}
            times: list[list[float]] = [[], []]
            for _ in range(rounds):
                # In turn, so that a busy machine slows down both.
                times[0].append(seconds(SFTTrainer, SFTConfig(**common), model, tokenizer, rows))
                times[1].append(seconds(LongAlignSFTTrainer, LongAlignSFTConfig(**common), model, tokenizer, rows))
            theirs, ours = map(statistics.median, times)
            results.append(
                {
                    "rows": name,
                    "trl_microseconds_per_row": round(theirs / count * 1e6),
                    "microseconds_per_row": round(ours / count * 1e6),
                    "ratio": round(ours / theirs, 3),
                }
            )
    return results


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="rows of each data set")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side prepares each data set")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    results = measure(arguments.rows, arguments.rounds)
    print(f"{'rows':32} {'µs/row':>8} {'TRL':>8} {'ratio':>6}")
    for row in results:
        numbers = f"{row['microseconds_per_row']:8} {row['trl_microseconds_per_row']:8} {row['ratio']:6.2f}"
        print(f"{row['rows']:32} {numbers}")
    report = {"machine": machine(), "rows": arguments.rows, "max_length": MAX_LENGTH, "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
