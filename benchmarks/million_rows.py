"""Does a row cost the same among 10,000 and among 1,000,000? Time, memory and disk of a synthesis in shards.

    python benchmarks/million_rows.py --output benchmarks/results/million_rows.json

Made-up pairs whose contexts of 100 words a generator writes at once: what is measured is everything around the model.
Each stage runs in a process of its own, over the files of the one before:

- `fill`: four shards, one after the other, through the pipeline into journals; each reads all seeds, keeps its own;
- `merge`: the four journals become one;
- `gather`: every context out of the journal, checked, the near-duplicates refused, into the outcomes on disk;
- `duplicates`: near-duplicates among the contexts alone, of which one in a thousand is planted;
- `nearest`: the closest contexts of every row by BM25;
- `compose`: 10,000 rows out of all of them, each filled up to 2,048 tokens, once what a process needs is set up.

The committed results are of two runs: `--rows 10000 100000 --engines 2000`, and `--rows 1000000` without `nearest`.
`compose` takes longer among a million, since few contexts are met again whose tokens are counted already: the same
rows once more, with all of them counted, take about the same among any number.

With `--engines` so many rows are composed by `datasets` on two processes, by two ranks of datatrove and by
`map_batches` of Ray Data too, and must be equal. Memory is the peak of one process above that of its imports; CPU
time, of all processes of a stage, is what counts where the machine is shared.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from composition import make_tokenizer
from datasets import Dataset
from transformers import AutoTokenizer

from hf_longalign import ContextSynthesisBuilder, merge_shards, run_shard
from hf_longalign.endpoint.protocol import Reply, Request
from hf_longalign.synthesis.disk import read_table
from hf_longalign.synthesis.files import Files
from hf_longalign.synthesis.selection import Duplicates
from hf_longalign.text import digest


SHARDS = 4
SENTENCES = 18
COMPOSED, TOKENS = 10_000, 2048
# What only looks at one text (the others take 4 ms, most of it the language) costs the same among any number.
CHECKS = ["length", "support", "duplicate", "conflict"]
PLANTED = 1000  # one in so many contexts repeats the one before it
NAMES = [
    f"{first}{last}" for first in ("Ar", "Bel", "Cor", "Dun", "El", "Fen") for last in ("ford", "by", "wick", "ton")
]


def make_context(number: int) -> str:
    """A text of village `number` that resembles no other one, but for the planted ones."""
    rng = random.Random(number - 1 if number % PLANTED == PLANTED - 1 else number)
    stones = (f"Stone {rng.randrange(10**6)} lies beside {rng.choice(NAMES)}." for _ in range(SENTENCES))
    return f"{' '.join(stones)} Village {number} finished the dam."


def write_seeds(path: Path, rows: int) -> None:
    """Write so many pairs."""
    with path.open("w") as file:
        for number in range(rows):
            pair = {"instruction": f"When did village {number} finish the dam?", "answer": str(number)}
            file.write(json.dumps(pair) + "\n")


class Instant:
    """A generator that answers at once, or refuses to be asked."""

    model, concurrency = "instant", 64

    def __init__(self, answers: bool = True) -> None:
        self.answers = answers

    async def check(self) -> None:
        """Nothing to check."""

    async def reply(self, request: Request, notify: Any = None) -> Reply:
        """The context that the prompt asks for."""
        assert self.answers, "everything stands in the journal"
        number = int(request.messages[-1][1].split("did village ")[1].split(" ")[0])
        return Reply(f"Context: {make_context(number)}", "stop", 200, 150, self.model)

    def drain(self) -> None:
        """Nothing waits."""

    async def close(self) -> None:
        """Nothing to close."""


def options(folder: Path, *, answers: bool = True, **more: Any) -> dict[str, Any]:
    """The options of the builder in every stage."""
    return {
        "generator": Instant(answers), "cache_dir": folder, "seeds": [str(folder / "seeds.jsonl")],
        "checks": CHECKS, "min_words": 50, "retries": 0, "tokenizer": str(folder / "tokenizer"),
        "show_progress": False, **more,
    }  # fmt: skip


def gathered(folder: Path, **more: Any) -> ContextSynthesisBuilder:
    """The builder of everything after the merge, which asks for nothing."""
    return ContextSynthesisBuilder(**options(folder, answers=False, **more), journal=folder / "shards/journal.sqlite")


def fill(folder: Path, rows: int) -> None:
    """Ask for every shard."""
    for index in range(SHARDS):
        run_shard(options(folder), folder / "shards", index, SHARDS)


def merge(folder: Path, rows: int) -> None:
    """Make one journal."""
    merge_shards(folder / "shards")


def gather(folder: Path, rows: int) -> None:
    """Write the outcomes."""
    builder = gathered(folder)
    builder.prepare_outcomes()
    assert builder.files.rejected.num_rows >= 0.99 * (rows // PLANTED)


def duplicates(folder: Path, rows: int) -> None:
    """Find what was planted."""
    (outcomes,) = folder.glob("context_synthesis/outcomes-*")
    contexts = [text for kind in ("accepted", "rejected") for text in
                read_table(outcomes / f"{kind}.arrow")["context"].to_pylist()]  # fmt: skip
    assert len(Duplicates().find(contexts)) >= 0.99 * (rows // PLANTED)


def nearest(folder: Path, rows: int) -> None:
    """Find the closest contexts of every row."""
    gathered(folder, hard_share=0.5).files.splits("chat")


def chosen(files: Files, number: int) -> list[int]:
    """The numbers of so many rows, spread over all."""
    accepted = files.accepted.num_rows
    return list(range(0, accepted, max(1, accepted // number)))[:number]


def generate(files: Files, rows: list[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of `chat`."""
    yield from (files.row("chat", number) for number in rows)


