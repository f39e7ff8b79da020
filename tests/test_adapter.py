"""An adapter trained with scaled RoPE comes back with it, alone or merged; loaded the plain way it does not."""

import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3_5Config,
)
from transformers import Qwen3_5ForConditionalGeneration as Qwen3_5

from hf_longalign.adapter import check_weights, load_adapter, weights_sample
from hf_longalign.merge import merge_adapter
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import rope_record, scale_rope
from hf_longalign.run_record import load_record, save_record


FAR = torch.tensor([[0, 1, 2, 100, 101, 250]])


def logits(model):
    ids = torch.arange(3, 9)[None]
    # In training mode, without dropout: in the other one bitsandbytes has a kernel for CPUs that rounds to bfloat16.
    return model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=FAR).logits.detach()


def train(base, adapter, peft_config=None, new_tokens=0, length=256, **load):
    """An adapter trained on a base model of range 64 at range 256, as saved, and the trained model's logits."""
    loader = load.pop("loader", AutoModelForCausalLM)
    model = loader.from_pretrained(base, config=scale_rope(AutoConfig.from_pretrained(base), length), **load)
    if new_tokens:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + new_tokens)
    model = get_peft_model(
        model, peft_config or LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    trained = model.get_base_model()
    save_record(adapter, TrainingRecord(rope_record(trained.config), architecture=type(trained).__name__))
    return logits(model)


@pytest.fixture
def trained(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(max_position_embeddings=64, initializer_range=0.3).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    return base, adapter, train(base, adapter)


def test_loaded_as_trained(trained):
    _, adapter, expected = trained
    model = load_adapter(adapter)
    assert isinstance(model, PeftModel)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_plain_loading_gives_other_logits(trained):
    base, adapter, expected = trained
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_base_given_by_the_caller(trained, tmp_path, caplog):
    base, adapter, expected = trained
    moved = base.rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "hf_longalign"):
        model = load_adapter(adapter, base_model=moved, dtype="float64")
    assert "was trained on" in caplog.text
    assert model.dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), expected, rtol=1e-4, atol=1e-5)


def test_base_already_loaded(trained):
    base, adapter, expected = trained
    config = scale_rope(AutoModelForCausalLM.from_pretrained(base).config, 256)
    model = load_adapter(adapter, base_model=AutoModelForCausalLM.from_pretrained(base, config=config))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_base_loaded_without_the_scaling(trained):
    base, adapter, _ = trained
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"rope_parameters.factor = None instead of 4.0"):
        load_adapter(adapter, base_model=model)
    scaled = scale_rope(model.config, 256)
    model.config.rope_parameters, model.config.max_position_embeddings = scaled.rope_parameters, 256
    with pytest.raises(ValueError, match="set on a loaded model, where it does nothing"):
        load_adapter(adapter, base_model=model)


def test_another_kind_of_base(trained):
    base, adapter, _ = trained
    record = load_record(adapter)
    save_record(adapter, replace(record, rope=replace(record.rope, model_type="qwen3")))
    with pytest.raises(ValueError, match="must be a 'qwen3', as in training, got 'llama'"):
        load_adapter(adapter, base_model=base)


def test_adapter_without_a_record(trained):
    _, adapter, _ = trained
    (adapter / "longalign_config.json").unlink()
    with pytest.raises(ValueError, match="was not saved by `LongAlignSFTTrainer`"):
        load_adapter(adapter)


def test_a_base_with_other_weights(trained, tmp_path):
    _, adapter, _ = trained
    sample = weights_sample(tiny_llama(initializer_range=0.3))
    save_record(adapter, replace(load_record(adapter), base_weights=sample))
    other = tmp_path / "other"
    tiny_llama(seed=1, max_position_embeddings=64, initializer_range=0.3).save_pretrained(other)
    load_adapter(adapter)
    with pytest.raises(ValueError, match=r"got others in `model\.embed_tokens\.weight`"):
        load_adapter(adapter, base_model=other)


