"""Publishing a data set on a loopback Hub, with the real clients, over its faults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from loopback_hub import TOKEN, Hub

from hf_longalign.publish.dataset import publish_dataset


CARD = """---
configs:
- config_name: chat
  data_files:
  - split: train
    path: chat/train-*.parquet
---
# Rows
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def write(folder, values, shards=1):
    (folder / "chat").mkdir(parents=True)
    rows = Dataset.from_dict({"value": values})
    for index in range(shards):
        name = f"train-{index:05d}-of-{shards:05d}.parquet"
        rows.shard(shards, index, contiguous=True).to_parquet(folder / "chat" / name)
    (folder / "README.md").write_text(CARD)
    return folder


def environment_of(hub, tmp_path, token=TOKEN):
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_OFFLINE": "0",
    }


def publish(hub, folder, tmp_path, token=TOKEN):
    command = [sys.executable, str(Path(__file__).parent / "publish_client.py"), str(folder), "user/rows"]
    environment = environment_of(hub, tmp_path, token)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def held(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote(hub):
    return {name: data for name, data in hub.files("user/rows").items() if name != ".gitattributes"}


def test_a_data_set_comes_back_and_another_replaces_it_whole(hub, tmp_path):
    first, second = write(tmp_path / "a", [1, 2, 3], shards=3), write(tmp_path / "b", [4, 5])
    run = publish(hub, first, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["rows"] == [{"value": 1}, {"value": 2}, {"value": 3}] and found["same"]
    assert found["url"] == f"{hub.url}/datasets/user/rows"
    assert remote(hub) == held(first)
    run = publish(hub, second, tmp_path / "again")
    assert run.returncode == 0, run.stderr[-3000:]
    assert remote(hub) == held(second)
    assert len(hub.repos["user/rows"]) == 3  # its creation and one commit per push


@pytest.mark.parametrize("kind", ["500", "429", "reset", "lost"])
def test_faults_that_pass_leave_it_complete(hub, tmp_path, kind):
    hub.faults = {endpoint: [kind] for endpoint in ("create", "info", "tree", "preupload", "lfs", "commit")}
    folder = write(tmp_path / "a", [1, 2])
    run = publish(hub, folder, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert remote(hub) == held(folder)
    assert not any(hub.faults.values())


def test_a_hub_that_stays_down_leaves_it_as_it_was(hub, tmp_path):
    before = write(tmp_path / "a", [1, 2])
    assert publish(hub, before, tmp_path).returncode == 0
    hub.faults = {"commit": ["500"] * 100}
    run = publish(hub, write(tmp_path / "b", [3]), tmp_path)
    assert run.returncode != 0
    assert "run the same command again" in run.stderr
    assert remote(hub) == held(before)


def test_a_wrong_token_is_not_tried_again(hub, tmp_path):
    run = publish(hub, write(tmp_path / "a", [1]), tmp_path, token="hf_wrong")
    assert run.returncode != 0
    assert "The push to user/rows is not complete" in run.stderr and "401" in run.stderr
    assert hub.repos == {} and "commit" not in hub.seen


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"README.md and Parquet files, got"):
        publish_dataset(tmp_path, "user/rows")
    folder = write(tmp_path / "a", [1])
    (folder / "journal.sqlite").write_text("secret")
    with pytest.raises(ValueError, match=r"alone, got journal.sqlite"):
        publish_dataset(folder, "user/rows")


def test_the_recipe_publishes_what_it_wrote(hub, tmp_path):
    pairs = [
        {
            "instruction": f"What is sold in town {n}?",
            "answer": f"ware {n}",
            "context": f"Town {n} sells ware {n}. " * 5,
        }
        for n in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = Path(__file__).parents[1] / "recipes" / "synthesize.py"
    command = [sys.executable, str(recipe), "--seeds", str(tmp_path / "pairs.jsonl"), "--min_words", "5"]
    command += ["--n_distractors", "2", "--checks", "support", "--cache_dir", str(tmp_path / "cache")]
    command += ["--output_dir", str(tmp_path / "out"), "--push_to_hub", "user/rows"]
    run = subprocess.run(command, env=environment_of(hub, tmp_path), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"Published {hub.url}/datasets/user/rows" in run.stdout
    assert remote(hub) == held(tmp_path / "out")
    assert any(name.startswith("chat/") for name in remote(hub))