def by_datasets(files: Files, rows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Compose with `datasets`, on two processes."""
    of = {"files": files, "rows": rows}
    made = Dataset.from_generator(generate, gen_kwargs=of, num_proc=2, cache_dir=str(folder / "by-datasets"))
    return made.to_list()


def by_datatrove(files: Files, rows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Compose with two ranks of datatrove."""
    from datatrove.executor import LocalPipelineExecutor

    def step(data: Any, rank: int, world_size: int) -> None:
        with (folder / f"rank-{rank}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in generate(files, rows[rank::world_size]))

    LocalPipelineExecutor([step], tasks=2, logging_dir=str(folder / "datatrove")).run()
    found: list[Any] = [None] * len(rows)
    for rank in range(2):
        found[rank::2] = map(json.loads, (folder / f"rank-{rank}.jsonl").read_text().splitlines())
    return found


def by_ray(files: Files, rows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Compose with Ray Data; rows travel as JSON, since Ray's own columns would make arrays of the lists."""
    import ray

    def compose(batch: dict[str, Any]) -> dict[str, Any]:
        numbers = batch["item"].tolist()
        return {"item": numbers, "row": [json.dumps(row) for row in generate(files, numbers)]}

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    found = ray.data.from_items(rows).map_batches(compose, batch_size=500).take_all()
    ray.shutdown()
    return [json.loads(line["row"]) for line in sorted(found, key=lambda line: line["item"])]


ENGINES: dict[str, Callable[[Files, list[int], Path], list[dict[str, Any]]]] = {
    "datasets": by_datasets,
    "datatrove": by_datatrove,
    "ray": by_ray,
}


def compose(folder: Path, rows: int, engines: int = 0) -> dict[str, Any]:
    """Compose rows, and by other engines the same ones; what it returns is of the first without setting up."""
    files, found, start = gathered(folder, target_tokens=TOKENS).files, {}, cpu()
    files.splits("chat")
    files.row("chat", 0)
    found["setup_cpu_s"], start = round(cpu() - start, 2), cpu()
    numbers = chosen(files, COMPOSED)
    made = list(generate(files, numbers))
    assert all(0.98 * TOKENS <= row["total_tokens"] <= TOKENS for row in made)
    found |= {"composed": len(made), "compose_cpu_ms_per_row": round(1e3 * (cpu() - start) / len(made), 3)}
    start = cpu()
    assert sum(1 for _ in generate(files, numbers)) == len(made)
    found["again_cpu_ms_per_row"] = round(1e3 * (cpu() - start) / len(made), 3)
    if engines:
        numbers = chosen(files, engines)
        want = [digest(json.dumps(row, sort_keys=True)) for row in generate(files, numbers)]
        for name, engine in ENGINES.items():
            start, wall = cpu(), time.perf_counter()
            got = [digest(json.dumps(row, sort_keys=True)) for row in engine(files, numbers, folder)]
            assert got == want, f"{name} composes other rows"
            found[f"{len(got)} equal rows by {name}, wall_s"] = round(time.perf_counter() - wall, 1)
    return found


STAGES: dict[str, Callable[..., Any]] = {
    stage.__name__: stage for stage in (fill, merge, gather, duplicates, nearest, compose)
}


def cpu() -> float:
    """CPU seconds of this process and the ones it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(stage: str, folder: Path, rows: int, **more: Any) -> dict[str, Any]:
    """Do a stage in this process; what a row took of it."""
    AutoTokenizer.from_pretrained(folder / "tokenizer")  # with all that it imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, wall = cpu(), time.perf_counter()
    found = STAGES[stage](folder, rows, **more) or {}
    used, wall = cpu() - start, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "cpu_ms_per_row": round(1e3 * used / rows, 3), "rows_per_cpu_s": round(rows / used), "wall_s": round(wall, 1),
        "peak_mb": round(peak / 1024), "peak_kb_per_row": round(peak / rows, 2), "disk_mb": round(disk / 1e6), **found,
    }  # fmt: skip


def main() -> None:
    """Measure every stage at every size, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--engines", type=int, default=0, help="rows that every engine composes, at the first size")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/million_rows.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        more = {"engines": args.engines} if args.engines and args.one[0] == "compose" else {}
        print(json.dumps(measure(args.one[0], Path(args.one[1]), args.rows[0], **more)))
        return
    machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    # Sizes and stages that are not measured now stay as they are.
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    results["machine"] = machine
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            write_seeds(Path(name) / "seeds.jsonl", rows)
            make_tokenizer([make_context(number) for number in range(2000)]).save_pretrained(f"{name}/tokenizer")
            for stage in args.stages:
                command = [sys.executable, __file__, "--one", stage, name, "--rows", str(rows)]
                command += ["--engines", str(args.engines)] if rows == args.rows[0] else []
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results.setdefault(stage, {})[str(rows)] = json.loads(done.stdout.splitlines()[-1])
                print(stage, rows, results[stage][str(rows)], flush=True)
                args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
