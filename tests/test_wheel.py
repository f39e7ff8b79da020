"""What a person has after `pip install hf_longalign`: a wheel in an empty environment and folder, and no clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from fake_endpoint import FakeEndpoint
from tiny import chats, tiny_llama, tiny_tokenizer


ROOT = Path(__file__).parents[1]
SOURCES = ("setup.cfg", "setup.py", "README.md", "LICENSE", "hf_longalign")


def run(*command, cwd, status=0, **settings):
    """What a command prints; the clone is on no path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that holds the wheel, and sees the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, ignore=skip) if source.is_dir() else shutil.copy(source, target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w", "wheels", "./source")
    run(*pip, *build, cwd=folder)
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = (folder / "wheels").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path in a .pth is searched, its own .pth files are not read: the clone, if installed there, stays unknown.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An empty folder but for a tiny model and tiny data."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(initializer_range=0.3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": rows}) + "\n" for rows in chats(12)))
    pairs = [{"instruction": f"What did town {n} sell?", "answer": f"ware {n}"} for n in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def command(python, *words, cwd, **options):
    return run(python.with_name("hf-longalign"), *words, cwd=cwd, **options)


def test_the_package_is_the_wheels_and_every_name_is_there(python, work):
    code = "import hf_longalign as h; print(h.__file__, len([getattr(h, name) for name in h.__all__]))"
    file, number = run(python, "-c", code, cwd=work).split()
    assert Path(file).is_relative_to(python.parents[1]) and int(number) >= 18
    shown = command(python, "--help", cwd=work)
    assert shown == run(python, "-m", "hf_longalign", "--help", cwd=work)
    assert command(python, "--version", cwd=work).startswith("hf_longalign ")


def test_a_wrong_option_has_its_status(python, work):
    command(python, "sft", "--lerning_rate", "1", cwd=work, status=2)


def test_pairs_become_data_and_lose_their_contexts(python, work):
    with FakeEndpoint() as server:
        words = f"--generator openai --model tiny --endpoints {server.url} --seeds pairs.jsonl --checks duplicate"
        words += " --n_distractors 2 --cache_dir cache --journal replies.sqlite --output_dir contexts"
        assert "Wrote contexts" in command(python, "synthesize", *words.split(), cwd=work)
    listed = command(python, "journal", "list", "replies.sqlite", cwd=work)
    assert "6 context; in all 6 replies, 0 faults" in listed
    split = command(python, "coherence", "split", "contexts", "coherence", cwd=work)
    assert split.count(": 6 rows") == 2
    pushed = command(python, "push", "contexts", "--push_dry_run", "look", cwd=work)
    assert "Nothing pushed; what would be is in look" in pushed and (work / "look" / "README.md").is_file()


def test_a_model_is_trained_evaluated_merged_and_pushed(python, work):
    words = "--model_name_or_path model --dataset_name chats.jsonl --output_dir adapter --use_peft --max_steps 2"
    words += " --lora_target_modules all-linear --bf16 false --dtype float32 --use_cpu --report_to none --packing"
    words += " --max_length 256 --skip_target_length 1024 --learning_rate 0.1 --save_strategy no --disable_tqdm true"
    assert "Saved to adapter" in command(python, "sft", *words.split(), cwd=work)
    words = "--model model --adapter adapter --suites needle --lengths 256 --depths 0.5 --samples 1"
    words += " --needle_tasks single --max_new_tokens 8 --output_dir report"
    told = command(python, "evaluate", *words.split(), cwd=work)
    assert "Wrote report" in told and (work / "report" / "report.json").is_file()
    compared = command(python, "coherence", "compare", "report", "report", cwd=work)
    assert "| needle: single |" in compared and "| mean |" in compared
    assert "Wrote merged" in command(python, "merge", "adapter", "merged", cwd=work)
    code = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('merged').config.model_type)"
    assert run(python, "-c", code, cwd=work) == "llama\n"
    words = ("--hub_model_id", "user/adapter", "--base_name", "org/base", "--license", "mit")
    command(python, "push", "adapter", *words, "--push_dry_run", "pushed", cwd=work)
    assert "license: mit" in (work / "pushed" / "README.md").read_text()
