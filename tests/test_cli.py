"""The command line: what it offers, what it refuses and how soon, and what a YAML may hold."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from fake_endpoint import FakeEndpoint
from trl import ModelConfig, SFTConfig

from hf_longalign.cli import COMMANDS, main
from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import HubOptions, PublishOptions
from hf_longalign.commands.sft import _trainer_fields
from hf_longalign.config import LongAlignSFTConfig
from hf_longalign.training_options import TrainingOptions


ROOT = Path(__file__).parents[1]
SFT = "sft --model_name_or_path org/model --dataset_name org/rows"


def test_help_names_every_command_and_how_to_start_several_processes(capsys):
    assert main([]) == main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"    {name} " in told for name in COMMANDS)
    assert "accelerate launch --config_file recipes/accelerate/ddp.yaml -m hf_longalign sft" in told
    assert main(["train"]) == 2
    assert "unknown command 'train', known are sft, synthesize," in capsys.readouterr().err


def test_what_the_hub_client_says_is_said_once(tmp_path):
    code = """if True:
        import logging, sys
        from hf_longalign.cli import main
        main(sys.argv[1:])
        import huggingface_hub
        logging.getLogger("huggingface_hub").warning("The Hub is slow.")
    """
    command = [sys.executable, "-c", code, "journal", "merge", tmp_path / "all.sqlite", tmp_path / "none.sqlite"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.count("The Hub is slow.") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"usage: hf-longalign {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sft --lerning_rate 1", "unknown option --lerning_rate; did you mean --learning_rate?"),
        (f"{SFT} --skip-strategi none", "unknown option --skip-strategi; did you mean --skip_strategy?"),
        ("sft --dataset_name org/rows", "`model_name_or_path` must be a Hub id or a folder, got None"),
        ("sft --model_name_or_path org/model", "`dataset_name` must be a Hub id, a folder or a file, got None"),
        (f"{SFT} --dataset_name gone.jsonl", "`dataset_name` must be a file that exists, got 'gone.jsonl'"),
        (f"{SFT} --test_size 1.5", "`test_size` must be from 0 to below 1, got 1.5"),
        (f"{SFT} --test_size 0.1 --dataset_streaming", "`test_size` cannot cut a streamed data set"),
        (f"{SFT} --rope_type yarm", "invalid choice: 'yarm'"),
        (f"{SFT} --rope_type yarn", "`skip_target_length` must be given with `rope_type='yarn'`"),
        (f"{SFT} --skip_strategy skip-all", "invalid choice: 'skip-all'"),
        (f"{SFT} --skip_probability 50", "`skip_probability` must be a number from 0 to 1, got 50.0"),
        (f"{SFT} --license CC-BY", "`license` must be an id of the Hub"),
        (f"{SFT} --config gone.yaml", "No such file or directory: 'gone.yaml'"),
        (f"{SFT} --config", "`--config` must be followed by a YAML file"),
        ("synthesize --seeds a.jsonl", "`output_dir` must be given"),
        ("synthesize --output_dir out", "`seeds` must be given, got None"),
        ("synthesize --output_dir out --seeds a --checks lenght", "`checks` must be one of complete"),
        ("synthesize --output_dir out --seeds a --generator openai", "`model` must be given with generator 'openai'"),
        ("synthesize --seeds a --num_shards 2 --shard_index 2", "`shard_index` must be from 0 to below `num_shards`"),
        ("synthesize --output_dir out --seeds a --retries many", "argument --retries: invalid int value: 'many'"),
        ("evaluate --suites needle", "the following arguments are required: --model"),
        ("evaluate --model m --suites needle,short", "`suites` must be one of needle, puzzles"),
        ("evaluate --model m --limit 0", "`limit` must be at least 1, got 0"),
        ("evaluate --model m --push_to_hub", "`push_to_hub` adds the report to the card of an adapter, got none"),
        ("evaluate --model m --depths 7", "`depths` must be between 0 and 1, got 7.0"),
        ("evaluate --model m --minutes 0", "`minutes` must be above 0, got 0.0"),
        ("evaluate --model m --batch_tokens 0", "`batch_tokens` must be at least 1, got 0"),
        ("evaluate --model m --ruler_questions gone", "`ruler_questions` must be a file, got 'gone'"),
        ("evaluate --model m --push_dry_run look", "`push_dry_run` needs `push_to_hub`, got 'look' alone"),
        ("evaluate --model m needle", "'needle' belongs to no option"),
        ("push gone", "`folder` must be there, got 'gone'"),
        ("push . --hub_model_id a/b/c", "Repo id must"),
        ("push . --create_pr --tag v1", "`create_pr` must be alone"),
        ("push . --push_to_hub false", "--push_to_hub"),
        ("push . --license mit", "`license`, `languages` and `base_name` are for adapters and models"),
        ("push . --base_name org/base", "`license`, `languages` and `base_name` are for adapters and models"),
        ("reach m --dataset rows --rows 0", "`rows` must be at least 1, got 0"),
        ("merge adapter out --dtype bf16", "argument --dtype: invalid choice: 'bf16'"),
        ("reach m --dataset rows --dtype bf16", "argument --dtype: invalid choice: 'bf16'"),
        ("evaluate --model m --dtype bf16", "argument --dtype: invalid choice: 'bf16'"),
        ("serve-command outputs/run/gone", "`model` must be a folder or a Hub id, got 'outputs/run/gone'"),
        ("merge adapter", "the following arguments are required: output"),
        ("journal list", "the following arguments are required: journal"),
        ("journal list gone.sqlite", "gone.sqlite: no such journal"),
        ("coherence split", "the following arguments are required: data, output"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_that_takes_seconds_is_imported(tmp_path, command, message):
    (tmp_path / "file").touch()
    code = (
        "import sys, atexit; from hf_longalign.cli import main;"
        "atexit.register(lambda: print(*{'torch', 'transformers', 'datasets', 'peft', 'openai'} & {*sys.modules}));"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_x"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (1, 2) and done.stdout == "\n"


def test_every_option_of_the_trainer_is_known_before_it_is_imported():
    theirs = {field.name for field in fields(SFTConfig) if field.init}
    assert theirs <= _trainer_fields()
    ours = {field.name for field in fields(LongAlignSFTConfig)} - theirs
    assert ours <= {field.name for field in fields(TrainingOptions)}


def test_hub_options_are_called_as_in_transformers():
    theirs = {field.name for field in fields(LongAlignSFTConfig)}
    assert {field.name for field in fields(HubOptions)} <= theirs
    assert not {field.name for field in fields(PublishOptions)} & (theirs | {f.name for f in fields(ModelConfig)})


def test_a_refusal_is_a_message_and_a_fault_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    assert main(["coherence", "compare", "gone", "gone"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("hf-longalign coherence: gone must be a folder with report.json") and "Trace" not in told
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        main(["coherence", "compare", str(tmp_path / "broken.json"), "gone"])
    for code, module in (("int('x')", "hf_longalign.example"), ("raise ValueError('x')", "example")):
        exec(f"def run(args): {code}", space := {"__name__": module})
        monkeypatch.setattr("hf_longalign.commands.serving.run", space["run"])
        with pytest.raises(ValueError, match="x"):
            main(["merge", "adapter", "out"])


@dataclass
class Example:
    """Options of every kind."""

    number: int = 1
    share: float = 0.5
    name: str | None = None
    parts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kind: str = field(default="a", metadata={"choices": ["a", "b"]})
    flag: bool = False


Example.__module__ = "hf_longalign.commands.example"  # only own classes are looked at


def read(tmp_path, yaml, *arguments):
    (tmp_path / "options.yaml").write_text(yaml)
    (found,) = OptionParser("example", [Example]).read(["--config", str(tmp_path / "options.yaml"), *arguments])
    return found


def test_a_yaml_and_the_command_line_give_the_same_and_the_latter_wins(tmp_path):
    yaml = "number: 3\nshare: 1e-1\nname: x\nparts: [a, b]\nsizes: [4, 5]\nkind: b\nflag: true\n"
    words = "--number 3 --share 1e-1 --name x --parts a b --sizes 4 5 --kind b --flag".split()
    assert read(tmp_path, yaml) == OptionParser("example", [Example]).read(words)[0]
    assert read(tmp_path, yaml, "--number", "4", "--parts", "c").number == 4
    assert read(tmp_path, "parts: a\n").parts == ["a"]
    equals = OptionParser("example", [Example]).read([f"--config={tmp_path / 'options.yaml'}"])
    assert equals[0].parts == ["a"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("numbr: 3\n", "unknown option --numbr; did you mean --number?"),
        ("kind: c\n", "`kind` must be one of a, b, got 'c'"),
        ("number: 1.5\n", "`number` must be int, got 1.5"),
        ("number: true\n", "`number` must be int, got True"),
        ("share: much\n", "invalid float value: 'much'"),
        ("name: 1.0\n", "`name` must be str or NoneType, got 1.0. Quote text"),
        ("sizes: [a]\n", "`sizes` must be list, got ['a']"),
        ("flag: 3\n", "`flag` must be bool, got 3"),
        ("- 3\n", "must contain a YAML mapping"),
        ("a: [\n", "while parsing"),
    ],
)
def test_a_yaml_that_holds_something_else_is_refused(tmp_path, capsys, yaml, message):
    with pytest.raises(SystemExit):
        read(tmp_path, yaml)
    assert message in capsys.readouterr().err


def test_accelerate_launches_the_module_on_two_processes(tmp_path):
    pairs = [{"instruction": f"What did town {n} sell?", "answer": f"ware {n}"} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"), "-m", "hf_longalign"]
    with FakeEndpoint() as server:
        options = f"--generator openai --model tiny --endpoints {server.url} --seeds pairs.jsonl --checks duplicate"
        words = f"synthesize {options} --n_distractors 2 --cache_dir cache --output_dir out".split()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*launcher, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.log) == 6 and done.stdout.count("Wrote ") == 1
