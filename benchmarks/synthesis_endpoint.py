"""How busy the runner keeps an endpoint, against one request after another.

    python benchmarks/synthesis_endpoint.py

The endpoint is scripted (tests/fake_endpoint.py, in a process of its own): 64 slots, a reply after 0.5 to 2 s, 429 for
every request beyond the slots. 1,600 seeds are asked for through journal and runner. "Busy while work is left" is the
share of all slot-seconds from the first arrival to the last one; "busy to the end" includes the last replies, during
which nothing is left to fill the slots with. One after another is measured with the plain client over 40 seeds.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai

from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import Request
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.runner import Progress, Runner


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "synthesis_endpoint.json"
SLOTS = 64
LATENCY = (0.5, 2.0)
PROMPT = "Write a context of about 2000 words for this question and its answer. " * 10


@contextmanager
def endpoint(slots: int) -> Iterator[str]:
    """The URL of a scripted server that runs meanwhile."""
    command = [sys.executable, ROOT / "tests" / "fake_endpoint.py", "--slots", str(slots), "--latency"]
    server = subprocess.Popen([*command, *map(str, LATENCY)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def stats(url: str) -> dict[str, Any]:
    """What the server has seen."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as answer:
        seen: dict[str, Any] = json.load(answer)
    return seen


async def job(number: int, compute_ms: float, ask: Any) -> int:
    """One seed: ask, then compute as verification does."""
    reply = await ask(Request((("user", f"{number} {PROMPT}"),), "tiny"))
    until = time.perf_counter() + compute_ms / 1e3
    while time.perf_counter() < until:
        hashlib.sha256(reply.text.encode()).hexdigest()
    return len(reply.text)


def busy_share(seen: list[dict[str, Any]], slots: int, *, to_the_end: bool) -> float:
    """Share of the slot-seconds in which a request was served."""
    starts = [start for one in seen for start in one["starts"]]
    ends = [end for one in seen for end in one["ends"]]
    until = max(ends) if to_the_end else max(starts)
    busy = sum(min(end, until) for end in ends) - sum(starts)
    return busy / (slots * (until - min(starts)))


def together(seeds: int, *, at_once: int = SLOTS, servers: int = 1, compute_ms: float = 0.0) -> dict[str, Any]:
    """All seeds through the runner; `at_once` is the client's limit for one endpoint."""
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.sqlite") as journal:
        stack = [endpoint(SLOTS // servers) for _ in range(servers)]
        urls = [server.__enter__() for server in stack]
        try:
            progress = Progress(seeds, show=True)
            runner = Runner(OpenAIGenerator("tiny", urls, max_concurrency=at_once), journal, progress=progress)
            start = time.perf_counter()
            runner.run(partial(job, number, compute_ms) for number in range(seeds))
            seconds = time.perf_counter() - start
            progress.close()
            seen = [stats(url) for url in urls]
        finally:
            for server in stack:
                server.__exit__(None, None, None)
    assert sum(one["answered"] for one in seen) == seeds
    return {
        "seeds": seeds,
        "endpoints": servers,
        "slots": SLOTS,
        "most_requests_per_endpoint": at_once,
        "compute_ms_per_seed": compute_ms,
        "seconds_with_start_up": round(seconds, 2),
        "seeds_per_second": round(seeds / seconds, 2),
        "busy_while_work_is_left": round(busy_share(seen, SLOTS, to_the_end=False), 4),
        "busy_to_the_end": round(busy_share(seen, SLOTS, to_the_end=True), 4),
        "refused_with_429": sum(one["refused"] for one in seen),
    }


def one_after_another(seeds: int) -> float:
    """Seeds per second of a loop around the client, as the paper's script has it."""
    with endpoint(SLOTS) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        start = time.perf_counter()
        for number in range(seeds):
            messages: Any = [{"role": "user", "content": f"{number} {PROMPT}"}]
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=4096)
        return seeds / (time.perf_counter() - start)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1600)
    parser.add_argument("--sequential", type=int, default=40, help="seeds asked one after another")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    sequential = one_after_another(arguments.sequential)
    results = [
        together(arguments.seeds),
        together(arguments.seeds, compute_ms=5.0),
        together(arguments.seeds, at_once=256),
        together(arguments.seeds, at_once=SLOTS // 2, servers=2),
    ]
    for result in results:
        result["ratio_to_one_after_another"] = round(result["seeds_per_second"] / sequential, 1)
    report = {
        "machine": {
            "cpu_count": os.cpu_count(),
            "load_average": round(load, 1),
            "python": platform.python_version(),
            "openai": openai.__version__,
            "date": datetime.date.today().isoformat(),
        },
        "latency_seconds": LATENCY,
        "one_after_another_seeds_per_second": round(sequential, 3),
        "results": results,
    }
    print(json.dumps(report, indent=2))
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
