"""The process that the tests kill while its batches are under way: two requests for each seed.

python batch_client.py FOLDER SEEDS URL
"""

import json
import sys
from functools import partial
from pathlib import Path

from hf_longalign.endpoint import BatchGenerator, HostedBatches
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.runner import Runner

from .kill_client import job


def run(folder, seeds, url, budget=None):
    """Ask for the seeds and write their rows; also the target of a process that is forked."""
    generator = BatchGenerator("tiny", HostedBatches(url, poll_seconds=0.02), linger=0.05)
    with Journal(folder / "journal.sqlite") as journal:
        rows = Runner(generator, journal, budget=budget or Budget()).run(partial(job, n) for n in range(seeds))
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
