"""What the tests kill while its batches are under way: two requests for each seed."""

import json
from functools import partial

from hf_longalign.endpoint import BatchGenerator, HostedBatches
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.runner import Runner

from .kill_client import job


def run(folder, seeds, url):
    """Ask for the seeds and write their rows."""
    generator = BatchGenerator("tiny", HostedBatches(url, poll_seconds=0.02), linger=0.05)
    with Journal(folder / "journal.sqlite") as journal:
        rows = Runner(generator, journal, budget=Budget()).run(partial(job, n) for n in range(seeds))
    (folder / "rows.json").write_text(json.dumps(rows))
