"""The generator on vLLM, against a stand-in of vLLM's documented interface: there is no GPU."""

import ast
import asyncio
import inspect
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest
import vllm_stand_in
from tiny_chat import make_tiny_chat

from hf_longalign.cli import main
from hf_longalign.endpoint.protocol import GenerationError, Request, Sampling
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.run_record import save_record
from hf_longalign.synthesis import ContextSynthesisBuilder, VLLMGenerator

from .fakes import FakeGenerator, make_pairs


ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The stand-in, in the place of vLLM."""
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = vllm_stand_in.LoRARequest
    for name, module in {"vllm": vllm_stand_in, "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_stand_in.LLM, "made", [])
    monkeypatch.setattr(vllm_stand_in.LLM, "asked", [])
    return vllm_stand_in.LLM


def ask(generator, *prompts, chat=True, **sampling):
    """The outcome of each prompt, a reply or an error."""

    async def all_of_them():
        found = [
            Request((("user", prompt),), generator.model, Sampling(**{"max_tokens": 12} | sampling), "context", chat)
            for prompt in prompts
        ]
        outcomes = await asyncio.gather(*map(generator.reply, found), return_exceptions=True)
        await generator.close()
        return outcomes

    return asyncio.run(all_of_them())


def save_adapter(folder, record=True, **config):
    folder.mkdir()
    lora = {"peft_type": "LORA", "r": 12, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    if record:
        save_record(folder, TrainingRecord(RopeRecord("llama", 2048, ROPE)))
    return str(folder)


def test_a_reply_depends_on_its_request_alone(folder, vllm):
    together = ask(VLLMGenerator(str(folder)), "one", "two", "three")
    alone = [ask(VLLMGenerator(str(folder), batch_size=1), prompt)[0] for prompt in ("one", "two", "three")]
    assert together == alone and len({reply.text for reply in together}) == 3
    assert [len(prompts) for prompts, _, _ in vllm.asked] == [3, 1, 1, 1]
    first = together[0]
    assert (first.finish_reason, first.completion_tokens, first.cached_tokens) == ("length", 12, 7)
    # Twice the same prompt without a seed, as retries ask it: two draws, two replies.
    assert ask(VLLMGenerator(str(folder)), "one", seed=None) != ask(
        VLLMGenerator(str(folder)), "one", seed=None, draw=1
    )


def test_what_is_sampled_and_sent(folder, vllm):
    ask(VLLMGenerator(str(folder)), "one", temperature=0.5, top_p=0.9, extra={"min_p": 0.1, "stop": ["\n"]})
    ((prompts, (params,), lora),) = vllm.asked
    assert (params.temperature, params.top_p, params.min_p, params.max_tokens) == (0.5, 0.9, 0.1, 12)
    assert params.stop == ["\n"] and lora is None
    tokenizer = vllm(str(folder)).get_tokenizer()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], add_generation_prompt=True, return_dict=False
    )
    assert prompts == [{"prompt_token_ids": chat}]
    vllm.asked.clear()
    ask(VLLMGenerator(str(folder)), "one", chat=False, temperature=None, extra={"max_completion_tokens": 3})
    ((prompts, (params,), _),) = vllm.asked
    assert prompts == [{"prompt_token_ids": tokenizer("one")["input_ids"]}]
    assert (params.temperature, params.max_tokens) == (1.0, 3)


def test_of_several_replies_to_a_request_the_first_counts(folder, vllm, monkeypatch):
    """As `n` in `extra_body` asks for them."""
    expected, generate = ask(VLLMGenerator(str(folder)), "one", "two"), vllm.generate

    def generate_two(self, *prompts, **options):
        found = generate(self, *prompts, **options)
        for output in found:
            output.outputs.append(replace(output.outputs[0], text="the second"))
        return found

    monkeypatch.setattr(vllm, "generate", generate_two)
    assert ask(VLLMGenerator(str(folder)), "one", "two") == expected


def test_what_cannot_be_served_is_refused_alone(folder):
    generator = VLLMGenerator(str(folder))
    (long,) = ask(generator, "one", max_tokens=600)
    assert isinstance(long, GenerationError) and long.kind == "too_long"
    for extra in ({"best_of": 3}, {"min_p": 3}):
        (refused,) = ask(generator, "one", extra=extra)
        assert isinstance(refused, GenerationError) and refused.kind == "bad_request"


def test_prefixes_are_cached_and_options_go_to_vllm(folder, vllm):
    ask(VLLMGenerator(str(folder), revision="v2"), "one")
    ask(VLLMGenerator(str(folder), enable_prefix_caching=False, max_model_len=100), "one")
    assert vllm.made[0]["enable_prefix_caching"] is True and vllm.made[0]["revision"] == "v2"
    assert vllm.made[1]["enable_prefix_caching"] is False and vllm.made[1]["max_model_len"] == 100


def test_an_adapter_gets_the_rope_it_was_trained_with(folder, vllm, tmp_path):
    adapter = save_adapter(tmp_path / "long")
    generator = VLLMGenerator(str(folder), adapter=adapter)
    ask(generator, "one")
    (made,), ((_, _, lora),) = vllm.made, vllm.asked
    assert made["hf_overrides"] == {"rope_parameters": ROPE, "max_position_embeddings": 2048}
    assert (made["max_model_len"], made["enable_lora"], made["max_lora_rank"]) == (2048, True, 16)
    assert lora.lora_path == adapter and str(tmp_path) not in generator.model
    assert generator.model.startswith(f"{VLLMGenerator(str(folder)).model}+long-")


def test_an_adapter_that_vllm_would_change_is_refused(folder, tmp_path):
    dora = save_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match=r"`adapter` must be .* Merge it with `hf-longalign merge"):
        asyncio.run(VLLMGenerator(str(folder), adapter=dora).check())
    with pytest.raises(ValueError, match=r"has no longalign_config\.json"):
        unknown = save_adapter(tmp_path / "unknown", record=False)
        asyncio.run(VLLMGenerator(str(folder), adapter=unknown).check())


def test_overrides_are_another_model(folder, vllm):
    names = {
        VLLMGenerator("org/tiny", **more).model
        for more in ({}, {"hf_overrides": {"rope_parameters": ROPE}}, {"hf_overrides": {"rope_parameters": {}}})
    }
    assert len(names) == 3
    ask(VLLMGenerator(str(folder), hf_overrides={"rope_parameters": ROPE}), "one")
    assert vllm.made[0]["hf_overrides"] == {"rope_parameters": ROPE}


def test_without_vllm_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "hf_longalign\[vllm\]"'):
        asyncio.run(VLLMGenerator(str(folder)).check())


def test_a_data_set_is_written(folder, vllm, monkeypatch, tmp_path):
    fake = FakeGenerator()
    monkeypatch.setattr(vllm, "write", lambda self, prompt: fake.write(Request((("user", prompt),), "x")))
    generator = VLLMGenerator(str(folder), max_model_len=10_000)
    options = {"seeds": make_pairs(4), "n_distractors": 1, "min_words": 20, "max_tokens": 2000}
    builder = ContextSynthesisBuilder(generator=generator, cache_dir=tmp_path, show_progress=False, **options)
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
    assert len(rows) == 4 and set(rows["generator"]) == {"vllm"} and set(rows["model"]) == {generator.model}


def test_the_command_line_asks_vllm(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, make_pairs(4))))
    arguments = ["synthesize", "--seeds", str(pairs), "--cache_dir", str(tmp_path), "--dry_run", "--n_distractors=1"]
    more = ["--model", "org/tiny", "--vllm_options", json.dumps({"hf_overrides": {"rope_parameters": ROPE}})]
    assert main([*arguments, *more, "--generator", "vllm"]) == 0
    assert "generator  vllm org/tiny+overrides-" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, *more, "--generator", "transformers"])
    assert "`vllm_options` must be unset" in capsys.readouterr().err


def _declared(path, name):
    """The fields of a class, or the arguments of one of its methods, with the defaults that are constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owner, _, method = name.partition(".")
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner]
    if not method:
        return {field.target.id: field.value for field in found.body if isinstance(field, ast.AnnAssign)}
    (call,) = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == method]
    arguments = call.args
    defaults = dict(zip(reversed([one.arg for one in arguments.args]), reversed(arguments.defaults), strict=False))
    kept = {one.arg: default for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    return {one.arg: defaults.get(one.arg) for one in arguments.args} | kept


DOCUMENTED = {
    "LLM.__init__": "entrypoints/llm.py",
    "LLM.generate": "entrypoints/llm.py",
    "SamplingParams": "sampling_params.py",
    "LoRARequest": "lora/request.py",
    "CompletionOutput": "outputs.py",
    "RequestOutput.__init__": "outputs.py",
    "EngineArgs": "engine/arg_utils.py",
    "TokensPrompt": "inputs/llm.py",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_stand_in_is_as_documented(name, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm")
    installed = find_spec("vllm")
    if installed is None:
        pytest.skip('needs the sources of vLLM: pip install "hf_longalign[vllm]"')
    theirs = _declared(Path(installed.origin).parent / DOCUMENTED[name], name)
    for argument in inspect.signature(attrgetter(name)(vllm_stand_in)).parameters.values():
        if argument.kind is argument.VAR_KEYWORD:
            continue
        assert argument.name in theirs, f"{name} has no {argument.name}"
        default = theirs[argument.name]
        if isinstance(default, ast.Constant):
            assert argument.default == default.value, argument.name
