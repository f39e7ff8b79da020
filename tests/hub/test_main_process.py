"""Only the main process acts; the others wait longer than a collective would, and learn how it ended."""

import json
import os
import subprocess
import sys

import pytest

from hf_longalign.hub import on_main_process


CLIENT = """
import json, os, sys, time
from datetime import timedelta
import torch.distributed as dist
from hf_longalign.hub import on_main_process

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=timedelta(seconds=1))

def succeed():
    time.sleep(3)
    open(f"{folder}/acted-{rank}", "w").close()
    return "url"

def fail():
    raise ValueError("no right")

outcomes = []
for function in (succeed, fail):
    try:
        outcomes.append(on_main_process(function))
    except Exception as error:
        outcomes.append(f"{type(error).__name__}: {error}")
json.dump(outcomes, sys.stdout)
sys.stdout.flush()
os._exit(0)
"""


def test_the_others_wait_past_the_time_out_of_their_group(tmp_path):
    command = [sys.executable, "-c", CLIENT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outcomes = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert outcomes == [
        ["url", "ValueError: no right"],
        ["url", "RuntimeError: The main process failed: ValueError: no right"],
    ]
    assert [path.name for path in tmp_path.glob("acted-*")] == ["acted-0"]


def test_a_process_alone_just_acts():
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(KeyError):
        on_main_process(lambda: {}["missing"])
