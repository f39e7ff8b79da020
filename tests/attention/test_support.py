"""Every backend gives the naive reference's logits and gradients, or the rule says beforehand that it does not.

The reference is one document alone, as the long sequence with a masked token at every skipped position. What
`exactness_problem` refuses must indeed be wrong: the rule forbids nothing that works.
"""

import copy
from functools import partial

import pytest
import torch
from batches import (
    ALL_STRATEGIES,
    ATOL,
    TARGET,
    Document,
    assert_same_gradients,
    batch_logits,
    make_documents,
    packed_batch,
    padded_batch,
    parameter_gradients,
    reference_logits,
)
from families import FAMILIES, HYBRIDS, WINDOW, WINDOWED, naive_logits, tiny_config, tiny_model
from transformers import Gemma3Config, LlamaConfig
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from hf_longalign.attention import ATTENTION_NAME, exactness_problem, has_recurrent_layers, register_attention


register_attention()


def problem_of(family: str, backend: str, packed: bool, strategy: str) -> str | None:
    skipped = strategy != "none"
    return exactness_problem(tiny_config(family), backend, packed=packed, skipped=skipped, target_length=TARGET)


layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@layouts
@pytest.mark.parametrize("strategy", ["mixed", "skip_all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_longalign_varlen_is_exact_forward_and_backward(family, strategy, packed):
    documents = make_documents(strategy)
    model = tiny_model(family, ATTENTION_NAME)
    if problem_of(family, ATTENTION_NAME, packed, strategy):
        assert (family, packed) == ("stablelm", True)
        with pytest.raises(ValueError, match="train padded rows"):
            batch_logits(model, documents, packed)
        return
    expected, actual = reference_logits(family, documents), batch_logits(model, documents, packed)
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)
    assert_same_gradients(parameter_gradients(model, actual), parameter_gradients(tiny_model(family), expected))


@layouts
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_about_eager_is_right_both_ways(family, packed):
    for strategy in ("none", "mixed"):
        documents = make_documents(strategy)
        error = (batch_logits(tiny_model(family), documents, packed) - reference_logits(family, documents)).abs().max()
        refused = problem_of(family, "eager", packed, strategy)
        assert error > 0.05 if refused else error < ATOL, (strategy, float(error), refused)


@layouts
@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", ATTENTION_NAME])
def test_every_strategy_is_exact_or_refused(backend, family, strategy, packed):
    documents = make_documents(strategy)
    if problem_of(family, backend, packed, strategy):
        assert strategy != "none" and backend != ATTENTION_NAME and (packed or family == "gemma3")
        return
    expected, model = reference_logits(family, documents), tiny_model(family, backend)
    actual = batch_logits(model, documents, packed)
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)
    assert_same_gradients(parameter_gradients(model, actual), parameter_gradients(tiny_model(family), expected))


@torch.no_grad()  # flex attention has no backward on CPU
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_is_exact_or_refused(family, monkeypatch):
    # What is refused is a matter of masks, which are the same without a minute of a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    for packed, strategy in [(False, "mixed"), (True, "none"), (True, "mixed")]:
        documents = make_documents(strategy)
        actual = batch_logits(tiny_model(family, "flex_attention"), documents, packed)
        error = (actual - reference_logits(family, documents)).abs().max()
        refused = problem_of(family, "flex_attention", packed, strategy)
        assert error > 0.05 if refused else error < ATOL, (packed, strategy, float(error), refused)


FLASH_ATTENTIONS = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
@layouts
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", FLASH_ATTENTIONS)
def test_flash_attention_is_exact_or_refused(name, family, packed):
    if not FLASH_ATTENTIONS[name]():
        pytest.skip(f"{name} is not installed")
    for strategy in ("none", "mixed"):
        documents = make_documents(strategy)
        batch = packed_batch(documents) if packed else padded_batch(documents)
        batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        model = copy.deepcopy(tiny_model(family)).to("cuda", torch.bfloat16)
        model.set_attn_implementation(name)
        logits = model(**batch, use_cache=False).logits
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        error = (logits[kept].float().cpu() - reference_logits(family, documents)).abs().mean()
        refused = problem_of(family, name, packed, strategy)
        assert error > 0.2 if refused else error < 0.1, (strategy, float(error), refused)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt_oss", "deepseek_v3"])
