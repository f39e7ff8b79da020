"""Two gloo processes train what one trains on the same global batch: losses, gradient norms, weights and record."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tiny import tiny_llama

from distributed import worker


WORKER = Path(worker.__file__)
SETTINGS = [name for name in worker.SETTINGS if not name.endswith("resumed")]
has_bitsandbytes = find_spec("bitsandbytes") is not None
has_deepspeed = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason='needs pip install "hf_longalign[deepspeed]"')
if not has_bitsandbytes:
    SETTINGS.remove("qlora-packed-sequence")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(base, jobs, **environment):
    """Run jobs one after the other on two processes."""
    (base / "jobs.json").write_text(json.dumps([{"base": str(base), **job} for job in jobs]))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2",
        "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), **environment,
    }  # fmt: skip
    logs = [(base / f"rank{rank}.log").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(base / "jobs.json")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        # Where one has failed, the other waits for it.
        while all(process.poll() is None for process in processes):
            try:
                processes[0].wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        if all(process.returncode in (None, 0) for process in processes):
            for process in processes:
                process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (base / f"rank{rank}.log").read_text()[-4000:]


def here(base, name, **options):
    """Train a setting in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    worker.train(base, "one", name, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model, and every setting trained by one process."""
    folder = tmp_path_factory.mktemp("engines")
    # bitsandbytes packs 4-bit weights for CPUs by rows of whole blocks.
    sizes = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}
    tiny_llama(**sizes).save_pretrained(folder / "model")
    for name in SETTINGS:
        here(folder, name)
    return folder


@pytest.fixture(scope="module")
def engines(base):
    """Every setting on every engine that needs no compiler, in one launch of two processes."""
    jobs = [{"engine": engine, "name": name, "processes": 2} for engine in ("ddp", "fsdp2") for name in SETTINGS]
    # Processes that share a model see the same rows.
    jobs += [{"engine": "tensor", "name": name} for name in SETTINGS if not name.startswith("qlora")]
    launch(base, jobs)
    return base


def logged(folder):
    """By step, what every engine must log alike."""
    log = json.loads((folder / "told.json").read_text())["log"]
    keys = ("loss", "grad_norm", "eval_loss", "skip_share", "skip_span_mean", "skip_distance_coverage", "num_tokens")
    return [{key: row[key] for key in keys if key in row} for row in log if "train_runtime" not in row]


def assert_same(folder, expected, tolerance=2e-5):
    """Losses, gradient norms, saved weights and the record are those of another run."""
    one, two = logged(expected), logged(folder)
    assert len(one) == len(two)
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    records = [json.loads((path / "longalign_config.json").read_text()) for path in (folder, expected)]
    for record in records:
        del record["run"]["seconds"], record["hardware"]
    assert records[0] == records[1]
    (path,) = expected.glob("*model.safetensors")
    weights, reference = load_file(folder / path.name), load_file(path)
    assert weights.keys() == reference.keys()
    for name, weight in reference.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=tolerance * weight.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("engine", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDP"), ("tensor", "")]
)
def test_two_processes_train_what_one_trains(engines, engine, wrapper, name):
    folder = engines / engine / name
    if engine == "tensor" and name.startswith("qlora"):
        pytest.skip("bitsandbytes' weights cannot be cut")
    assert json.loads((folder / "told.json").read_text())["engine"].startswith(wrapper)
    # Gradients of 4-bit weights go through bfloat16.
    assert_same(folder, engines / "one" / name, tolerance=0.01 if name.startswith("qlora") else 2e-5)
