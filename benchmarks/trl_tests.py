"""TRL's own tests of `SFTTrainer`, run against `LongAlignSFTTrainer` beside TRL's trainer.

    python benchmarks/trl_tests.py TRL_CHECKOUT --output benchmarks/results/trl_tests.json

The tests come from a checkout of https://github.com/huggingface/trl. What they would download is made on the fly: tiny
models with random weights and TRL's chat templates, and texts in the forms of its test data. Tests of images, of
remote code and of GPUs are left out. "default" is `LongAlignSFTTrainer` as it comes, "none" with
`skip_strategy="none"`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
EXPERTS = {"head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARMONY = ("<|endoftext|>", "<|start|>", "<|return|>", "<|end|>", "<|message|>", "<|channel|>")
YARN = {"rope_type": "yarn", "rope_theta": 150000, "factor": 8.0, "original_max_position_embeddings": 4096}
# Name of TRL's model: configuration, its fields, chat template of TRL, special tokens.
MODELS: dict[str, tuple[str, dict, str | None, tuple[str, ...]]] = {
    "Qwen2ForCausalLM-2.5": ("Qwen2Config", {}, "qwen2_5", CHATML),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 8}, "qwen3", CHATML),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 4}, "qwen3", CHATML),
    "Glm4MoeForCausalLM": (
        "Glm4MoeConfig",
        {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
        "glm4moe",
        CHATML,
    ),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN},
        "gptoss",
        HARMONY,
    ),
    "Cohere2ForCausalLM": ("Cohere2Config", {}, "cohere", CHATML),
    "Olmo3ForCausalLM": ("Olmo3Config", {}, "qwen2_5", CHATML),
    "Lfm2ForCausalLM": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "qwen2_5", CHATML),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}, None, CHATML),
}
LEFT_OUT = "not vlm and not trust_remote_code and not Nemotron and not Lfm2ForCausalLM-2.5"
TRAINERS = {
    "trl": "from trl import SFTConfig, SFTTrainer",
    "default": "from hf_longalign import LongAlignSFTConfig as SFTConfig, LongAlignSFTTrainer as SFTTrainer",
    "none": """from dataclasses import dataclass
from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer as SFTTrainer
@dataclass
class SFTConfig(LongAlignSFTConfig):
    skip_strategy: str = "none"
""",
}
DATA = """
import re
from datasets import Dataset, DatasetDict, IterableDatasetDict
PAIRS = [(f"What is better than rule {n}?", f"Rule {n + 1}, although never is often better.") for n in range(17)]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "a"}}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
def say(role, content): return {"role": role, "content": content}
def row(name, kind, q, a):
    if name.endswith("toolcall"):
        calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        answer = {"role": "tool", "name": "f", "content": "ok"}
        tools = [{"type": "function", "function": TOOL}]
        return {"messages": [say("user", q), calls, answer, say("assistant", a)], "tools": tools}
    if name.endswith("imdb"): return {"text": (q + " " + a) * 6, "label": 0}
    if kind == "standard_language_modeling": return {"text": q + " " + a}
    if kind == "standard_prompt_completion": return {"prompt": q, "completion": " " + a}
    if kind == "standard_implicit_prompt_preference": return {"chosen": q + " " + a, "rejected": q}
    if (kind or "").endswith("prompt_completion"):
        return {"prompt": [say("user", q)], "completion": [say("assistant", a)]}
    return {"messages": [say("user", q), say("assistant", a)]}
def load_dataset(name, kind=None, split=None, streaming=False):
    rows = Dataset.from_list([row(name, kind, *pair) for pair in PAIRS])
    found = DatasetDict({"train": rows, "test": rows.select(range(4))})
    if streaming: found = IterableDatasetDict({name: data.to_iterable_dataset() for name, data in found.items()})
    if split is None: return found
    part, cut = re.match(r"(\\w+)(?:\\[:(\\d+)\\])?", split).groups()
    return found[part].select(range(int(cut))) if cut else found[part]
