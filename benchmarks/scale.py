"""Does a row cost the same among 2,000 and among 200,000? Time and memory of the stages of a synthesis.

    python benchmarks/scale.py --output benchmarks/results/scale.json

Made-up pairs with contexts of 120 words, each stage in a process of its own. `journal` claims and puts a reply for
every row and gets it again; `ask` takes every seed through the pipeline and a generator that answers at once, into the
outcomes on disk; `given` checks contexts that come with the seeds; `compose` makes 1,000 rows of 10 contexts out of
all of them, once what a process needs for it is set up. Memory is the peak above that of the imports; CPU time is what
counts where the machine is shared.
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
from pathlib import Path
from typing import Any

from hf_longalign.endpoint.protocol import Reply, Request
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.journal import Journal


WORDS = 120
COMPOSED = 1000
STAGES = ("journal", "ask", "given", "compose")
NAMES = [
    f"{first}{last}" for first in ("Ar", "Bel", "Cor", "Dun", "El", "Fen") for last in ("ford", "by", "wick", "ton")
]


def make_context(number: int, rng: random.Random) -> str:
    """A text of dam `number` that resembles no other one."""
    stones = " ".join(f"Stone {rng.randrange(10**6)} lies beside {rng.choice(NAMES)}." for _ in range(WORDS // 5))
    return f"The dam of village {number} was finished by {rng.choice(NAMES)} in {number}. {stones}"


def write_seeds(path: Path, rows: int, *, given: bool) -> None:
    """Write so many pairs, with their contexts where they are given."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            pair = {"instruction": f"When was the dam of village {number} finished?", "answer": str(number)}
            file.write(json.dumps(pair | ({"context": make_context(number, rng)} if given else {})) + "\n")


class Instant:
    """A generator that answers at once: what is measured is everything around it."""

    model, concurrency = "instant", 64

    async def check(self) -> None:
        """Nothing to check."""

    async def reply(self, request: Request, notify: Any = None) -> Reply:
        """The context that the prompt asks for."""
        number = int(request.messages[-1][1].split("village ")[1].split(" ")[0])
        return Reply(f"Context: {make_context(number, random.Random(number))}", "stop", 200, WORDS, self.model)

    def drain(self) -> None:
        """Nothing waits."""

    async def close(self) -> None:
        """Nothing to close."""


def make_builder(folder: Path, **options: Any) -> ContextSynthesisBuilder:
    """The builder of all stages but the first."""
    return ContextSynthesisBuilder(
        cache_dir=folder, seeds=str(folder / "seeds.jsonl"), checks=["length", "support"], min_words=10,
        show_progress=False, **options,
    )  # fmt: skip


def run(stage: str, folder: Path, rows: int) -> None:
    """Do one of the stages that handle every row."""
    if stage != "journal":
        make_builder(folder, **({"generator": Instant()} if stage == "ask" else {})).prepare_outcomes()
        return
    text = make_context(0, random.Random(0))
    with Journal(folder / "journal.sqlite") as journal:
        for request in (Request((("user", f"{number} {text}"),), "model") for number in range(rows)):
            journal.claim(request, Budget())
            journal.put(request, Reply(text, "stop", 200, WORDS, "model"))
            assert journal.get(request.key)


def measure(stage: str, folder: Path, rows: int) -> dict[str, float]:
    """Time and memory of a stage, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, handled, found = time.process_time(), rows, {}
    if stage == "compose":
        files = make_builder(folder).files
        files.row("chat", 0)
        found["setup_cpu_s"] = round(time.process_time() - start, 2)
        start, handled = time.process_time(), COMPOSED
        for number in range(0, rows, rows // COMPOSED):
            files.row("chat", number)
    else:
        run(stage, folder, rows)
    cpu = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**found, "cpu_ms_per_row": round(1e3 * cpu / handled, 3), "peak_mb": round(peak / 1024)}


def main() -> None:
    """Measure every stage at every size, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]), args.rows[0])))
        return
    machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    results: dict[str, Any] = {"machine": machine}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for stage in args.stages:
                write_seeds(folder / "seeds.jsonl", rows, given=stage != "ask")
                command = [sys.executable, __file__, "--one", stage, name, "--rows", str(rows)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results.setdefault(stage, {})[str(rows)] = json.loads(done.stdout.splitlines()[-1])
                print(stage, rows, results[stage][str(rows)], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
