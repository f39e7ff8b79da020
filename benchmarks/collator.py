"""Tokens per second of `SkipPositionDataCollator` against TRL's `DataCollatorForLanguageModeling` on the same rows.

    python benchmarks/collator.py

Both collate the same batch in turn in one process; times are CPU time of that thread, so that a busy machine disturbs
them little, and a ratio is one of medians. Every document has two turns, and every one is skipped. Rows are lists of
ints with a column of blocks, as the trainer prepares them: to turn them into tensors is most of TRL's time. The last
shape has rows that are arrays already (a data set in NumPy format), which cost TRL next to nothing, so that drawing
positions shows.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import transformers
import trl
from tqdm import tqdm
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_longalign import SkipPositionDataCollator


RESULTS = Path(__file__).parent / "results" / "collator.json"
TARGET_LENGTH = 65_536
STRATEGIES = ("none", "skip_all", "pose", "cream", "randpos")


class Shape(NamedTuple):
    """A batch: rows, tokens of a row, mean tokens of a document (`None`: padded, a row is a document), kind of row."""

    rows: int
    length: int
    mean: int | None = None
    arrays: bool = False


SHAPES = {
    "padded 8 x 512": Shape(8, 512),
    "padded 32 x 2048": Shape(32, 2048),
    "packed 8k, documents of 512": Shape(1, 8192, 512),
    "packed 32k, documents of 512": Shape(1, 32_768, 512),
    "packed 32k, documents of 128": Shape(1, 32_768, 128),
    "packed 4 x 8k, documents of 1k": Shape(4, 8192, 1024),
    "packed 32k, 512, as arrays": Shape(1, 32_768, 512, arrays=True),
}


def document(rng: random.Random, length: int) -> dict[str, Any]:
    """Token ids, labels and blocks of two turns: instruction, response, instruction, response."""
    ids = [rng.randrange(150_000) for _ in range(length)]
    cuts = sorted(rng.sample(range(1, length), 3))
    labels = [-100] * length
    labels[cuts[0] : cuts[1]] = ids[cuts[0] : cuts[1]]
    labels[cuts[2] :] = ids[cuts[2] :]
    edges = [0, *cuts, length]
    blocks = [value for value, (a, b) in zip((0, 3, 0, 3), pairwise(edges), strict=True) for _ in range(b - a)]
    return {"input_ids": ids, "labels": labels, "blocks": blocks}


def make_rows(rng: random.Random, shape: Shape) -> list[dict[str, Any]]:
    """The rows of a batch; padded rows hold between a half and all of `length` tokens."""
    if shape.mean is None:
        return [document(rng, rng.randint(shape.length // 2, shape.length)) for _ in range(shape.rows)]
    rows = [packed_row(rng, shape.length, shape.mean) for _ in range(shape.rows)]
    return [{key: numpy.array(value) for key, value in row.items()} for row in rows] if shape.arrays else rows


def packed_row(rng: random.Random, length: int, mean: int) -> dict[str, Any]:
    """A full row of documents of half to three halves of the mean length."""
    row: dict[str, Any] = {"input_ids": [], "labels": [], "blocks": [], "seq_lengths": []}
    while len(row["input_ids"]) < length:
        left = length - len(row["input_ids"])
        size = rng.randint(mean // 2, mean * 3 // 2)
        size = left if left - size < mean // 2 else size
        for name, values in document(rng, size).items():
            row[name] += values
        row["seq_lengths"].append(size)
    return row


def medians(collators: list[Any], rows: list[dict[str, Any]], rounds: int) -> list[float]:
    """Median CPU seconds of each collator over the same rows, taken in turn."""
    times: list[list[float]] = [[] for _ in collators]
    for _ in range(rounds):
        for collator, own in zip(collators, times, strict=True):
            start = time.thread_time()
            collator(rows)
            own.append(time.thread_time() - start)
    return [statistics.median(own[rounds // 10 :]) for own in times]


def measure(rounds: int) -> list[dict[str, Any]]:
    """One result per shape and strategy."""
    rng = random.Random(0)
    results = []
    for name, shape in tqdm(SHAPES.items(), desc="shapes"):
        rows = make_rows(rng, shape)
        packed = shape.mean is not None
        theirs = DataCollatorForLanguageModeling(0, padding_free=packed)
        ours = [
            SkipPositionDataCollator(
                0, target_length=TARGET_LENGTH, strategy=strategy, skip_probability=1.0, padding_free=packed
            )
            for strategy in STRATEGIES
        ]
        trl_seconds, *seconds = medians([theirs, *ours], rows, rounds)
        tokens = sum(len(row["input_ids"]) for row in rows)
        for strategy, own in zip(STRATEGIES, seconds, strict=True):
            results.append(
                {
                    "shape": name,
                    "documents": sum(len(row.get("seq_lengths", [0])) for row in rows),
                    "strategy": strategy,
                    "tokens_per_second": round(tokens / own),
                    "trl_tokens_per_second": round(tokens / trl_seconds),
                    "milliseconds": round(own * 1e3, 3),
                    "trl_milliseconds": round(trl_seconds * 1e3, 3),
                    "ratio": round(own / trl_seconds, 3),
                }
            )
    return results


def machine() -> dict[str, Any]:
    """What a reader must know to compare."""
    return {
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """Name of the CPU where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how often each collator collates each batch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(arguments.rounds)
    print(f"{'batch':32} {'docs':>5} {'strategy':9} {'Mtok/s':>8} {'TRL':>8} {'ms':>8} {'TRL':>8} {'ratio':>6}")
    for row in results:
        print(
            f"{row['shape']:32} {row['documents']:5} {row['strategy']:9} {row['tokens_per_second'] / 1e6:8.1f} "
            f"{row['trl_tokens_per_second'] / 1e6:8.1f} {row['milliseconds']:8.2f} {row['trl_milliseconds']:8.2f} "
            f"{row['ratio']:6.2f}"
        )
    report = {"machine": machine(), "target_length": TARGET_LENGTH, "skip_probability": 1.0, "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
