"""`recipes/sft.py` as a user starts it: two processes, a kill, a resume, the adapter loaded back."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from loopback_hub import TOKEN, Hub
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny import chats, tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longalign.adapter import load_adapter
from hf_longalign.commands import sft
from hf_longalign.rope import scale_rope


RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = RECIPES / "sft.py"
STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, a JSONL file and the options that every run shares."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [json.dumps({"messages": messages}) + "\n" for messages in chats(48)]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "config.yaml").write_text(
        f"model_name_or_path: {folder / 'model'}\n"
        f"dataset_name: {folder / 'train.jsonl'}\n"
        "dtype: float32\nbf16: false\nuse_cpu: true\nreport_to: none\n"
        "use_peft: true\nlora_dropout: 0.0\nlora_target_modules: all-linear\n"
        "packing: true\nmax_length: 256\nassistant_only_loss: true\nloss_weighting: sequence\n"
        "skip_target_length: 1024\nskip_probability: 0.5\noptim: sgd\nlearning_rate: 2.0\nlogging_steps: 1\n"
        "save_steps: 2\n"
        f"max_steps: {STEPS}\nper_device_train_batch_size: 1\ntest_size: 0.1\neval_strategy: steps\neval_steps: 3\n"
        "disable_tqdm: true\ndataloader_num_workers: 1\n"
    )
    return folder


def start(files, output, *options, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        config = RECIPE.parent / "accelerate" / "cpu.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launcher, str(RECIPE), "--config", str(files / "config.yaml"), "--output_dir", str(output), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return forked.Popen(command, env=environment, start_new_session=True)


def finish(process):
    try:
        output = "".join(process.communicate(timeout=120))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    return output


def training_logs(output):
    """Loss and what the positions covered, by step."""
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    return {row["step"]: {key: row[key] for key in row if key == "loss" or "skip" in key} for row in rows}


def record(output):
    return json.loads((output / "longalign_config.json").read_text())


def parse(*arguments):
    return sft.read([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def uninterrupted(files):
    output = files / "whole"
    finish(start(files, output, "--gradient_accumulation_steps", "2"))
    return output


def test_killed_and_resumed_run_has_the_very_losses(files, uninterrupted):
    output = files / "killed"
    options = ("--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "auto")
    process = start(files, output, *options)
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(files, output, *options))
    assert training_logs(output) == training_logs(uninterrupted)
    resumed, whole = record(output), record(uninterrupted)
    assert whole["run"].pop("seconds") > 0
    assert resumed == whole  # which has no time: that of the killed part is not known


def test_two_processes_have_the_losses_and_positions_of_one(files, uninterrupted):
    output = files / "two"
    finish(start(files, output, processes=2))
    one, two = training_logs(uninterrupted), training_logs(output)
    assert sorted(one) == sorted(two) == list(range(1, STEPS + 1))
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5), step
    assert record(output)["coverage"] == record(uninterrupted)["coverage"]


def run(folder, *options):
    """The recipe in this process, on the shared configuration."""
    output = folder / "output"
    sft.run(*parse("--config", folder / "config.yaml", "--output_dir", output, "--max_steps", 2, *options))
    return output


def test_scaled_rope_comes_back_with_the_adapter(files, tmp_path):
    (tmp_path / "config.yaml").write_text((files / "config.yaml").read_text())
    output = run(tmp_path, "--rope_type", "yarn", "--skip_target_length", 4096)
    model = load_adapter(output)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert record(output)["positions"]["target_length"] == model.config.max_position_embeddings == 4096
    base = AutoModelForCausalLM.from_pretrained(
        files / "model", config=scale_rope(AutoConfig.from_pretrained(files / "model"), 4096)
    )
    weights = load_file(output / "adapter_model.safetensors")
    for name, module in base.named_modules():
        key = f"base_model.model.{name}.lora_{{}}.weight"
        if key.format("A") in weights:
            alpha_over_rank = 32 / 16  # TRL's defaults
            module.weight.data += alpha_over_rank * weights[key.format("B")] @ weights[key.format("A")]
    input_ids, position_ids = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 2000, 4000]])
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
        plain = AutoPeftModelForCausalLM.from_pretrained(output)
        assert (plain(**inputs).logits - base(**inputs).logits).abs().max() > 1e-4


def data_files(folder, rows):
    Dataset.from_list(rows).to_json(folder / "train.jsonl")
    Dataset.from_list(rows).to_parquet(folder / "data" / "train.parquet")
    Dataset.from_list(rows[:4]).to_parquet(folder / "data" / "test.parquet")


@pytest.mark.parametrize("place", ["train.jsonl", "data/train.parquet", "data"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_files_folders_and_streams(files, tmp_path, place, streaming):
    (tmp_path / "data").mkdir()
    data_files(tmp_path, [{"prompt": m[:1], "completion": m[1:2]} for m in chats(12)])
    config = (files / "config.yaml").read_text().replace("test_size: 0.1\neval_strategy: steps", "eval_strategy: 'no'")
    config = config.replace("assistant_only_loss: true", "").replace("save_steps: 2", "save_strategy: 'no'")
    (tmp_path / "config.yaml").write_text(config)
    evaluation = ["--eval_strategy", "steps", "--eval_steps", 2] if place == "data" else []
    source = ["--dataset_name", tmp_path / place, "--dataset_streaming", streaming]
    output = run(tmp_path, *source, "--use_peft", "false", *evaluation)
    assert (output / "model.safetensors").exists()
    assert record(output)["coverage"]["documents"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_train_split", "dev"], r"`dataset_train_split` must be one of \['train'\], got 'dev'"),
        (["--test_size", "0"], "needs the split 'test'"),
    ],
)
def test_bad_options_are_named(files, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sft.run(*parse("--config", files / "config.yaml", "--output_dir", tmp_path, *options))


def test_data_set_in_no_format_is_named(files, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    options = ("--dataset_name", tmp_path / "data.jsonl", "--test_size", 0)
    with pytest.raises(ValueError, match=r"must have a column 'text'.*got \['question', 'answer'\]"):
        sft.run(*parse("--config", files / "config.yaml", "--output_dir", tmp_path, *options))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/sft*.yaml")), ids=lambda path: path.parent.name)
def test_model_files_hold_known_options_and_name_their_hardware(path, tmp_path):
    data, training, model, *_ = parse("--config", path, "--output_dir", tmp_path, "--bf16", "false")
    assert model.model_name_or_path and data.dataset_name and training.skip_target_length
    head = path.read_text().split("\n\n")[0]
    assert "Hardware: " in head and str(path.relative_to(RECIPES.parent)) in head


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launchers_load(path):
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert path.read_text().startswith("# ")


def test_adapter_loads_back(uninterrupted):
    model = AutoPeftModelForCausalLM.from_pretrained(uninterrupted)
    assert any("lora_B" in name and bool(p.abs().sum() > 0) for name, p in model.named_parameters())
    record = json.loads((uninterrupted / "longalign_config.json").read_text())
    assert record["positions"]["strategy"] == "skip_context"
    assert (uninterrupted / "tokenizer.json").exists()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_the_adapter_is_published_once_with_its_card(files, tmp_path):
    """By two processes, of which one pushes and the other waits."""
    with Hub() as hub:
        names = ("--push_to_hub", "true", "--hub_model_id", "user/adapter", "--base_name", "org/base")
        options = ("--max_steps", "2", "--license", "mit", "--languages", "en", "--tag", "v1")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(RECIPE.parent / "accelerate" / "cpu.yaml")]
        command = [*launcher, str(RECIPE), "--config", str(files / "config.yaml"), "--output_dir", str(tmp_path)]
        done = {"env": hub.environment(tmp_path / "home"), "timeout": 300}
        run = forked.run([*command, *names, *options], **done)
        assert run.returncode == 0, run.stderr[-3000:]
        assert f"Published {hub.url}/user/adapter" in run.stdout
        repo = hub.repos["models", "user/adapter"]
        pushed, commits = repo.files(), hub.seen.count("commit")
        assert repo.tags["v1"] == repo.branches["main"] and commits == 1
    assert pushed["adapter_model.safetensors"] == (tmp_path / "adapter_model.safetensors").read_bytes()
    assert not [name for name in pushed if "checkpoint" in name or name.endswith((".pt", ".bin", ".pth"))]
    card = pushed["README.md"].decode()
    assert "base_model: org/base" in card and "license: mit" in card and "(assets/coverage.png)" in card
    assert 'load_adapter("user/adapter"' in card and str(files) not in card
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/base"


def test_after_a_failed_push_the_command_told_trains_nothing(files, tmp_path):
    output = tmp_path / "model"
    names = ("--push_to_hub", "true", "--hub_model_id", "user/model", "--base_name", "org/base", "--tag", "v1")
    options = ("--use_peft", "false", "--learning_rate", "0.01", "--max_steps", "1", "--save_strategy", "no")
    options += ("--hub_token", TOKEN, "--eval_strategy", "no")
    command = [sys.executable, str(RECIPE), "--config", str(files / "config.yaml"), "--output_dir", str(output)]
    with Hub() as hub:
        done = {"env": hub.environment(tmp_path / "home"), "timeout": 300}
        hub.faults["commit"] = ["403"]
        run = forked.run([*command, *names, *options], **done)
        told = run.stderr.split("To go on, run: ")[1].strip()
        assert run.returncode == 1 and "Traceback" not in run.stderr and TOKEN not in run.stderr
        assert set(hub.repos["models", "user/model"].files()) == {".gitattributes"}
        weights = (output / "model.safetensors").read_bytes()
        program, *words = shlex.split(told)
        assert program == "hf-longalign"
        again = forked.run([sys.executable, "-m", "hf_longalign", *words], **done)
        assert again.returncode == 0 and again.stdout == f"Published {hub.url}/user/model\n", again.stderr[-3000:]
        repo = hub.repos["models", "user/model"]
        pushed = repo.files()
        assert repo.tags["v1"] == repo.branches["main"]
    assert pushed["model.safetensors"] == (output / "model.safetensors").read_bytes() == weights
    card = pushed["README.md"].decode()
    assert "library_name: transformers" in card and "base_model_relation: finetune" in card
    assert 'AutoModelForCausalLM.from_pretrained("user/model"' in card and "None" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`base_name` must be given"),
        (["--base_name", "org/base", "--hub_model_id", "a/b/c"], "Repo id must"),
        (["--base_name", "org/base", "--create_pr", "true", "--tag", "v1"], "`create_pr` must be alone"),
        (["--base_name", "org/base", "--push_dry_run", str(RECIPES)], "`dry_run` must be a folder that is absent"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_torch_is_loaded(
    files, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("hf_longalign.config.LongAlignSFTConfig", None)  # no parser can be made of it
    with pytest.raises(SystemExit):
        parse("--config", files / "config.yaml", "--output_dir", tmp_path, "--push_to_hub", *options)
    assert message in capsys.readouterr().err


def test_processes_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    """Copied to the other machine, as the message says, the run goes on."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    monkeypatch.setattr("accelerate.utils.gather_object", lambda names: [*names, None])
    with pytest.raises(ValueError, match=r"same checkpoints for every process, got \['checkpoint-2', None\]"):
        sft.agreed_checkpoint(str(tmp_path))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda names: names * 2)
    assert sft.agreed_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