def test_the_same_weights_pass_in_any_precision():
    sample = weights_sample(tiny_llama())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_weights(sample, tiny_llama().to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_changes_no_sample(options):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    sample, plain = weights_sample(model.get_base_model()), weights_sample(tiny_llama())
    assert sample == plain | {name: values for name, values in sample.items() if "q_proj" in name}
    assert sum("q_proj" in name for name in sample) == 2
    check_weights(sample, tiny_llama())
    check_weights(plain, model.get_base_model())  # of an older record


def test_a_beginning_taken_from_the_base_is_no_sample_of_it():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(tiny_llama(), config)
    assert weights_sample(model.get_base_model()) == weights_sample(tiny_llama())


def test_an_adapter_is_refused_on_its_own_merged_model(trained, tmp_path):
    base, adapter, _ = trained
    sample = weights_sample(load_adapter(adapter).get_base_model())
    save_record(adapter, replace(load_record(adapter), base_weights=sample))
    tiny_tokenizer().save_pretrained(adapter)
    merged = merge_adapter(adapter, tmp_path / "merged", known_answers=False)
    with pytest.raises(ValueError, match=r"must have the weights .* others in `model\.layers\.0\.self_attn\.q_proj"):
        load_adapter(adapter, base_model=merged)
    with pytest.raises(ValueError, match="must have the weights its adapter was trained on"):
        merge_adapter(adapter, tmp_path / "twice", base_model=merged)
    load_adapter(adapter, base_model=base, dtype="bfloat16")


def test_experts_that_are_adapted_tell_a_base_apart():
    def experts(seed=0):
        torch.manual_seed(seed)
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
        return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **small))

    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")]
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=[], target_parameters=targets)
    model = get_peft_model(experts(), config)
    sample = weights_sample(model.get_base_model())
    assert sorted(set(sample) - set(weights_sample(experts()))) == names
    for same in (model.get_base_model(), experts(), experts().bfloat16()):
        check_weights(sample, same)
    other = experts()
    other.get_parameter(names[1]).data *= 1.1  # as merged
    with pytest.raises(ValueError, match=rf"got others in `{names[1]}`"):
        check_weights(sample, other)


def test_a_quantised_base_and_a_plain_one_take_the_adapters_of_each_other(trained, tmp_path):
    pytest.importorskip("bitsandbytes", reason='needs pip install "hf_longalign[quant]"')
    _, adapter, _ = trained
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    whole, quantised = load_adapter(adapter), load_adapter(adapter, quantization_config=bits)
    samples = [weights_sample(model.get_base_model()) for model in (whole, quantised)]
    assert samples[0].items() > samples[1].items()
    for sample in samples:
        for model in (whole, quantised):
            check_weights(sample, model.get_base_model())


def test_new_tokens_change_no_sample():
    grown = tiny_llama()
    grown.resize_token_embeddings(400)
    check_weights(weights_sample(tiny_llama()), grown)


