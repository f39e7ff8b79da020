"""Served as it was trained: the command of each engine, the merged config, and a server known by its answers."""

import json
import math
import shlex
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace

import loopback_hub
import pytest
import torch
from fake_endpoint import FakeEndpoint
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, LoraConfig
from served import transformers_serve
from test_adapter import train
from test_trainer import make_trainer
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_longalign import evaluate, load_adapter, merge_adapter, serve_command
from hf_longalign.adapter import MARK
from hf_longalign.cli import main
from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.known_answers import known_answers, ledger, not_past_range
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.rope import rope_record
from hf_longalign.run_record import load_record, save_record
from hf_longalign.serving import ENGINES, command_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base of range 256, an adapter trained at range 1,024, and both as one model."""
    folder = tmp_path_factory.mktemp("served")
    base, adapter, merged = (folder / name for name in ("base", "adapter", "merged"))
    model = tiny_llama(max_position_embeddings=256, initializer_range=0.3)
    model.lm_head.weight.data *= 8  # as sure of its tokens as a trained model
    # do_sample: `transformers serve` ignores the temperature without it.
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(base)
    train(base, adapter, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=12), length=1024)
    return base, adapter, merge_adapter(adapter, merged)


def option(command, name):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    return words[words.index(name) + 1]


def test_overrides_give_the_base_the_rope_of_the_training(trained):
    base, adapter, _ = trained
    expected = load_record(adapter).rope
    vllm, sglang = serve_command(adapter, "vllm"), serve_command(adapter, "sglang")
    config = AutoConfig.from_pretrained(base)
    config.update(json.loads(option(vllm, "--hf-overrides")))
    assert rope_record(config) == expected
    assert option(vllm, "--max-model-len") == option(sglang, "--context-length") == "1024"
    assert option(vllm, "--max-lora-rank") == "16"  # the next size that there is
    assert option(vllm, "--lora-modules") == option(sglang, "--lora-paths") == f"{adapter}={adapter}"
    assert option(vllm, "serve") == option(sglang, "--model-path") == str(base)
    config = AutoConfig.from_pretrained(base)
    for name, value in json.loads(option(sglang, "--json-model-override-args")).items():
        setattr(config, name, value)
    assert rope_record(config) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_serves_the_merged_model(trained, engine, capsys):
    _, adapter, merged = trained
    whole = serve_command(merged, engine)
    assert whole.startswith("# Run" if engine == "transformers" else "# Read, not run: https://")
    assert str(merged) in whole and "merge " not in whole
    assert "1024" in whole or engine == "transformers"  # which serves any length
    assert main(["serve-command", str(adapter), "--engine", engine]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == serve_command(adapter, engine)
    if engine not in ("vllm", "sglang"):
        assert f"hf-longalign merge {adapter} adapter-merged\n" in printed


LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    "config",
    [
        {**LORA, "modules_to_save": ["lm_head"]},
        {**LORA, "use_dora": True},
        {**LORA, "target_modules": ["embed_tokens", "q_proj"]},
        {**LORA, "r": 1024},
        {"peft_type": "LOHA", "base_model_name_or_path": "org/base"},
        {"peft_type": "LORA"},
    ],
)
def test_what_no_server_loads_beside_a_base_is_merged_first(config):
    record = TrainingRecord(RopeRecord("llama", 1024, YARN))
    assert "hf-longalign merge user/long long-merged\nvllm serve long-merged" in command_of(
        record, config, "user/long"
    )
    assert "merge" not in command_of(record, {**LORA, "r": 8, "rank_pattern": {"q": 100}}, "user/long")
    layers = TrainingRecord(RopeRecord("olmo3", 1024, {"full_attention": YARN, "sliding_attention": YARN}))
    assert "merge" in command_of(layers, LORA, "user/long")


def test_commands_are_quoted_and_a_folder_has_its_own_name(tmp_path, monkeypatch):
    record = TrainingRecord(RopeRecord("llama", 1024, YARN))
    folder = tmp_path / "my adapter"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (".", str(folder)):
        _, merge, serve = command_of(record, LORA, name, "tgi").replace("\\\n", "").split("\n")
        assert shlex.split(merge) == ["hf-longalign", "merge", name, "my adapter-merged"]
        assert shlex.split(serve)[1:3] == ["--model-id", "my adapter-merged"]
    *_, gguf = command_of(record, LORA, "user/my long", "llama.cpp").split("\n")
    assert shlex.split(gguf)[2] == "my long-merged.gguf"


def test_what_is_not_there_is_refused_by_name(trained, tmp_path, capsys):
    _, adapter, merged = trained
    out, gone = str(tmp_path / "out"), str(tmp_path / "gone")
    for words, refusal in (
        (["merge", gone, out], f"`adapter` must be a folder or a Hub id, got '{gone}'"),
        (
            ["merge", str(adapter), out, "--base_model", gone],
            f"`base_model` must be a folder or a Hub id, got '{gone}'",
        ),
        (["merge", str(merged), out], f"`adapter` must be an adapter, got '{merged}', which has no adapter_config"),
        (["serve-command", gone], f"`model` must be a folder or a Hub id, got '{gone}'"),
    ):
        assert main(words) == 1
        assert refusal in capsys.readouterr().err


@pytest.mark.parametrize("online", [True, False])
def test_a_path_to_nothing_that_could_be_a_hub_id_is_refused_in_one_line(
    trained, tmp_path, monkeypatch, capsys, online
):
    base, adapter, _ = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(base / "config.json", (tmp_path / "half").mkdir() or "half")
    evaluate_it = ["evaluate", "--output_dir", "out", "--suites", "needle", "--model"]
    gone = "`outputs/typo` must be a folder" if online else "`outputs/typo` is no folder here, its"
    no_base = "`base_model` must be a whole model, got 'outputs/typo'"
    with loopback_hub.as_default(monkeypatch) if online else nullcontext():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
        for words, refusal in (
            ([*evaluate_it, "outputs/typo"], gone),
            ([*evaluate_it, str(base), "--adapter", "outputs/typo"], gone),
            ([*evaluate_it, str(base), "--tokenizer", "outputs/typo"], "`tokenizer` must have a tokenizer that loads"),
            ([*evaluate_it, "half"], "`model` must have a tokenizer that loads, got 'half' with"),
            ([*evaluate_it, "empty"], "`model` must be a whole model, got 'empty', which has no config.json"),
            ([*evaluate_it, str(adapter)], f"which is an adapter. Run `hf-longalign merge {adapter} merged`"),
            ([*evaluate_it, str(base), "--adapter", "empty"], "`adapter` must be an adapter, got 'empty'"),
            (["merge", "outputs/typo", "out"], gone),
            (["merge", "empty", "out"], "`adapter` must be an adapter, got 'empty', which has no adapter_config.json"),
            (["merge", str(adapter), "out", "--base_model", "outputs/typo"], no_base),
            (
                ["merge", str(adapter), "out", "--base_model", "empty"],
                "`base_model` must be a whole model, got 'empty'",
            ),
            (["reach", "outputs/typo", "--dataset", "rows.jsonl"], gone),
            (["serve-command", "outputs/typo"], gone),
            (["serve-command", "empty"], "`empty` has no longalign_config.json, so it was not saved by"),
            (["push", "empty", "--push_dry_run", "look"], "`folder` must hold README.md and Parquet files, got empty"),
        ):
            assert main(words) == 1
            refused = capsys.readouterr().err.splitlines()[-1]
            assert refused.startswith(f"hf-longalign {words[0]}: ") and refusal in refused


@pytest.mark.parametrize(
    ("rope", "what"),
    [
        ({**YARN, "rope_type": "dynamic"}, "rope_type='dynamic'"),
        ({**YARN, "attention_factor": 1.2}, "`attention_factor` in 'yarn' RoPE"),
        ({"full_attention": {**YARN, "rope_type": "longrope"}}, "rope_type='longrope'"),
    ],
)
def test_what_an_engine_computes_otherwise_is_refused(tmp_path, capsys, rope, what):
    record = TrainingRecord(RopeRecord("llama", 1024, rope))
    with pytest.raises(ValueError, match=f"got 'vllm', which may compute {what}"):
        command_of(record, None, "user/long")
    assert "transformers serve user/long" in command_of(record, None, "user/long", "transformers")
    with pytest.raises(ValueError, match="`engine` must be one of vllm"):
        command_of(record, None, "user/long", "ollama")
    save_record(tmp_path, record)
    assert main(["serve-command", str(tmp_path)]) == 1
    assert what in capsys.readouterr().err
    with pytest.raises(ValueError, match="must have a range"):
        command_of(TrainingRecord(RopeRecord("bloom")), None, "user/long")


def test_the_merged_config_is_read_the_same_by_both_transformers(trained):
    _, adapter, merged = trained
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == 4.0
    assert rope_record(AutoConfig.from_pretrained(merged)) == load_record(adapter).rope
    # As transformers 4 reads it, which knows no `rope_parameters`: YaRN from its paper.
    theta, scaling, size = config["rope_theta"], config["rope_scaling"], config["head_dim"]
    original = scaling["original_max_position_embeddings"]
    factor = config["max_position_embeddings"] / original
    low, high = (size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    plain = 1 / theta ** (torch.arange(0, size, 2) / size)
    kept = 1 - ((torch.arange(size // 2) - low) / (high - low)).clamp(0, 1)
    expected = plain / factor * (1 - kept) + plain * kept
    rotary = AutoModelForCausalLM.from_pretrained(merged).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, expected)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)


def test_a_merged_base_without_scaling_has_no_scaling_in_either(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    train(tmp_path / "base", tmp_path / "adapter", length=1024)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", known_answers=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    assert load_record(tmp_path / "merged").answers is None


def test_the_card_of_the_merged_model_says_what_the_adapter_s_does(tmp_path):
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    facts = {"license": "mit", "languages": ["en"], "base_name": "org/base"}
    trainer = make_trainer(tmp_path / "adapter", model=str(tmp_path / "base"), peft_config=lora, **facts)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    card = (merge_adapter(tmp_path / "adapter", tmp_path / "merged") / "README.md").read_text()
    assert all(line in card for line in ("license: mit", "base_model: org/base", "library_name: transformers", "- en"))
    assert "![Relative distances met in training](assets/coverage.png)" in card


def test_plain_peft_warns_of_scaled_rope_and_nothing_else_does(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    options = {"model": str(tmp_path / "base"), "save_strategy": "steps", "save_steps": 1}
    scaled = {**options, "rope_type": "yarn", "skip_target_length": 4096}
    make_trainer(tmp_path / "scaled", peft_config=lora, **scaled).train()
    make_trainer(tmp_path / "plain", peft_config=lora, **options).train()
    with pytest.warns(UserWarning, match=MARK):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "scaled" / "checkpoint-2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{MARK}")
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain" / "checkpoint-2")
        load_adapter(tmp_path / "scaled" / "checkpoint-2")
        merge_adapter(tmp_path / "scaled" / "checkpoint-2", tmp_path / "merged", known_answers=False)
        again = make_trainer(tmp_path / "scaled", peft_config=lora, **scaled)
        again.train(resume_from_checkpoint=str(tmp_path / "scaled" / "checkpoint-1"))


def test_answers_are_greedy_and_sure_and_past_the_range_of_the_base(trained):
    _, _, merged = trained
    found = load_record(merged).answers
    assert max(found.tokens) > 256 and found.chat and len(found.answers) > 3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert known_answers(model, tokenizer, load_record(merged).rope) == found
    asked = zip(found.lines, found.questions, strict=True)
    prompts = [Prompt("probe", "", n, ledger(*prompt), (), 12) for n, prompt in enumerate(asked)]
    answers = {
        prompt.index: completion.text for prompt, completion in LocalGenerator(model, tokenizer).generate(prompts)
    }
    for index, answer in enumerate(found.answers):
        assert answers[index].strip().startswith(answer)
    assert not_past_range(found, load_record(merged).rope) is None
    # Where every token is as likely as any other, it is sure of none.
    model.lm_head.weight.data *= 0
    assert known_answers(model, tokenizer, load_record(merged).rope).answers == []


ASKED = {"suites": ["needle"], "needle_tasks": ["single"], "lengths": [512], "depths": [0.5], "samples": 1,
         "max_new_tokens": 8}  # fmt: skip


class Server(FakeEndpoint):
    """Serves whatever name it is asked for, and has read every prompt whole."""

    async def _answer(self, writer, method, path, headers, raw):
        self.model = json.loads(raw)["model"] if raw else self.model
        return await super()._answer(writer, method, path, headers, raw)

    def _completion(self, entry, kind):
        completion = super()._completion(entry, kind)
        completion["usage"]["prompt_tokens"] = 500
        return completion


def answers_of(folder, **config):
    """What a server would answer that has loaded this folder, its config changed."""
    loaded = AutoConfig.from_pretrained(folder)
    loaded.update(config)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, config=loaded),
        AutoTokenizer.from_pretrained(folder),
    )

    def reply(body):
        prompt = Prompt("probe", "", 0, body["messages"][-1]["content"], (), body["max_tokens"])
        ((_, completion),) = LocalGenerator(model, tokenizer).generate([prompt])
        return completion.text

    return reply


def test_a_server_without_the_scaling_is_refused_by_its_answers(trained, tmp_path):
    pytest.importorskip("openai", reason='needs pip install "hf_longalign[eval]"')
    base, _, merged = trained
    plain = {"rope_parameters": AutoConfig.from_pretrained(base).rope_parameters}
    with Server(model=str(merged), reply=answers_of(merged, **plain)) as server:
        common = {"endpoint": server.url, "output_dir": str(tmp_path / "out"), **ASKED}
        with pytest.raises(
            ValueError, match=r"`endpoint` must answer as .*merged' was trained, got .* fixed prompt of"
        ):
            evaluate(str(merged), **common)
        report = evaluate(str(merged), check_served="off", **common)
        assert report.settings["base: answers as trained"] == "not compared, as `check_served` is off"
    with Server(model=str(merged), reply=answers_of(merged)) as server:
        common = {"endpoint": server.url, "output_dir": str(tmp_path / "right"), **ASKED}
        for _ in range(2):
            settings = evaluate(str(merged), **common).settings
        assert settings["base: answers as trained"].endswith("answered the same")
        assert sum("carts of" in entry.prompt for entry in server.log) == len(load_record(merged).answers.lines)


def test_where_no_answer_lies_past_the_range_of_the_base_it_is_told(trained, tmp_path, monkeypatch, caplog):
    pytest.importorskip("openai", reason='needs pip install "hf_longalign[eval]"')
    _, adapter, merged = trained
    found = load_record(merged).answers
    near = [n for n, tokens in enumerate(found.tokens) if tokens <= 256]
    kept = {name: [getattr(found, name)[n] for n in near] for name in ("lines", "questions", "tokens", "answers")}
    shutil.copytree(merged, tmp_path / "unsure")
    save_record(tmp_path / "unsure", replace(load_record(merged), answers=replace(found, **kept)))
    missing = "none past 256 tokens, the range of its base: the model is not sure of its answers there"
    with Server(model="any", reply=answers_of(merged)) as server:
        common = {"endpoint": server.url, "output_dir": str(tmp_path / "out"), **ASKED}
        settings = evaluate(str(tmp_path / "unsure"), **common).settings
    assert settings["base: answers as trained"].endswith(f"answered the same; {missing}")
    assert missing in caplog.text
    caplog.clear()
    monkeypatch.setattr("hf_longalign.known_answers.MARGIN", 1e9)
    merge_adapter(adapter, tmp_path / "sure of none")
    assert f"sure of none that a server will be compared with, {missing}" in caplog.text


def test_an_adapter_is_compared_with_what_it_answers_here(trained, tmp_path):
    pytest.importorskip("openai", reason='needs pip install "hf_longalign[eval]"')
    base, adapter, merged = trained

    with FakeEndpoint(model=str(adapter), reply=answers_of(base)) as server:
        generator = EndpointGenerator(str(adapter), server.url)
        with pytest.raises(ValueError, match="serve-command"):
            generator.check_answers(load_record(merged).answers, str(adapter))
    with Server(model="any", reply=answers_of(merged)) as server:
        common = {"adapter": str(adapter), "endpoint": server.url, **ASKED}
        refusal = r"must be 'local' or 'off' for '.*adapter', got 'stored': it was trained with yarn RoPE .* of 1,024"
        with pytest.raises(ValueError, match=refusal):
            evaluate(str(base), output_dir=str(tmp_path / "stored"), **common)
        assert not server.log  # before anything is asked
        settings = evaluate(str(base), output_dir=str(tmp_path / "off"), check_served="off", **common).settings
        assert settings["adapter: answers as trained"] == "not compared, as `check_served` is off"
        assert "base: answers as trained" not in settings
        settings = evaluate(str(base), output_dir=str(tmp_path / "local"), check_served="local", **common).settings
        assert settings["adapter: answers as trained"].endswith("answered the same")
    plain = {"rope_parameters": AutoConfig.from_pretrained(base).rope_parameters}
    with Server(model="any", reply=answers_of(merged, **plain)) as server:
        common["endpoint"] = server.url
        with pytest.raises(ValueError, match=r"must answer as '.*adapter' was trained"):
            evaluate(str(base), output_dir=str(tmp_path / "plain"), check_served="local", **common)
    with pytest.raises(ValueError, match="`check_served` must be one of stored, local, off, got 'always'"):
        evaluate(str(base), check_served="always", **ASKED)


def test_what_needs_a_proof_is_told_by_the_rope_of_the_base(trained, tmp_path):
    pytest.importorskip("openai", reason='needs pip install "hf_longalign[eval]"')
    _, _, merged = trained
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    shutil.copytree(merged, whole)
    (whole / "longalign_config.json").unlink()
    train(whole, adapter, length=1024)  # scaled by somebody else: every server reads that in its config
    tiny_tokenizer().save_pretrained(adapter)
    with Server(model="any", reply=lambda body: "salt") as server:
        common = {"endpoint": server.url, **ASKED}
        settings = evaluate(str(whole), str(adapter), output_dir=str(tmp_path / "out"), **common).settings
        assert settings["adapter: answers as trained"] == "not compared, as none are stored"
        save_record(whole, replace(load_record(merged), answers=None))
        settings = evaluate(str(whole), output_dir=str(tmp_path / "whole alone"), **common).settings
        assert settings["base: answers as trained"] == "not compared, as none are stored"


def test_a_real_server_answers_past_the_range_of_the_base_as_the_local_model(trained, tmp_path):
    _, _, merged = trained
    assert serve_command(merged, "transformers").endswith(f"\ntransformers serve {merged} --port 8000")
    with transformers_serve(merged, tmp_path) as url:
        generator = EndpointGenerator(str(merged), url)
        prompt = Prompt("probe", "", 0, ledger(24), (), 32)
        ((_, served),) = generator.generate([prompt])
        told = generator.check_answers(load_record(merged).answers, str(merged))
        wrong = replace(load_record(merged).answers, answers=["Nothing"] * len(load_record(merged).answers.lines))
        with pytest.raises(ValueError, match="must answer as"):
            generator.check_answers(wrong, str(merged))
    assert told.endswith("answered the same")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    local = LocalGenerator(AutoModelForCausalLM.from_pretrained(merged), tokenizer)
    ((_, expected),) = local.generate([prompt])
    assert local.stats.prompt_tokens > 256 and served.text == expected.text
