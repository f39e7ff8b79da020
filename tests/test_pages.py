"""README and pages: every command and every Python block is run, every link leads somewhere, every option is told."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from fake_endpoint import FakeEndpoint
from tiny import chats, hotpot_rows, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import ScriptArguments

import hf_longalign
from hf_longalign.cli import main
from hf_longalign.commands.publishing import HubOptions, PublishOptions
from hf_longalign.commands.sft import DataOptions
from hf_longalign.commands.synthesize import SynthesizeArguments
from hf_longalign.evaluation.options import ModelOptions, SuiteOptions
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.training_options import TrainingOptions


ROOT = Path(__file__).parents[1]
# Cards are what a push wrote; what is in them is run by the tests of cards.
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "recipes").rglob("*.md")) if "cards" not in page.parts)]
# In this order what a command reads was made by one before.
RUN = [
    ROOT / name
    for name in (
        "README.md",
        "recipes/training.md",
        "recipes/synthesis/README.md",
        "recipes/scale/README.md",
        "recipes/evaluation/README.md",
        "recipes/README.md",
        "recipes/accelerate/README.md",
        "recipes/MEMORY.md",
        "recipes/how_it_works.md",
        "recipes/publishing.md",
        "recipes/smollm2-135m/README.md",
    )
]
NOT_RUN = ("pip install", "make ")
BASE = "Qwen/Qwen2.5-0.5B-Instruct"
# So that a tiny model does on a CPU in seconds what a command says of a real one.
TINY = {
    # What two steps change at a usual rate would be lost to the rounding of a merge in bfloat16.
    "sft": "--max_steps 2 --learning_rate 0.02 --gradient_accumulation_steps 1 --max_length 8192 --dtype float32 "
    "--bf16 false "
    "--use_cpu true --eval_strategy no --save_strategy no --report_to none --disable_tqdm true --base_name org/base",
    "evaluate": "--lengths 512 --samples 1 --depths 0.5 --max_new_tokens 8 --needle_tasks single --puzzles count",
    "synthesize": "--cache_dir cache",
    "push": "--base_name org/base",
    "recipes/scale/synthesize.py": "--cache_dir cache",
}
# Of an extra that may be missing: then what a page says of it is not run.
NEEDS = {"recipes/scale/synthesize.py": "datatrove", "import ray": "ray"}
TINY_STUDY = (
    "--arms scaled ordinary --rows 8 --row_tokens 768 --batch_size 4 --micro_batch_size 2 --target_length 4096 "
    "--dtype float32 --cells 1536:1 --most_golds 2 --perplexity_documents 1 --position_documents 0 "
    "--seeds hotpotqa/hotpot_qa"
)
WORDS = "the old mill by the sea was sold to a man who had ten boats and a red cow in the hills of his land".split()


def reply(body):
    """A context of 240 words that holds the answer: other words for every prompt."""
    prompt = body["messages"][-1]["content"]
    town, number = random.Random(prompt), re.search(r"ware \d+", prompt)
    lines = [" ".join(town.choices(WORDS, k=10)).capitalize() + "." for _ in range(24)]
    lines[7] = f"It was {number[0] if number else 'nothing'} that they sold there."
    return "Context: " + " ".join(lines)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """The commands of a page, each as words."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_every_page_with_something_to_run_is_run():
    assert {page for page in PAGES if blocks(page, "bash") or blocks(page, "python")} == set(RUN)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the models and data of the Hub are tiny folders of the same names."""
    folder = tmp_path_factory.mktemp("pages")
    for name in (BASE, "Qwen/Qwen2.5-72B-Instruct"):
        tiny_llama(initializer_range=0.3, max_position_embeddings=32768).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    data = folder / "trl-lib" / "Capybara"
    for split, rows in (("train", chats(24)), ("test", chats(4))):
        Dataset.from_list([{"messages": messages} for messages in rows]).to_parquet(data / f"{split}.parquet")
    tiny_llama(max_position_embeddings=2048).save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    tiny_tokenizer().save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    Dataset.from_list(list(hotpot_rows(40))).to_parquet(folder / "hotpotqa" / "hotpot_qa" / "train.parquet")
    pairs = [{"instruction": f"What did town {n} sell?", "answer": f"ware {n}"} for n in range(12)]
    rows = [{"prompt": pair["instruction"], "completion": pair["answer"]} for pair in pairs]
    for name, written in (("pairs", pairs), ("completions", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.fixture(scope="module")
def server():
    with FakeEndpoint(model="Qwen/Qwen2.5-72B-Instruct", reply=reply) as server:
        yield server


def run_command(words, server):
    """Run a command as tiny as it goes, in this process where it is the package's."""
    study = next((word for word in words if word.startswith("recipes/study")), None)
    if study is not None:
        look = ["--push_dry_run", "look/study", "--base_name", "org/base"] if "publish" in study else []
        script = [sys.executable, *words[words.index(study) :], *TINY_STUDY.split(), *look]
        assert subprocess.run(script, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300).returncode == 0, words
        return
    if words[0] == "accelerate":  # what it launches; launching is tested with the command line
        launch_command_parser().parse_args(words[2:])
        words = words[words.index("hf_longalign") :]
    name, *options = words[1:]
    if name in ("synthesize", "recipes/scale/synthesize.py"):
        options += ["--endpoints", server.url]
    if name != "push" or Path(options[0], "adapter_config.json").exists():  # a data set has no base
        options += TINY.get(name, "").split()
    if words[0] == "python":
        assert subprocess.run([sys.executable, name, *options]).returncode == 0, words
    else:
        assert main([name, *options]) == 0, words