def test_documents_may_start_anywhere_and_a_row_may_end_in_padding(family):
    documents = [Document(d.input_ids, d.positions + 5 * i) for i, d in enumerate(make_documents("mixed"))]
    padding = Document(torch.zeros(3).long(), torch.zeros(3).long())
    actual = batch_logits(tiny_model(family, ATTENTION_NAME), [*documents, padding], packed=True)
    torch.testing.assert_close(actual[:-3], reference_logits(family, documents), atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_left_padding_and_holes_in_the_mask(family):
    documents = make_documents("mixed")
    batch = padded_batch(documents)
    for row, document in enumerate(documents):
        shift = batch["input_ids"].shape[1] - len(document.input_ids)
        for key in batch:
            batch[key][row] = batch[key][row].roll(shift)
    # The naive reference itself: its gaps are holes in the mask.
    long = documents[0].positions[-1] + 1
    holes = {"input_ids": torch.zeros(1, long).long(), "attention_mask": torch.zeros(1, long).long()}
    holes["input_ids"][0, documents[0].positions] = documents[0].input_ids
    holes["attention_mask"][0, documents[0].positions] = 1
    expected, model = reference_logits(family, documents), tiny_model(family, ATTENTION_NAME)
    actual = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)
    actual = model(**holes, use_cache=False).logits[0, documents[0].positions]
    torch.testing.assert_close(actual, expected[: len(actual)], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_are_exact_padded_and_refused_packed(family):
    documents, model = make_documents("mixed"), tiny_model(family, ATTENTION_NAME)
    # Recurrent layers have no positions to skip: the reference is the document alone with its positions.
    expected = [
        tiny_model(family)(
            d.input_ids[None], position_ids=d.positions[None], attention_mask=torch.ones(1, len(d.input_ids))
        )
        for d in documents
    ]
    expected = torch.cat([output.logits[0] for output in expected])
    assert has_recurrent_layers(model.config)
    actual = batch_logits(model, documents, packed=False)
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)
    assert_same_gradients(parameter_gradients(model, actual), parameter_gradients(tiny_model(family), expected))
    assert problem_of(family, ATTENTION_NAME, False, "mixed") is None
    assert "packing=False" in problem_of(family, ATTENTION_NAME, True, "none")


def test_windows_are_as_small_as_the_families_say():
    for family in FAMILIES:
        kinds = getattr(tiny_config(family), "layer_types", None) or ["full_attention"]
        windowed = tiny_config(family).sliding_window if hasattr(tiny_config(family), "sliding_window") else None
        assert (windowed == WINDOW) == (family in WINDOWED), (family, windowed, kinds)


def rule(config, backend, packed=True, skipped=True, **kwargs):
    return exactness_problem(config, backend, packed=packed, skipped=skipped, **kwargs)


def test_rule_for_flash_attention():
    names = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2")
    for name in (*names, "kernels-community/vllm-flash-attn3", "kernels-community/flash-attn2@v1.2"):
        assert rule(LlamaConfig(), name) is None
        assert rule(tiny_config("mistral_window"), name, skipped=False) is None
        problem = rule(tiny_config("mistral_window"), name, packed=False)
        assert name in problem and "sliding_attention" in problem and ATTENTION_NAME in problem
        assert rule(tiny_config("mistral_window"), name, target_length=WINDOW) is None
    for name in ("somebody/attention", "somebody/flash-attn2", "kernels-community/flash-mla"):
        assert "not known" in rule(LlamaConfig(), name)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn", "linear", "llama3"])
def test_rule_for_rope_that_reads_the_largest_position(kind):
    own = {
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }.get(kind, {"factor": 4.0})
    config = copy.deepcopy(tiny_config("llama"))
    config.max_position_embeddings = 64 if kind == "dynamic" else 256
    config.rope_parameters = {
        "rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64, **own
    }  # fmt: skip
    reads_largest = kind in ("dynamic", "longrope")
    torch.manual_seed(0)
    model = type(tiny_model("llama"))._from_config(config, attn_implementation="eager").eval()
    documents = make_documents("mixed")
    for target in (64, 128):
        # The last document is stretched to the target length.
        last = documents[-1].positions.clone()
        last[-1] = target - 1
        documents[-1] = Document(documents[-1].input_ids, last)
        model.set_attn_implementation("eager")
        expected = torch.cat([naive_logits(model, d.input_ids, d.positions) for d in documents])
        model.set_attn_implementation(ATTENTION_NAME)
        error = (batch_logits(model, documents, packed=True) - expected).abs().max()
        refused = rule(config, ATTENTION_NAME, target_length=target)
        assert (kind in refused and error > 0.05) if refused else error < ATOL, (target, float(error), refused)
        assert bool(refused) == (reads_largest and target > 64)
    assert rule(config, ATTENTION_NAME, packed=False, skipped=False, target_length=128) is None


def test_rule_for_layers_nobody_knows():
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in rule(config, ATTENTION_NAME, packed=False, skipped=False)
    assert "chunked_attention" in rule(config, "flash_attention_2")
    assert rule(config, "eager", packed=False, skipped=False) is None


def test_rule_reads_the_language_model_of_a_multimodal_config():
    config = Gemma3Config(text_config=tiny_config("gemma3").to_dict())
    assert "sliding_attention" in rule(config, "sdpa")
    assert rule(config, ATTENTION_NAME) is None