"""


def make_models(folder: Path) -> None:
    """Write the tiny models and their tokenizers."""
    templates = Path(trl.__file__).parent / "chat_templates"
    for name, (config_name, fields, template, special) in MODELS.items():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(["What is better than never? Rule 1, although now is often better."], trainer)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token=special[0], eos_token=special[2]
        )
        if template is not None:
            tokenizer.chat_template = (templates / f"{template}.jinja").read_text(encoding="utf-8")
        config = getattr(transformers, config_name)(
            **{**SIZES, **fields}, pad_token_id=0, bos_token_id=1, eos_token_id=tokenizer.eos_token_id
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / f"tiny-{name}")
        tokenizer.save_pretrained(folder / f"tiny-{name}")


def write_tests(checkout: Path, folder: Path) -> None:
    """Copy the tests, with models and data of this file in place of the Hub's."""
    tests = folder / "tests"
    shutil.copytree(checkout / "tests" / "data", tests / "data")
    for name in ("__init__.py", "testing_constants.py"):
        shutil.copy(checkout / "tests" / name, tests / name)
    utils = (checkout / "tests" / "testing_utils.py").read_text(encoding="utf-8")
    names = re.search(r"from trl\.import_utils import \((.*?)\)", utils, re.DOTALL)
    if names is not None:  # of another version than the one installed
        missing = [f"{name} = getattr(_utils, '{name}', bool)" for name in re.findall(r"\w+", names[1])]
        utils = utils.replace(names[0], "\n".join(["import trl.import_utils as _utils", *missing]))
    (tests / "testing_utils.py").write_text(utils, encoding="utf-8")
    fixture = (
        "\n@pytest.fixture\ndef lazy_shared_datadir():\n    from pathlib import Path\n\n"
        "    return Path(__file__).parent / 'data'\n"
    )
    conftest = (checkout / "tests" / "conftest.py").read_text(encoding="utf-8")
    (tests / "conftest.py").write_text(conftest + fixture, encoding="utf-8")
    source = (checkout / "tests" / "test_sft_trainer.py").read_text(encoding="utf-8")
    source = source.replace("IterableDatasetDict, load_dataset", "IterableDatasetDict")
    source = source.replace(
        "from trl import SFTConfig, SFTTrainer", "from stand_in import SFTConfig, SFTTrainer, load_dataset"
    )
    source = re.sub(
        r"from trl\.trainer\.sft_trainer import \((.*?)\)",
        lambda found: (
            "import trl.trainer.sft_trainer as _module\n"
            + "\n".join(f"{name} = getattr(_module, '{name}', None)" for name in re.findall(r"\w+", found[1]))
        ),
        source,
        flags=re.DOTALL,
    )
    source = source.replace('"trl-internal-testing/tiny-', f'"{folder}/tiny-')
    (tests / "test_sft_trainer.py").write_text(source, encoding="utf-8")


def run_tests(folder: Path, trainer: str) -> dict[str, str]:
    """Return "passed", "skipped" or the last line of the error, by test."""
    (folder / "stand_in.py").write_text(TRAINERS[trainer] + DATA, encoding="utf-8")
    log = folder / f"{trainer}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-c", os.devnull]
    command += [f"--rootdir={folder}", f"--junitxml={log}", "-k", f"TestSFTTrainer and not Slow and {LEFT_OUT}"]
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "tests/test_sft_trainer.py"], cwd=folder, env=environment, check=False)
    found = {}
    for case in ElementTree.parse(log).iter("testcase"):
        told = {child.tag: child.get("message", "") for child in case}
        name = str(case.get("name")).replace(str(folder), "")
        found[name] = "skipped" if "skipped" in told else told.get("failure", told.get("error", "passed"))
    return found


def main() -> None:
    """Run the tests with each trainer and write what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of TRL's repository")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tests").mkdir()
        make_models(folder)
        write_tests(args.checkout, folder)
        found = {trainer: run_tests(folder, trainer) for trainer in TRAINERS}
    trl_passes = [name for name, result in found["trl"].items() if result == "passed"]
    report = {
        "command": f"python benchmarks/trl_tests.py TRL_CHECKOUT --output {args.output}",
        "tests_version": (args.checkout / "VERSION").read_text(encoding="utf-8").strip(),
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "trl_passes": len(trl_passes),
        "trl_fails": sorted(name for name, result in found["trl"].items() if result not in ("passed", "skipped")),
    }
    for trainer in ("default", "none"):
        differing = {name: found[trainer][name] for name in trl_passes if found[trainer][name] != "passed"}
        report[trainer] = {"passes": len(trl_passes) - len(differing), "differs": differing}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
