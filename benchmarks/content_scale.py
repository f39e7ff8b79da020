"""What a row costs as the number of seeds grows: time and memory of every step on given contexts.

    python benchmarks/content_scale.py --output benchmarks/results/content_scale.json

Made-up seeds of eight tasks in turns, with contexts of about 300 words (drawn from a Zipf distribution over 20,000
made-up words), are read from a JSONL file, checked, searched for near-duplicates and composed among 9 distractors,
half of them the nearest by BM25. Reading, duplicates, words and nearest texts are measured over all rows, checks and
composing over 2,000 of them, next to a pool of all. Every size runs in a process of its own. CPU time of all
processes is what counts where the machine is shared; memory is the most that was resident, mapped files included. The
checks see the same 2,000 texts at every size: what they differ by is what other work on the machine adds.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_longalign.synthesis.chat import Composer
from hf_longalign.synthesis.checks import DEFAULT_CHECKS, Rules
from hf_longalign.synthesis.disk import read_table, write_table
from hf_longalign.synthesis.outcome import features, outcome_row
from hf_longalign.synthesis.pool import Pool, by_bm25, nearest
from hf_longalign.synthesis.seeds import read_seeds
from hf_longalign.synthesis.selection import Duplicates
from hf_longalign.synthesis.tokens import ControlTokens
from hf_longalign.synthesis.writer import Plan, check_given


TASKS = ("narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news")
SAMPLE = 2000


def write_seeds(path: Path, count: int) -> None:
    """Write seeds whose contexts hold their answers."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 20_000)])
    cumulated = np.cumsum(1 / np.arange(1, len(words) + 1))
    with path.open("w") as file:
        for number in range(count):
            size = int(np.clip(rng.lognormal(np.log(270), 0.45), 60, 2000))
            drawn = words[np.searchsorted(cumulated, rng.random(size + 8) * cumulated[-1])].tolist()
            text = ". ".join(" ".join(drawn[start : start + 15]).capitalize() for start in range(8, size, 15))
            row = {"instruction": " ".join(drawn[:8]) + "?", "answer": " ".join(drawn[20:22]), "context": text + "."}
            file.write(json.dumps({**row, "task": TASKS[number % len(TASKS)], "id": str(number)}) + "\n")


def timed(work: Callable[[], Any], rows: int) -> tuple[Any, dict[str, float]]:
    """Return the result of `work`, and what a row of it took: CPU and wall time in ms, memory so far in kB."""
    cpu, wall = _cpu(), time.perf_counter()
    result = work()
    cpu, wall = _cpu() - cpu, time.perf_counter() - wall
    return result, {"cpu_ms_per_row": round(1000 * cpu / rows, 3), "wall_ms_per_row": round(1000 * wall / rows, 3)}


def _cpu() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Do every step with `count` seeds."""
    source = folder / "seeds.jsonl"
    write_seeds(source, count)
    control, found = ControlTokens(), {}
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, found["read"] = timed(lambda: read_seeds(str(source), control=control), count)
    seeds = read.seeds
    rules = Rules(tuple(DEFAULT_CHECKS), 20, None, None, control)
    plan = Plan("documents", "", None, rules)  # type: ignore[arg-type] # nobody is asked
    _, found["check"] = timed(lambda: [check_given(seed, plan) for seed in seeds[:SAMPLE]], min(count, SAMPLE))
    contexts = [seed.context or "" for seed in seeds]
    _, found["duplicates"] = timed(lambda: Duplicates().find(contexts), count)
    columns = features("contexts")
    unchecked = Plan("documents", "", None, Rules(()))  # type: ignore[arg-type]
    rows = ({name: outcome_row(check_given(seed, unchecked))[name] for name in columns} for seed in seeds)
    _, found["write"] = timed(lambda: write_table(folder / "t.arrow", rows, columns.arrow_schema), count)
    pool = Pool(read_table(folder / "t.arrow"), [], np.zeros(count, bool), folder)
    _, found["words"] = timed(lambda: pool.rivals, count)
    queries = [seed.instruction for seed in seeds]
    near, found["nearest"] = timed(lambda: nearest(pool, ["same_task"], by_bm25(pool, queries)), count)
    composer = Composer(pool, nearest=near, hard_share=0.5)
    chosen = np.random.default_rng(0).permutation(count)[:SAMPLE].tolist()
    _, found["compose"] = timed(lambda: [composer.row(index) for index in chosen], len(chosen))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = sum(step["cpu_ms_per_row"] for step in found.values())
    return {
        "rows": count,
        **found,
        "all_steps_cpu_ms_per_row": round(total, 3),
        "rows_per_cpu_s": round(1000 / total, 1),
        "resident_mb_at_start": round(start / 1024),
        "resident_mb": round(most / 1024),
        "resident_kb_per_row": round((most - start) / count, 1),
    }


def main() -> None:
    """Measure every size in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/content_scale.json"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.one, Path(folder))))
        return
    results = []
    for size in args.sizes:
        done = subprocess.run([sys.executable, __file__, "--one", str(size)], stdout=subprocess.PIPE, check=True)
        results.append(json.loads(done.stdout))
        print(json.dumps(results[-1], indent=2), flush=True)
    machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    args.output.write_text(json.dumps({"machine": machine, "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
