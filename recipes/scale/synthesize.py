"""Context Synthesis on many machines: each shard is a task of datatrove, on this machine, by Slurm, or by Ray.

    python recipes/scale/synthesize.py --executor slurm --tasks 64 --workers 8 --shards /shared/run-1 \\
        --config recipes/synthesis/openai.yaml --seeds hotpotqa=/shared/pairs.jsonl --output_dir /shared/contexts

All other options are those of `hf-longalign synthesize`. The same command again goes on where it was stopped.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import dill
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from hf_longalign import ContextSynthesisBuilder, merge_shards, run_shard
from hf_longalign.commands.synthesize import SynthesizeArguments, builder_options, read
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.export import check_output


# Slurm's jobs load the steps from a file, without this module: with them goes what they call.
dill.settings["recurse"] = True


@contextmanager
def serving(command: str | None, args: SynthesizeArguments) -> Iterator[SynthesizeArguments]:
    """While the block lasts, run an endpoint of this task's own; gives the options to ask it with."""
    if command is None:
        yield args
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A session of its own: a server that starts processes ends with all of them.
    server = subprocess.Popen(shlex.split(command.replace("{port}", str(port))), start_new_session=True)
    try:
        while server.poll() is None:
            try:
                urlopen(f"http://localhost:{port}/v1/models").close()
                break
            except HTTPError:  # it answers, if only to ask for a key
                break
            except OSError:
                time.sleep(1)
        else:
            raise RuntimeError(f"`--serve` must start an endpoint, got status {server.returncode} of {command!r}.")
        yield replace(args, endpoints=[f"http://localhost:{port}/v1"])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


class ShardStep(PipelineStep):
    """Asks for part `rank` of `world_size` of the seeds, and puts the journal of its replies into `shards`."""

    type, name = "Context Synthesis", "shard"

    def __init__(self, args: SynthesizeArguments, options: SynthesisOptions, shards: str, serve: str | None) -> None:
        super().__init__()
        self.args, self.options, self.shards, self.serve = args, options, shards, serve

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Fill a journal on this machine's disk."""
        # Clients and keys are made here: neither can be sent to another machine.
        with self.track_time(), serving(self.serve, self.args) as args:
            run_shard(builder_options(args, self.options, world_size), self.shards, rank, world_size)


class ComposeStep(ShardStep):
    """Merges the shards, has written anew what nearly repeats another shard's context, and writes the data."""

    name = "compose"

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Write `output_dir`."""
        with self.track_time(), serving(self.serve, self.args) as args:
            builder = ContextSynthesisBuilder(**builder_options(args, self.options), journal=args.journal)
            merge_shards(self.shards, builder.pipeline.journal)  # on this machine's disk
            licenses = {"license": args.license, "seeds_license": args.seeds_license}
            builder.export(str(args.output_dir), num_proc=args.num_proc, **licenses)


def executor(ours: argparse.Namespace, step: PipelineStep, tasks: int, **more: object) -> PipelineExecutor:
    """Return what launches a step, as often as there are tasks."""
    # The number stands in the folder's name: rank 0 of another number is another part.
    common = {"pipeline": [step], "tasks": tasks, "logging_dir": f"{ours.shards}/logs/{step.name}-of-{tasks}", **more}
    common["workers"] = min(tasks, ours.workers)
    if ours.executor == "local":
        return LocalPipelineExecutor(**common)
    resources = {name: getattr(ours, name) for name in ("cpus_per_task", "gpus_per_task", "mem_per_cpu_gb")}
    if ours.executor == "ray":
        return RayPipelineExecutor(**common, **resources)
    name = f"{step.name}-contexts"
    return SlurmPipelineExecutor(**common, **resources, time=ours.time, partition=ours.partition, job_name=name)


def main() -> None:
    """Launch the shards, and after them the step that composes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local")
    parser.add_argument("--tasks", type=int, required=True, help="into how many shards the seeds are split")
    parser.add_argument("--workers", type=int, required=True, help="how many of them are asked for at once")
    parser.add_argument("--shards", required=True, help="a folder of this run alone that every machine sees")
    parser.add_argument(
        "--serve", help="what starts a task's own endpoint, with {port} for its port; unset: --endpoints"
    )
    parser.add_argument("--cpus_per_task", type=int, default=1, help="for Slurm and Ray")
    parser.add_argument("--gpus_per_task", type=int, default=0, help="for Slurm and Ray")
    parser.add_argument("--mem_per_cpu_gb", type=int, default=2, help="for Slurm and Ray")
    parser.add_argument("--partition", default="gpu", help="for Slurm")
    parser.add_argument("--time", default="24:00:00", help="for Slurm: the most that a task may take")
    ours, theirs = parser.parse_known_args()
    args, options, hub, _ = read(theirs)
    alone = {"dry_run": args.dry_run, "num_shards": args.num_shards > 1, "push_to_hub": hub.push_to_hub}
    if wrong := [name for name in alone if alone[name]]:
        parser.error(f"`{wrong[0]}` must be unset here. It is for `hf-longalign synthesize`, before or after this.")
    check_output(Path(str(args.output_dir)), Path(ours.shards))  # before anything is paid for
    if ours.executor == "ray":
        import ray

        ray.init()  # the cluster of RAY_ADDRESS, or one on this machine
    step = (args, options, ours.shards, ours.serve)
    shards = executor(ours, ShardStep(*step), ours.tasks)
    if ours.executor != "slurm":
        shards.run()
        # Ray's executor only warns of a task that failed, and would then wait for it forever.
        if left := shards.get_incomplete_ranks(skip_completed=True):
            sys.exit(f"{len(left)} of {ours.tasks} shards have stopped. Run the same command again to go on.")
    # Always, as other options may compose other rows of the same replies.
    executor(ours, ComposeStep(*step), 1, depends=shards, skip_completed=False).run()


if __name__ == "__main__":
    main()
