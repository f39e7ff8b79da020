"""What the recipe and the trainer write goes to the Hub and comes back through the real clients, the same."""

import json
import sys
from pathlib import Path

import forked
from loopback_hub import Hub
from tiny import tiny_tokenizer

from hub.conftest import held


TESTS = Path(__file__).parents[1]
PRIVATE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def run(hub, tmp_path, *command):
    environment = hub.environment(tmp_path / "home")
    done = forked.run([sys.executable, *command], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def synthesise(hub, tmp_path):
    """A data set, written and published by the recipe."""
    names = ("instruction", "answer", "context")
    rows = [(f"What is sold in town {n}?", f"ware {n}", f"Town {n} sells ware {n}. " * 5) for n in range(6)]
    pairs = [dict(zip(names, row, strict=True)) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [TESTS.parent / "recipes" / "synthesize.py", "--seeds", tmp_path / "pairs.jsonl", "--min_words", 5]
    command += ["--n_distractors", 2, "--checks", "support", "--cache_dir", tmp_path / "cache"]
    output = run(
        hub, tmp_path, *command, "--output_dir", tmp_path / "rows", "--push_to_hub", "--hub_model_id", "user/rows"
    )
    assert f"{hub.url}/datasets/user/rows" in output
    return tmp_path / "rows"


def test_data_set_and_adapter_come_back_the_same(tmp_path):
    with Hub() as hub:
        folder = synthesise(hub, tmp_path)
        pushed, local = hub.files("user/rows"), held(folder)
        assert pushed.keys() == local.keys()
        assert all(pushed[name] == local[name] for name in local if name != "README.md")
        output = run(hub, tmp_path, TESTS / "publish_client.py", folder, tmp_path)
        found = json.loads(output.splitlines()[-1])
        assert found["rows"] > 0 and found["whole"] and found["streamed"]
        assert found["url"] == f"{hub.url}/user/adapter"
        assert found["tensors"] and found["restored"] and found["plain_differs"]
        assert "must have the weights its adapter was trained on" in found["refused"]
        assert found["tokenizer"] == tiny_tokenizer()("Ardel").input_ids
        files = hub.files("user/adapter", "models")
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
        assert {"adapter_model.safetensors", "longalign_config.json", "tokenizer.json", "README.md"} <= files.keys()
        assert {name for name in files if "/" in name} == {"assets/coverage.png"} and not set(PRIVATE) & set(files)
        assert not any(str(tmp_path).encode() in data for data in files.values())
        named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(tmp_path / "base")  # the user's own folder is as it was
