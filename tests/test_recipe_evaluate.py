"""The evaluation recipe as a user runs it: base and adapter, killed and resumed, on two processes, published."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from loopback_hub import Hub
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from hf_longalign.adapter import weights_sample
from hf_longalign.cli import main
from hf_longalign.coverage import DistanceCoverage
from hf_longalign.evaluation.options import SuiteOptions
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import rope_record
from hf_longalign.run_record import save_record


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "evaluate.py"
QUESTIONS = ["--suites", "needle", "perplexity", "--lengths", "512", "1024", "--depths", "0", "1", "--samples", "2"]
QUESTIONS += ["--max_new_tokens", "16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama(initializer_range=0.3)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    coverage = DistanceCoverage(1024)
    coverage.add([0, 1, 2, 500, 501])
    sample = weights_sample(model.get_base_model())
    record = TrainingRecord(rope_record(base.config), coverage=coverage.record(), base_weights=sample)
    save_record(folder / "adapter", record)
    for name in ("base", "adapter"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def command(models, output, *more, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        config = ROOT / "recipes" / "accelerate" / "cpu.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    asked = ["--model", models / "base", "--adapter", models / "adapter", "--output_dir", output, *QUESTIONS, *more]
    return [*launcher, str(RECIPE), *map(str, asked)]


ALONE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(models, output, *more, processes=1, env=ALONE):
    words = command(models, output, *more, processes=processes)
    return forked.run(words, env=env, timeout=400)


def report_of(output):
    report = json.loads((output / "report.json").read_text())
    assert report["settings"].pop("processes")
    return {name: value for name, value in report.items() if name not in ("speed", "date")}


def keys_of(output):
    """The keys of all answers; the speed that was measured to say what they cost is none."""
    files = sorted((output / "answers").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines() if line.endswith("}")]
    return [key for line in lines if not (key := json.loads(line)["key"]).startswith("speed/")]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A report of local folders, for which the Hub, were it there, is asked nothing."""
    output = tmp_path_factory.mktemp("whole")
    with Hub() as hub:
        done = run(models, output, env=hub.environment(tmp_path_factory.mktemp("home")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.seen == []
    return output


def test_the_report_compares_base_and_adapter(whole):
    report = report_of(whole)
    assert [model["label"] for model in report["models"]] == ["base", "adapter"]
    assert [model["name"] for model in report["models"]] == ["base", "adapter"]  # no path of this machine
    tasks = report["suites"][0]["tasks"]
    assert [task["task"] for task in tasks] == ["single", "multi_key", "multi_value", "multi_query"]
    assert all(task["samples"] == 4 and set(task["scores"]) == {"base", "adapter"} for task in tasks)
    perplexity = report["perplexity"]["values"]
    assert perplexity["base"] != perplexity["adapter"]
    assert {"needle_heatmap.png", "needle_accuracy.png", "perplexity.png", "coverage.png"} <= set(report["images"])
    assert all((whole / name).is_file() for name in (*report["images"], "report.md"))
    assert str(whole.parent) not in (whole / "report.json").read_text() + (whole / "report.md").read_text()


def test_killed_it_goes_on_with_what_is_left(models, whole, tmp_path):
    process = forked.Popen(command(models, tmp_path), env=ALONE)
    try:
        deadline = time.monotonic() + 300
        while len(keys_of(tmp_path) if (tmp_path / "answers").is_dir() else []) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = keys_of(tmp_path)
    assert not (tmp_path / "report.json").exists()
    done = run(models, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    after = keys_of(tmp_path)
    assert set(before) < set(after) and len(after) == len(set(after)), "nothing is asked twice"
    assert report_of(tmp_path) == report_of(whole)


def test_two_processes_equal_one(models, whole, tmp_path):
    done = run(models, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert files == ["claims", "results-0.jsonl", "results-1.jsonl"]
    assert not list((tmp_path / "answers" / "claims").iterdir())
    assert sorted(keys_of(tmp_path)) == sorted(keys_of(whole))
    assert report_of(tmp_path) == report_of(whole)
    one, two = (json.loads((output / "report.json").read_text())["speed"] for output in (whole, tmp_path))
    for label, counts in two.items():  # of both processes
        assert counts["prompt_tokens"] == one[label]["prompt_tokens"] > 0 and counts["seconds"] > 0


def test_a_killed_process_is_made_up_for_by_one_started_elsewhere(models, whole, tmp_path):
    """Two commands by themselves, as on two machines: the first is killed amid its work, the second does it all."""
    one = forked.Popen(command(models, tmp_path), env=ALONE)
    two = forked.Popen(command(models, tmp_path), env={**ALONE, "WORLD_SIZE": "3"})
    try:
        deadline = time.monotonic() + 300
        while len(keys_of(tmp_path) if (tmp_path / "answers").is_dir() else []) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        one.send_signal(signal.SIGKILL)
        out, told = two.communicate(timeout=300)
    finally:
        for process in (one, two):
            process.kill()
            process.wait()
    assert two.returncode == 0, told[-3000:]
    assert "3 processes were started, and " in told and "`output_dir`" in told, "one never came"
    assert "Wrote " in out and report_of(tmp_path) == report_of(whole)
    assert set(keys_of(whole)) <= set(keys_of(tmp_path))


def test_the_report_is_published_with_the_adapter(models, whole, tmp_path):
    with Hub() as hub:
        words = ("--push_to_hub", "--hub_model_id", "user/adapter", "--base_name", "org/base")
        done = run(models, whole, *words, env=hub.environment(tmp_path))
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{hub.url}/user/adapter" in done.stdout
        files = hub.repos["models", "user/adapter"].files()
    names = {"adapter_model.safetensors", "adapter_config.json", "longalign_config.json", "README.md", "report.json"}
    assert names | {"report.md", "needle_heatmap.png", "coverage.png"} <= set(files)
    assert [name for name in files if name.endswith("coverage.png")] == ["coverage.png"]
    assert files["adapter_model.safetensors"] == (models / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = files["README.md"].decode()
    assert "base_model: org/base" in card and "model-index" in card and "![" in card
    assert str(models) not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suites", "needles"], "`suites` must be one of needle"),
        (["--lengths", "2048"], "`lengths` must be at most 1024, the range of this 'llama' model, got 2048"),
        (
            ["--suites", "perplexity", "--endpoint", "http://localhost:1/v1"],
            "got 'perplexity', for which the model itself is needed",
        ),
        (
            ["--haystack", "missing.txt"],
            "`haystack` must be a file, a folder or a data set, user/name[:config][@split], got 'miss",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(models, tmp_path, capsys, options, message):
    words = command(models, tmp_path, *options)
    try:
        status = main(["evaluate", *words[words.index(str(RECIPE)) + 1 :]])
    except SystemExit as ended:
        status = ended.code
    assert status != 0 and message in capsys.readouterr().err
    assert not any(tmp_path.glob("answers/*.jsonl")) or not keys_of(tmp_path), "refused before anything is asked"


def test_where_nothing_was_measured_the_status_says_so(models, tmp_path):
    tasks = ("--suites", "longbench", "--longbench_tasks", "qasper", "hotpotqa")
    done = run(models, tmp_path / "out", *tasks)
    assert done.returncode == 1 and "Nothing was measured; the report says why" in done.stderr
    told = "qasper, hotpotqa: LongBench's data could not be fetched"
    # One line for what is missing, however many tasks need it.
    assert done.stderr.count("could not be fetched") == done.stderr.count(told) == 1
    assert done.stdout.count("could not be fetched") == done.stdout.count(f"- {told}") == 1
    assert "`longbench_source`" in done.stdout
    done = run(models, tmp_path / "out", "--haystack", "org/gone")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "`haystack` must be a file, a folder or a data set" in done.stderr and "got 'org/gone'" in done.stderr


def test_options_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`limit` must be at least 1, got 0"):
        SuiteOptions(limit=0, output_dir=str(tmp_path)).check()
    with pytest.raises(ValueError, match=r"`longbench_source` must be .* which is not there"):
        SuiteOptions(suites=["longbench"], longbench_source=str(tmp_path / "gone")).check()
    for name, values in {"depths": [0.5, 0.5], "lengths": [512, 512], "puzzles": ["count", "count"]}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be all different, got .* Name each once"):
            SuiteOptions(output_dir=str(tmp_path), **{name: values}).check()
    for depths, told in (([0.5, 1.2], "between 0 and 1"), ([float("nan")], "between 0 and 1"), ([], "hold something")):
        with pytest.raises(ValueError, match=f"`depths` must {'be ' * bool(depths)}{told}"):
            SuiteOptions(output_dir=str(tmp_path), depths=depths).check()
    SuiteOptions(output_dir=str(tmp_path / "new" / "report")).check()
    with pytest.raises(ValueError, match="`output_dir` must be a folder to write to"):
        SuiteOptions(output_dir=__file__).check()
