"""Every launcher of `recipes/accelerate` and the Slurm script, on two CPU processes: the losses are those of one.

A file's CPU form is the file with two processes and without bf16; the command is told `--use_cpu true`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_recipe_sft import files  # noqa: F401 - a fixture

from distributed.test_engines import WORKER, free_port, needs_deepspeed


ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "recipes" / "accelerate"
STEPS = 2
# Where a command is launched as a module, the same command that lets accelerate shard on CPUs.
ACCELERATE = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
assert words.pop(0) == "launch"
with open(os.environ["RENDERED"], "a") as file:
    print(json.dumps(words), file=file)
place = words.index("-m")
assert words[place + 1] == "hf_longalign"
words[place : place + 2] = [{str(WORKER)!r}]
os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", *words])
"""
# Two machines on loopback: each has its own home and caches. Where one fails, the other would wait for it.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    mkdir -p "$NODES/$node/tmp"
    HOME=$NODES/$node HF_HOME=$NODES/$node/hf TMPDIR=$NODES/$node/tmp SLURM_NODEID=$node "$@" &
done
wait -n && wait -n || { kill $(jobs -p); exit 1; }
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames node[1-2]" ]] && printf '127.0.0.1\\nnode2\\n'
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A PATH with accelerate, srun and scontrol, and what a Slurm job of two machines with a GPU each is told."""
    folder = tmp_path_factory.mktemp("machine")
    for name, text in {"accelerate": ACCELERATE, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NODES": str(folder / "nodes"), "OMP_NUM_THREADS": "1",
        "RENDERED": str(folder / "rendered"), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": str(free_port()), "PYTHONPATH": f"{ROOT}",
    }  # fmt: skip


def run(command, files, output, environment, *options):  # noqa: F811
    """Run a command with the options of a short training, and return what it said."""
    words = ["--config", files / "config.yaml", "--output_dir", output, "--max_steps", STEPS, "--eval_steps", STEPS]
    # A row a batch: transformers averages over the batches of an evaluation, whatever their size.
    words += ["--use_cpu", "true", "--per_device_eval_batch_size", 1, *options]
    done = subprocess.run(
        [*map(str, command), *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def launch(name, *options):
    start = ["accelerate", "launch", "--config_file", LAUNCHERS / f"{name}.yaml", "--mixed_precision", "no"]
    return [*start, *options, "--main_process_port", free_port(), "-m", "hf_longalign", "sft"]


def losses(output):
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    keys = ("loss", "eval_loss", "grad_norm")
    return [row[key] for row in state["log_history"] for key in keys if key in row]


@pytest.fixture(scope="module")
def alone(files, machine):  # noqa: F811
    """What one process trains, launched by `single_gpu.yaml`."""
    output = files / "single_gpu"
    said = run(launch("single_gpu", "--cpu"), files, output, machine, "--gradient_accumulation_steps", 2)
    assert "ran on DistributedType.NO 1" in said
    return losses(output)


def test_sharded_over_two_processes(files, machine, alone):  # noqa: F811
    said = run(launch("fsdp2", "--num_processes", 2), files, files / "fsdp2", machine)
    assert said.count("ran on DistributedType.FSDP 2") == 2
    assert losses(files / "fsdp2") == pytest.approx(alone, rel=1e-5)


@needs_deepspeed
def test_sharded_by_deepspeed(files, machine, alone):  # noqa: F811
    options = ["--use_cpu", "false", "--ddp_backend", "gloo"]
    environment = {**machine, "DS_ACCELERATOR": "cpu"}
    said = run(launch("zero3", "--num_processes", 2), files, files / "zero3", environment, *options)
    assert said.count("ran on DistributedType.DEEPSPEED 2") == 2
    assert losses(files / "zero3") == pytest.approx(alone, rel=1e-5)


def test_two_machines_of_slurm(files, machine, alone, tmp_path):  # noqa: F811
    config = yaml.safe_load((LAUNCHERS / "multi_node.yaml").read_text())
    (tmp_path / "cpu_form.yaml").write_text(yaml.safe_dump({**config, "mixed_precision": "no"}))
    environment = {**machine, "ACCELERATE_CONFIG": str(tmp_path / "cpu_form.yaml"), "RENDERED": str(tmp_path / "told")}
    script = ROOT / "recipes" / "slurm" / "sft.sbatch"
    said = run(["bash", script], files, files / "slurm", environment)
    assert said.count("ran on DistributedType.FSDP 2") == 2
    assert losses(files / "slurm") == pytest.approx(alone, rel=1e-5)
    assert all((Path(machine["NODES"]) / node / "hf" / "datasets").is_dir() for node in "01"), "one cache for both"
    port = str(20000 + int(machine["SLURM_JOB_ID"]) % 10000)
    for rank, rendered in enumerate(sorted(map(json.loads, (tmp_path / "told").read_text().splitlines()))):
        assert rendered[: rendered.index("--config", 2)] == [
            "--config_file", str(tmp_path / "cpu_form.yaml"), "--num_machines", "2", "--num_processes", "2",
            "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
            "-m", "hf_longalign", "sft", "--resume_from_checkpoint", "auto",
        ]  # fmt: skip


def test_the_script_for_slurm_is_whole(tmp_path):
    script = ROOT / "recipes" / "slurm" / "sft.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    default = text.partition("ACCELERATE_CONFIG:-")[2].partition("}")[0]
    assert (ROOT / default).is_file()
    # One launcher a machine; what follows the first command is no option of Slurm's any more.
    assert (
        "#SBATCH --ntasks-per-node=1\n" in text.partition("set -e")[0] and "#SBATCH" not in text.partition("set -e")[2]
    )


def test_data_parallel_is_what_the_tests_launch():
    """`cpu.yaml`, which the tests of sft, synthesize and evaluate launch, is `ddp.yaml` in its CPU form."""
    cpu, ddp = (yaml.safe_load((LAUNCHERS / f"{name}.yaml").read_text()) for name in ("cpu", "ddp"))
    del ddp["downcast_bf16"]
    assert {**ddp, "num_processes": 2, "mixed_precision": "no"} == cpu