@pytest.mark.parametrize("change", ["seed", "layers"])
def test_other_weights_are_refused(change):
    sample = weights_sample(tiny_llama())
    other = tiny_llama(seed=1) if change == "seed" else tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="must have the weights"):
        check_weights(sample, other)


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
WITH_EMBEDDINGS = {
    "nothing": {},
    "input trained anew": {"modules_to_save": ["embed_tokens"]},
    "output trained anew": {"modules_to_save": ["lm_head"]},
    "both trained anew": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the input": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the output": {"target_modules": ["q_proj", "lm_head"]},
    "some tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("new_tokens", [0, 16], ids=["same size", "resized"])
@pytest.mark.parametrize("embeddings", WITH_EMBEDDINGS)
def test_merged_and_loaded_the_plain_way(tmp_path, embeddings, new_tokens, tied, caplog):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied).save_pretrained(base)
    tiny_tokenizer().save_pretrained(adapter)
    expected = train(base, adapter, LoraConfig(**{**LORA, **WITH_EMBEDDINGS[embeddings]}), new_tokens)
    loaded = logits(load_adapter(adapter))
    if new_tokens and embeddings.startswith("LoRA on") and not tied:
        # PEFT saves no row of the other embeddings then: what is lost is told, the old tokens are right.
        lost = "lm_head" if embeddings == "LoRA on the input" else "model.embed_tokens"
        assert f"without the rows of `{lost}` for 16 new tokens" in caplog.text
        torch.testing.assert_close(loaded[..., :384], expected[..., :384], rtol=0, atol=1e-5)
        return
    assert "new tokens" not in caplog.text
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    output = merge_adapter(adapter, tmp_path / "merged", max_shard_size="40KB")
    assert len(list(output.glob("*.safetensors"))) > 1
    whole = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)
    assert whole.config.rope_parameters["rope_type"] == "yarn"
    assert whole.config.max_position_embeddings == AutoTokenizer.from_pretrained(output).model_max_length == 256
    assert whole.config.vocab_size == whole.lm_head.weight.shape[0] == 384 + new_tokens
    shared = whole.lm_head.weight is whole.model.embed_tokens.weight
    assert shared == whole.config.tie_word_embeddings == (tied and embeddings in ("nothing", "some tokens"))
    assert replace(load_record(output), answers=None) == load_record(adapter)
    assert "The RoPE that it was trained with stands in its config." in (output / "README.md").read_text()
    half = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, tmp_path / "half", dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    for name, weight in half.state_dict().items():
        torch.testing.assert_close(weight.float(), whole.state_dict()[name], rtol=2**-6, atol=2**-6)


def test_a_merge_of_a_quantised_base_is_whole(tmp_path):
    pytest.importorskip("bitsandbytes", reason='needs pip install "hf_longalign[quant]"')
    base, adapter, quantised = tmp_path / "base", tmp_path / "adapter", tmp_path / "quantised"
    size = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.3}
    tiny_llama(**size).save_pretrained(base)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=bits).save_pretrained(quantised)
    tiny_tokenizer().save_pretrained(quantised)
    expected = train(quantised, adapter)
    output = merge_adapter(adapter, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(output)
    assert not hasattr(whole.config, "quantization_config")
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)
    # The base of a QLoRA that was quantised while loading: merged into the weights on disk.
    train(base, adapter, quantization_config=bits)
    tiny_tokenizer().save_pretrained(adapter)
    output = merge_adapter(adapter, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(whole), logits(load_adapter(adapter)), rtol=0, atol=1e-4)


def test_multimodal_checkpoints_load_as_they_were_trained(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    text = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2,
        "layer_types": ["full_attention"], "initializer_range": 0.3,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    Qwen3_5(Qwen3_5Config(text_config=text, vision_config=vision)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    expected = train(base, adapter, loader=Qwen3_5)
    torch.testing.assert_close(logits(load_adapter(adapter)), expected, rtol=0, atol=1e-5)
    # Which loads the text model alone, with other module names.
    whole = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, tmp_path / "merged"))
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)
    text_alone = AutoModelForCausalLM.from_pretrained(
        base, config=scale_rope(Qwen3_5Config.from_pretrained(base), 256)
    )
    with pytest.raises(ValueError, match="must have the modules its adapter was trained on, got Qwen3_5ForCausalLM"):
        load_adapter(adapter, base_model=text_alone)


OWN_CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\n"
    'class OwnConfig(LlamaConfig):\n    model_type = "own"\n',
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}


def test_a_base_with_code_of_its_own_is_merged(trained, tmp_path):
    base, adapter, expected = trained
    for name, text in OWN_CODE.items():
        (base / name).write_text(text)
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (base / "config.json").write_text(json.dumps(config))
    record = load_record(adapter)
    rope = replace(record.rope, model_type="own")
    save_record(adapter, replace(record, rope=rope, architecture="OwnForCausalLM"))
    tiny_tokenizer().save_pretrained(adapter)
    merged = merge_adapter(adapter, tmp_path / "merged", trust_remote_code=True)
    whole = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True)
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)


