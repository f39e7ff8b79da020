"""What the journal costs: writing 100,000 replies one by one, opening it after a kill, and answering a rerun from it.

    python benchmarks/journal.py

A reply has 860 words (the mean of Qwen2.5-72B in the Context Synthesis paper), a prompt 250. The writer is killed
(SIGKILL) after the last reply, so that the next process opens the file as a crash leaves it. A rerun asks the runner
for every reply again: keys are computed anew, nothing is sent.
"""

import argparse
import datetime
import json
import os
import platform
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from hf_longalign.endpoint.protocol import Reply, Request
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.runner import Runner


RESULTS = Path(__file__).parent / "results" / "journal.json"
PROMPT_WORDS = 250
REPLY_WORDS = 860
PROMPT = " ".join(random.Random(1).choices([f"word{number}" for number in range(4096)], k=PROMPT_WORDS))


def make_request(number: int) -> Request:
    """The request of a seed: the same in every process."""
    return Request((("system", "You write texts."), ("user", f"{number} {PROMPT}")), "model")


def write(path: Path, number: int) -> None:
    """Claim and put every reply, print the times of each in seconds, and die."""
    text = " ".join(random.Random(0).choices(PROMPT.split(), k=REPLY_WORDS))
    journal, budget = Journal(path), Budget()
    claims, puts = [], []
    for request in map(make_request, range(number)):
        _ = request.key
        start = time.perf_counter()
        journal.claim(request, budget)
        claimed = time.perf_counter()
        journal.put(request, Reply(text, "stop", PROMPT_WORDS, REPLY_WORDS, "model"))
        puts.append(time.perf_counter() - claimed)
        claims.append(claimed - start)
    print(json.dumps({"claim": summary(claims), "put": summary(puts)}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def summary(seconds: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in milliseconds."""
    ordered = sorted(seconds)
    middle, high = statistics.median(ordered), ordered[len(ordered) * 99 // 100]
    return {
        "mean_ms": round(1e3 * statistics.fmean(seconds), 4),
        "median_ms": round(1e3 * middle, 4),
        "p99_ms": round(1e3 * high, 4),
    }


class Nobody:
    """A generator that must not be asked."""

    model = "model"
    concurrency = 64

    async def close(self) -> None:
        """Nothing to close."""

    def drain(self) -> None:
        """Nothing to drain."""


async def ask_one(number: int, ask: Any) -> int:
    """A job: the length of the reply to one seed."""
    return len((await ask(make_request(number))).text)


def resume(path: Path, number: int) -> dict[str, float]:
    """Open the file as a crash left it and run every job again."""
    start = time.perf_counter()
    journal = Journal(path)
    opened = time.perf_counter()
    assert journal.totals().replies == number
    lengths = Runner(Nobody(), journal).run(partial(ask_one, index) for index in range(number))
    ended = time.perf_counter()
    assert len(lengths) == number
    closing = time.perf_counter()
    journal.close()
    return {
        "open_seconds": round(opened - start, 3),
        "rerun_seconds": round(ended - opened, 3),
        "close_seconds": round(time.perf_counter() - closing, 3),
    }


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the journal is made; by default the temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, arguments.replies)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "journal.sqlite"
        command = [sys.executable, __file__, "--write", str(path), "--replies", str(arguments.replies)]
        load = os.getloadavg()[0]
        written = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert written.returncode == -signal.SIGKILL
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        report = {
            "machine": {
                "cpu_count": os.cpu_count(),
                "load_average": round(load, 1),
                "python": platform.python_version(),
                "sqlite": sqlite3.sqlite_version,
                "date": datetime.date.today().isoformat(),
            },
            "replies": arguments.replies,
            "megabytes": round(size / 2**20),
            **json.loads(written.stdout),
            **resume(path, arguments.replies),
        }
    print(json.dumps(report, indent=2))
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
