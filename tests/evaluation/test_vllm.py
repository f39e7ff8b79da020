"""vLLM as what answers, against a stand-in of its documented interface: there is no GPU."""

import json
import sys
from types import ModuleType

import pytest
import torch
import vllm_stand_in
from peft import LoraConfig, get_peft_model
from tiny_chat import make_tiny_chat
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_longalign.cli import main
from hf_longalign.evaluation import evaluate, models
from hf_longalign.evaluation.generation import LocalGenerator, VLLMAnswers
from hf_longalign.evaluation.models import vllm_examinees
from hf_longalign.evaluation.options import ModelOptions
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.run_record import save_record
from hf_longalign.serving import load_vllm


ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_tiny_chat(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def vllm(monkeypatch, folder):
    """The stand-in, which answers as the model does: greedily."""
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = vllm_stand_in.LoRARequest
    for name, module in {"vllm": vllm_stand_in, "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(self, prompt, params):
        assert params.temperature == 0
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=params.max_tokens, do_sample=False)
        out = out[0, len(prompt) :].tolist()
        text, reason = tokenizer.decode(out, skip_special_tokens=True), "length"
        if out[-1] == tokenizer.eos_token_id or any(stop in text for stop in params.stop or ()):
            reason = "stop"
        return vllm_stand_in.RequestOutput(
            "0", None, prompt, None, [vllm_stand_in.CompletionOutput(0, text, out, None, None, reason)], True, 3
        )

    monkeypatch.setattr(vllm_stand_in.LLM, "_answer", answer)
    monkeypatch.setattr(vllm_stand_in.LLM, "made", [])
    monkeypatch.setattr(vllm_stand_in.LLM, "asked", [])
    return vllm_stand_in.LLM


def test_answers_are_those_of_the_model_that_is_loaded_here(vllm, folder):
    prompts = [
        Prompt("needle", "single", n, f"In year {n} it rained. What else?", (), 12, chat=chat, prefix="It", stop=stop)
        for n in range(3)
        for chat, stop in ((True, ()), (False, ("\n",)))
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    local = dict(LocalGenerator(model, tokenizer).generate(prompts))
    answers = VLLMAnswers(lambda: load_vllm(folder), tokenizer)
    found = dict(answers.generate(prompts))
    assert {prompt: one.text for prompt, one in found.items()} == {prompt: one.text for prompt, one in local.items()}
    assert len(vllm.asked) == 1 and vllm.made[0]["enable_prefix_caching"]
    assert answers.stats.cached_tokens == 3 * 6 and answers.stats.generated_tokens >= 6
    with pytest.raises(ValueError, match=r"`lengths` must be .* 512 tokens, got 5\d\d with"):
        list(answers.generate([Prompt("needle", "single", 0, "word", (), 510)]))
    assert list(answers.generate([])) == []


def test_base_and_adapter_are_asked_in_one_engine_with_the_rope_of_the_training(vllm, folder, tmp_path):
    adapter = tmp_path / "long"
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(adapter)
    save_record(adapter, TrainingRecord(RopeRecord("llama", 1024, ROPE)))
    out, options = str(tmp_path / "report"), {"suites": ["needle", "puzzles", "ruler"], "samples": 1}
    options |= {"lengths": [1024], "needle_tasks": ["single"], "puzzles": ["latest"], "ruler_tasks": ["niah_single_1"]}
    report = evaluate(folder, str(adapter), generator="vllm", output_dir=out, max_new_tokens=8, **options)
    assert [model.label for model in report.models] == ["base, scaled RoPE", "adapter"]
    assert report.settings["through"] == "vllm" and all(task.scores for suite in report.suites for task in suite.tasks)
    (made,) = vllm.made
    assert made["hf_overrides"] == {"rope_parameters": ROPE, "max_position_embeddings": 1024}
    assert made["enable_lora"] and made["max_model_len"] == 1024
    loras = [lora and lora.lora_path for _, _, lora in vllm.asked]
    assert loras == [None, str(adapter)] * 3
    # Again: nothing is loaded, nothing asked.
    evaluate(folder, str(adapter), generator="vllm", output_dir=out, max_new_tokens=8, **options)
    assert len(vllm.made) == 1 and len(vllm.asked) == 6


def test_another_chat_template_is_asked_again(vllm, folder):
    config, tokenizers = AutoConfig.from_pretrained(folder), [AutoTokenizer.from_pretrained(folder) for _ in range(3)]
    tokenizers[2].chat_template = "{{ messages[0]['content'] }}"
    one, same, other = (vllm_examinees(ModelOptions(folder), tokenizer, config)[0] for tokenizer in tokenizers)
    assert one.identity == same.identity != other.identity


def test_the_command_line_asks_vllm(vllm, folder, tmp_path, capsys):
    given = [folder, "--suites", "puzzles", "--puzzles", "latest", "--lengths", "500", "--samples", "1", "--generator"]
    given += ["vllm", "--vllm_options", json.dumps({"max_model_len": 500}), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *given]) == 0
    assert vllm.made[0]["max_model_len"] == 500 and "| through | vllm |" in capsys.readouterr().out


def test_what_vllm_cannot_be_asked_is_refused_by_name(folder, tmp_path, monkeypatch):
    for options, told in (
        ({"generator": "vlm"}, "`generator` must be one of transformers, vllm, got"),
        ({"generator": "vllm", "endpoint": "http://localhost"}, "`endpoint` must be unset"),
        ({"generator": "vllm", "load_in_4bit": True}, "`load_in_4bit` must be unset"),
        ({"generator": "vllm", "adapter_revision": "v1"}, "`adapter_revision` must be unset"),
        ({"vllm_options": "{}"}, "`vllm_options` must be unset with `generator` transformers"),
        ({"generator": "vllm", "vllm_options": "x"}, "`vllm_options` must be a JSON object"),
    ):
        with pytest.raises(ValueError, match=told):
            ModelOptions(folder, **options).check()
    for suite in ("short", "perplexity"):
        with pytest.raises(ValueError, match=f"`suites` must be what vLLM answers.*got '{suite}'"):
            ModelOptions(folder, generator="vllm").check_suites([suite])
    monkeypatch.setattr(models, "PROCESSES", 2)
    with pytest.raises(ValueError, match="`generator` vllm must run in one process, got 2"):
        evaluate(folder, generator="vllm", output_dir=str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "hf_longalign\[vllm\]"'):
        evaluate(folder, generator="vllm", output_dir=str(tmp_path))
