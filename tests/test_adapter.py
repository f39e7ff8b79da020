"""An adapter trained with scaled RoPE comes back with it; loaded the plain way it does not."""

import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_longalign.adapter import load_adapter
from hf_longalign.base_weights import weights_sample
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import rope_record, scale_rope
from hf_longalign.run_record import load_record, save_record


FAR = torch.tensor([[0, 1, 2, 100, 101, 250]])


def logits(model):
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=FAR).logits


@pytest.fixture
def trained(tmp_path):
    """A base model of range 64 on disk, an adapter trained on it at range 256, and what the trained model says."""
    base = tmp_path / "base"
    tiny_llama(max_position_embeddings=64, initializer_range=0.3).save_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, config=scale_rope(plain.config, 256))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    save_record(adapter, TrainingRecord(rope_record(model.get_base_model().config)))
    return base, adapter, logits(model)


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