def can_run(text):
    return all(find_spec(package) for word, package in NEEDS.items() if word in text)


def test_what_stands_on_the_pages_runs(place, server, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    # What another state of the code has prepared of the same rows would be taken for this one's.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
    tiny = {"max_steps": 2, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    monkeypatch.setattr(hf_longalign, "LongAlignSFTConfig", partial(hf_longalign.LongAlignSFTConfig, **tiny))
    asked = {"lengths": [512], "samples": 1, "depths": [0.5], "max_new_tokens": 8, "puzzles": ["count"]}
    monkeypatch.setattr(hf_longalign, "publish_adapter", partial(hf_longalign.publish_adapter, base_model="org/base"))
    monkeypatch.setattr(hf_longalign, "evaluate", partial(hf_longalign.evaluate, **asked))
    for page in RUN:
        for words in commands(page):
            if not " ".join(words).startswith(NOT_RUN) and can_run(" ".join(words)):
                assert words[0] in ("hf-longalign", "accelerate", "python"), words
                run_command(words, server)
        for code in filter(can_run, blocks(page, "python")):
            code = code.replace("http://localhost:8000/v1", server.url).replace("/shared", str(place))
            exec(compile(code, str(page), "exec"), names(place))


def names(place):
    """What a block of Python may take as given."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [{"input_ids": (ids := tokenizer("Ardel sold salt.").input_ids), "labels": ids} for _ in range(4)]
    arguments = TrainingArguments("outputs/any", max_steps=1, use_cpu=True, report_to="none", save_strategy="no",
                                  remove_unused_columns=False)  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained(BASE),
        "training_args": arguments,
        "tokenised": Dataset.from_list(rows),
    }


def test_the_readme_is_short_and_its_uses_too():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert all(len(code.strip().splitlines()) <= 10 for code in blocks(ROOT / "README.md", "python"))


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(ROOT.glob("C*.md"))], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_option_is_told_and_tested():
    classes = (DataOptions, TrainingOptions, HubOptions, PublishOptions, SynthesizeArguments)
    classes = (*classes, SynthesisOptions, ModelOptions, SuiteOptions)
    theirs = {field.name for field in fields(ScriptArguments)}
    options = {field.name for kind in classes for field in fields(kind)} - theirs
    told = "\n".join(path.read_text("utf-8") for path in [*PAGES, *(ROOT / "recipes").rglob("*.yaml")])
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name]
    tested = "\n".join(path.read_text("utf-8") for path in files)
    assert not {name for name in options if not re.search(rf"\b{name}\b", told)}, "in no YAML and on no page"
    used = r'(--{0}\b|["`]{0}["`]|\b{0}=|"{0}:|\b{0}: )'
    assert not {name for name in options if not re.search(used.format(name), tested)}, "in no test"
    assert len(options) <= 112


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_lists_have_one_form(path):
    for line in path.read_text("utf-8").splitlines():
        value = line.partition(": ")[2]
        if not line.startswith("#") and "," in value:
            assert value.startswith("["), f"{line}: a list is [a, b] in a YAML, and a b on the command line"