def test_merges_that_cannot_be_are_refused(trained, tmp_path):
    base, adapter, _ = trained
    with pytest.raises(ValueError, match="`output_dir` must be another folder"):
        merge_adapter(adapter, adapter)
    with pytest.raises(ValueError, match="`quantization_config` must be left out"):
        merge_adapter(adapter, tmp_path / "merged", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    prompt = tmp_path / "prompt"
    train(base, prompt, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="got PROMPT_TUNING, which puts virtual tokens"):
        merge_adapter(prompt, tmp_path / "merged")
    assert isinstance(load_adapter(prompt), PeftModel)  # the remedy
    assert not (tmp_path / "merged").exists()


def test_the_tokenizer_of_a_merge_is_decided_before_the_base_is_loaded(trained, tmp_path, monkeypatch):
    base, adapter, _ = trained
    merged = merge_adapter(adapter, tmp_path / "merged", known_answers=False)  # saved without one
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tiny_tokenizer().get_vocab()
    monkeypatch.setattr("hf_longalign.merge.load_base", None)
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"`adapter` must have a tokenizer that loads, got .* Save one into the folder"
    ):
        merge_adapter(adapter, tmp_path / "none")
    for path in (*adapter.glob("tokenizer*"), *base.glob("tokenizer*")):
        path.unlink()
    with pytest.raises(ValueError, match="`base_model` must have a tokenizer that loads"):
        merge_adapter(adapter, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    tiny_tokenizer().save_pretrained(adapter)  # the remedy
    with pytest.raises(TypeError, match="NoneType"):
        merge_adapter(adapter, tmp_path / "none")


def without_the_adapter(model, **kwargs):
    return model.unload()


def to_nan(model, **kwargs):
    merged = model.unload()
    merged.lm_head.weight.data[5] = torch.nan
    return merged


def another_layer(model, **kwargs):
    merged = model.base_model.merge_and_unload()
    merged.model.layers[0].self_attn.v_proj.weight.data *= 1.1
    return merged


@pytest.mark.parametrize("merge", [without_the_adapter, to_nan, another_layer])
def test_a_merge_that_changes_the_model_is_refused(trained, tmp_path, monkeypatch, merge):
    _, adapter, _ = trained
    monkeypatch.setattr(PeftModel, "merge_and_unload", merge, raising=False)
    for dtype, remedy in (("float32", "Load it with"), ("bfloat16", "Set `dtype` to float32, or load it with")):
        with pytest.raises(ValueError, match=f"must give the same when merged.*{remedy} `load_adapter`"):
            merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("size", "told"), [(0.02, "warned"), (0.003, "refused")])
def test_what_rounding_takes_of_an_adapter_is_told(trained, tmp_path, caplog, size, told):
    """A change below half the distance of two numbers is lost when it is added to a weight."""
    _, adapter, _ = trained
    small = tmp_path / "small"
    shutil.copytree(adapter, small)
    tiny_tokenizer().save_pretrained(small)
    weights = load_file(small / "adapter_model.safetensors")
    weights = {name: weight * (size if "lora_B" in name else 1) for name, weight in weights.items()}
    save_file(weights, small / "adapter_model.safetensors")
    # The same by hand: as much of each change as a rounded sum keeps.
    model = load_adapter(small, dtype="float32")
    held = changed = 0.0
    for name, layer in model.get_base_model().named_modules():
        if name.endswith(("q_proj", "v_proj")):
            plain, change = layer.get_base_layer().weight.bfloat16().float(), layer.get_delta_weight("default")
            held += float((((plain + change).bfloat16().float() - plain) * change).sum())
            changed += float(change.square().sum())
    if told == "refused":
        with pytest.raises(ValueError, match=r"got \d+% of what the adapter .*Set `dtype` to float32") as refusal:
            merge_adapter(small, tmp_path / "merged", dtype="bfloat16")
        found = refusal.value.args[0].partition("got ")[2]
    else:
        merge_adapter(small, tmp_path / "merged", dtype="bfloat16", known_answers=False)
        found = caplog.text.partition("merged weights hold ")[2]
    assert int(re.match(r"\d+", found)[0]) == pytest.approx(100 * held / changed, abs=3)
    caplog.clear()
    merge_adapter(small, tmp_path / "whole", dtype="float32", known_answers=False)  # the remedy
    assert "merged weights hold" not in caplog.text
