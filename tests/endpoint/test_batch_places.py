"""A command that answers batches: it ends with the run that started it."""

import asyncio
import os
import sys

import pytest

from hf_longalign.endpoint import CommandBatches


SLEEP = "import os, sys, time; print(os.getpid(), file=open(sys.argv[2], 'w'), flush=True); time.sleep(60)"


def test_a_run_that_stops_ends_its_command(tmp_path):
    batches = CommandBatches([sys.executable, "-c", SLEEP, "{input}", "{output}"], tmp_path)

    async def stop_in_the_middle():
        running = asyncio.create_task(batches.results(await batches.send("tag", b"{}")))
        while not (started := [path for path in tmp_path.glob("tag.*.part") if path.read_text()]):
            await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return int(started[0].read_text())

    process = asyncio.run(asyncio.wait_for(stop_in_the_middle(), 30))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert not (tmp_path / "tag.results.jsonl").exists()
