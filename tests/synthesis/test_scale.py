"""recipes/scale: shards as tasks of datatrove, on this machine, on Ray, and by Slurm's scripts; killed and resumed."""

import asyncio
import json
import os
import signal
import sqlite3
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import forked
import psutil
import pytest
from fake_endpoint import FakeEndpoint

from .fakes import make_pairs


pytest.importorskip("datatrove", reason="needs hf_longalign[scale]")

RECIPE = Path(__file__).parents[2] / "recipes" / "scale" / "synthesize.py"
SEEDS, BEFORE = 24, 9


class _Gate(FakeEndpoint):
    """Answers so many requests as it is let; the others wait, and those of a client that was killed are forgotten."""

    left, forgotten = 0, 0.0

    async def _play(self, writer, entry):
        while not self.left:
            await asyncio.sleep(0.01)
        if entry.arrived < self.forgotten:
            return False
        self.left -= 1
        return await super()._play(writer, entry)


def _arguments(folder, server, *more):
    seeds = folder / "pairs.jsonl"
    seeds.write_text("\n".join(map(json.dumps, make_pairs(SEEDS))))
    return [
        *("--generator", "openai", "--model", "tiny", "--endpoints", server.url, "--max_concurrency", "4"),
        *("--seeds", seeds, "--checks", "duplicate", "--n_distractors", "3", "--cache_dir", folder / "cache", *more),
    ]


def _rows(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "chat").iterdir())}


def _launch(folder, server, kind, *more):
    ours = ("--executor", kind, "--tasks", "3", "--workers", "2", "--shards", folder / "shards")
    command = [sys.executable, RECIPE, *ours, *_arguments(folder, server, "--output_dir", folder / kind, *more)]
    return forked.Popen(command)


def _finish(process):
    output = "".join(process.communicate(timeout=200))
    assert process.returncode == 0, output
    return output


def _kill(process):
    # Ray's and datatrove's processes are no group.
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)
    process.communicate()


def _journaled(folder):
    """How many replies the journals of the shards hold."""
    found = 0
    for path in folder.glob("cache/context_synthesis/shards/*.sqlite"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            # A file that was opened a moment ago has no tables yet.
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'totals'").fetchone():
                found += connection.execute("SELECT replies FROM totals").fetchone()[0]
    return found


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """The rows of a run in one process."""
    from hf_longalign.cli import main

    folder = tmp_path_factory.mktemp("one")
    with FakeEndpoint() as server:
        arguments = _arguments(folder, server, "--output_dir", folder / "out")
        assert main(["synthesize", *map(str, arguments)]) == 0
        assert len(server.log) == SEEDS
    return _rows(folder / "out")


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_shards_that_are_killed_go_on_and_compose_the_rows_of_one_run(tmp_path, one_run, kind):
    if kind == "ray":
        pytest.importorskip("ray", reason="needs hf_longalign[scale]")
    with _Gate() as server:
        server.left = BEFORE
        process, deadline = _launch(tmp_path, server, kind), time.monotonic() + 120
        while _journaled(tmp_path) < BEFORE or len(server.log) < BEFORE + 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        _kill(process)
        server.forgotten, paid = time.monotonic(), {entry.prompt for entry in server.log if entry.answered}
        assert len(paid) == BEFORE and not (tmp_path / kind).exists()
        server.left = 10**6
        _finish(_launch(tmp_path, server, kind))
        assert all(server.asked()[prompt] == 1 for prompt in paid)
        assert sum(entry.answered is not None for entry in server.log) == SEEDS
        assert _rows(tmp_path / kind) == one_run
        if kind == "local":  # once more, composed otherwise, of the same replies
            _finish(_launch(tmp_path, server, kind, "--n_distractors", "2"))
            assert _rows(tmp_path / kind) != one_run
            assert sum(entry.answered is not None for entry in server.log) == SEEDS


# Runs the tasks of a job in turn, at once; the jobs that only add up statistics are left out.
SBATCH = """
script="${!#}"
echo "$@" >> sbatch.log
if ! grep -q merge_stats "$script"; then
    last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
    for task in $(seq 0 "$last"); do
        SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node1 bash "$script" >> slurm.log 2>&1 || exit 1
    done
fi
echo Submitted batch job 7
"""


def test_slurm_runs_what_its_scripts_say_each_task_with_its_own_endpoint(tmp_path, one_run, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("srun", 'shift 3\nexec "$@"'), ("scontrol", "echo node1")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    serve = f"{sys.executable} {RECIPE.parents[2] / 'tests' / 'fake_endpoint.py'} --latency 0 0 --port {{port}}"
    slurm = ("--tasks", "2", "--serve", serve, "--gpus_per_task", "4", "--partition", "night", "--time", "02:00:00")
    with FakeEndpoint() as unused:
        _finish(_launch(tmp_path, unused, "slurm", *slurm))
        assert not unused.log
    assert _rows(tmp_path / "slurm") == one_run
    scripts = [tmp_path / "shards" / "logs" / name / "launch_script.slurm" for name in ("shard-of-2", "compose-of-1")]
    for script, array in zip(scripts, ("0-1%2", "0-0%1"), strict=True):
        lines = script.read_text().splitlines()
        asked = {"array": array, "gpus": 4, "partition": "night", "time": "02:00:00", "nodes": 1}
        assert {f"#SBATCH --{name}={value}" for name, value in asked.items()} <= set(lines)
        assert lines[-1] == f"srun  -l -n 1 launch_pickled_pipeline {script.with_name('executor.pik')}"
    calls = (tmp_path / "sbatch.log").read_text().splitlines()
    assert ["--dependency=afterok:7" in call for call in calls] == [False, False, True, False]


@pytest.mark.parametrize("option", ["--dry_run", "--num_shards", "--push_to_hub"])
def test_what_belongs_to_the_command_line_is_refused(tmp_path, option, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    more = [option, *{"--num_shards": ["2"], "--push_to_hub": ["--hub_model_id", "me/contexts"]}.get(option, [])]
    _, output = (process := _launch(tmp_path, FakeEndpoint(), "local", *more)).communicate(timeout=100)
    assert process.returncode == 2 and f"`{option[2:]}` must be unset here" in output


def test_an_endpoint_that_does_not_start_is_an_error_that_names_it(tmp_path):
    process = _launch(tmp_path, FakeEndpoint(), "local", "--serve", "false", "--tasks", "1", "--workers", "1")
    _, output = process.communicate(timeout=100)
    assert process.returncode and "`--serve` must start an endpoint, got status 1 of 'false'" in output
