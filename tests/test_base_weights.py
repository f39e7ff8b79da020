"""An adapter knows its base by its weights: under another name, precision or quantisation, and no other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_longalign.base_weights import check_weights, weights_sample


def test_the_same_weights_pass_in_any_precision():
    sample = weights_sample(tiny_llama())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_weights(sample, tiny_llama().to(dtype))


def test_an_adapter_changes_nothing():
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    assert weights_sample(model.get_base_model()) == weights_sample(tiny_llama())


def test_new_tokens_change_nothing():
    grown = tiny_llama()
    grown.resize_token_embeddings(400)
    check_weights(weights_sample(tiny_llama()), grown)


@pytest.mark.parametrize("change", ["seed", "layers"])
def test_other_weights_are_refused(change):
    sample = weights_sample(tiny_llama())
    other = tiny_llama(seed=1) if change == "seed" else tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="must have the weights"):
        check_weights(sample, other)
