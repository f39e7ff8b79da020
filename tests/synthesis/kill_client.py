"""The process that the tests kill: two requests for each seed, the second made from the first reply.

python kill_client.py NAME FOLDER START:STOP:STEP BUDGET_TOKENS PATIENCE URL…
"""

import json
import sys
from functools import partial
from pathlib import Path

from hf_longalign.endpoint import BatchGenerator, HostedBatches, OpenAIGenerator
from hf_longalign.endpoint.protocol import Request, RunStopped, Sampling
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.runner import Runner


async def job(number, ask):
    sampling = Sampling(max_tokens=20, seed=number)
    outline = await ask(Request((("user", f"outline {number}"),), "tiny", sampling))
    section = await ask(Request((("user", f"section {number} of {outline.text}"),), "tiny", sampling))
    return [number, outline.text, section.text]


def run(name, folder, seeds, budget, patience, *urls):
    """Ask for the seeds of START:STOP:STEP and write their rows; also the target of a process that is forked."""
    generator = OpenAIGenerator("tiny", urls, max_concurrency=8, patience=float(patience))
    with Journal(folder / "journal.sqlite") as journal:
        runner = Runner(generator, journal, budget=Budget(tokens=int(budget) or None))
        try:
            rows = runner.run(partial(job, number) for number in range(*map(int, seeds.split(":"))))
        except RunStopped as reason:
            sys.exit(str(reason))
    (folder / f"rows-{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run_batches(folder, seeds, url):
    """The same for so many seeds, in batches; their rows go into `rows.json`."""
    generator = BatchGenerator("tiny", HostedBatches(url, poll_seconds=0.02), linger=0.05)
    with Journal(folder / "journal.sqlite") as journal:
        rows = Runner(generator, journal, budget=Budget()).run(partial(job, n) for n in range(seeds))
    (folder / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
