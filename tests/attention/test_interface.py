"""The attention inside models: registration, masks, refusals, generation and training."""

import gc
import weakref

import pytest
import torch
from batches import ATOL, batch_logits, make_documents, packed_batch, padded_batch, parameter_gradients
from families import FAMILIES, HYBRIDS, VOCABULARY, tiny_config, tiny_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    StaticCache,
)

from hf_longalign.attention import interface
from hf_longalign.attention.interface import ATTENTION_NAME, longalign_attention, longalign_mask, register_attention
from hf_longalign.attention.packing import window_segments


register_attention()


def test_registering_twice_changes_nothing():
    assert register_attention() == register_attention() == ATTENTION_NAME
    assert AttentionInterface()[ATTENTION_NAME] is longalign_attention
    assert AttentionMaskInterface()[ATTENTION_NAME] is longalign_mask


def test_mask_is_the_padding_or_none():
    padding = torch.tensor([[True, True, False], [True, True, True]])
    assert longalign_mask(2, 3, 3) is None
    assert longalign_mask(2, 3, 3, attention_mask=torch.ones(2, 3, dtype=torch.bool)) is None
    assert torch.equal(longalign_mask(2, 3, 3, attention_mask=padding), padding[:, None, None])
    # A sliding cache has dropped the first token; a static one has room for two more.
    dropped = longalign_mask(2, 1, 2, q_offset=2, kv_offset=1, attention_mask=padding)
    assert torch.equal(dropped, padding[:, None, None, 1:])
    assert torch.equal(longalign_mask(2, 3, 5), torch.ones(2, 1, 1, 3, dtype=torch.bool))
    assert torch.equal(longalign_mask(2, 3, 5, attention_mask=padding), padding[:, None, None])


def test_chunked_attention_is_refused():
    config = Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=4,
    )  # fmt: skip
    model = Llama4ForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME).eval()
    ids = torch.randint(0, VOCABULARY, (1, 9))
    with pytest.raises(ValueError, match=r'chunked_overlay.*Set attn_implementation="sdpa" and train padded'):
        model(ids, use_cache=False)
    model.set_attn_implementation("sdpa")
    assert model(ids, use_cache=False).logits.isfinite().all()


def test_images_that_see_all_of_themselves_are_refused_and_text_is_not():
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=tiny_config("gemma3").to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=ATTENTION_NAME).eval()
    ids = torch.randint(3, VOCABULARY, (1, 12))
    with pytest.raises(ValueError, match="or_masks"):
        model(ids, token_type_ids=torch.ones(1, 12).long(), use_cache=False)
    actual = model(ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(actual, model(ids, use_cache=False).logits, atol=ATOL, rtol=0)


def test_a_vision_tower_keeps_its_own_attention():
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    text = {**tiny_config("mistral").to_dict(), "model_type": "mistral"}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=2, spatial_merge_size=1)
    torch.manual_seed(0)
    model = Mistral3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = torch.cat([torch.full((1, 4), 2), torch.randint(3, VOCABULARY, (1, 8))], dim=1)
    image = {"pixel_values": torch.randn(1, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]])}
    expected = model(ids, **image, use_cache=False).logits
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ValueError, match=r'"text_config": "longalign_varlen", "vision_config": "sdpa"'):
        model(ids, **image, use_cache=False)
    model.set_attn_implementation({"text_config": ATTENTION_NAME, "vision_config": "sdpa"})
    torch.testing.assert_close(model(ids, **image, use_cache=False).logits, expected, atol=ATOL, rtol=0)


def test_bidirectional_models_are_refused():
    config = tiny_config("llama")
    config.is_causal = False
    model = type(tiny_model("llama"))._from_config(config, attn_implementation=ATTENTION_NAME)
    with pytest.raises(ValueError, match="bidirectional"):
        model(torch.randint(3, VOCABULARY, (1, 9)), use_cache=False)


def packed_with(**changes):
    return packed_batch(make_documents("mixed")) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seq_lens_q": None, "cu_seq_lens_k": None}, "`position_ids` must rise within a row"),
        ({"cu_seq_lens_k": torch.tensor([0, 1, 43])}, "`cu_seq_lens_k` must equal"),
        ({"cu_seq_lens_q": torch.tensor([0, 12, 42])}, "must rise from 0 to the row's length 43"),
        ({"attention_mask": torch.tensor([[0] + [1] * 42])}, "must not both be given"),
        ({"attention_mask": torch.ones(1, 1, 43, 43, dtype=torch.bool)}, r"mask of shape \(1, 1, 43, 43\)"),
        ({"input_ids": torch.ones(2, 43, dtype=torch.long)}, "needs one packed row, got a batch of 2"),
        ({"output_attentions": True}, "returning attention weights"),
    ],
)
def test_wrong_inputs_are_refused(changes, message):
    for family in ("llama", "gemma3"):
        with pytest.raises(ValueError, match=message):
            tiny_model(family, ATTENTION_NAME)(**packed_with(**changes), use_cache=False)


def test_ones_for_a_mask_do_not_stand_for_boundaries():
    batch = packed_with(cu_seq_lens_q=None, cu_seq_lens_k=None, attention_mask=torch.ones(1, 43).long())
    with pytest.raises(ValueError, match="`position_ids` must rise within a row"):
        tiny_model("llama", ATTENTION_NAME)(**batch, use_cache=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"cache": object()}, "paged cache"),
        ({"indices": torch.zeros(1)}, "indexer"),
        ({"sinks": torch.zeros(1)}, "sinks that differ"),
        ({"is_causal": False}, "not causal"),
        ({"softcap": 2.0, "s_aux": torch.zeros(4)}, "softcap and attention sinks"),
        ({"sliding_window": 4}, r"`position_ids` of shape \(batch, length\)"),
        ({"sliding_window": 4, "position_ids": torch.zeros(3, 1, 5)}, r"got \(3, 1, 5\)"),
    ],
)
def test_unsupported_layers_are_refused(given, message):
    layer = tiny_model("llama", ATTENTION_NAME).model.layers[0].self_attn
    states = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match=message):
        longalign_attention(layer, states, states, states, None, **given)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_generation_from_left_padded_prompts_equals_eager(family, cache):
    prompts = torch.randint(3, VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    mask[0, :5], mask[2, :11] = 0, 0
    prompts[mask == 0] = 0
    results = []
    for name in ("eager", ATTENTION_NAME):
        model = tiny_model(family, name)
        past = StaticCache(config=model.config, max_cache_len=40) if cache == "static" else None
        output = model.generate(
            prompts, attention_mask=mask, past_key_values=past, max_new_tokens=20, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True, disable_compile=True,
        )  # fmt: skip
        results.append((output.sequences, torch.stack(output.logits)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt_oss"])
def test_several_tokens_after_a_filled_cache(family):
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(4))
    model = tiny_model(family, ATTENTION_NAME)
    past = model(ids[:, :12], use_cache=True).past_key_values
    actual = model(ids[:, 12:], past_key_values=past, use_cache=True).logits
    expected = tiny_model(family)(ids, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_a_static_cache_without_a_mask():
    ids = torch.randint(3, VOCABULARY, (2, 9))
    model = tiny_model("llama", ATTENTION_NAME)
    past = StaticCache(config=model.config, max_cache_len=16)
    actual = torch.cat([model(part, past_key_values=past).logits for part in ids.split([6, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(actual, tiny_model("llama")(ids, use_cache=False).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    documents, model = make_documents("mixed"), tiny_model(family, ATTENTION_NAME)
    expected = parameter_gradients(model, batch_logits(model, documents, packed=True))
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        logits = batch_logits(model, documents, packed=True)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits.log_softmax(-1) * weights).sum().backward()
        for name, gradient in expected.items():
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=ATOL, rtol=1e-4)
    finally:
        model.zero_grad()
        model.eval().gradient_checkpointing_disable()
        model.disable_input_require_grads()


def test_dropout_is_applied_in_training_only():
    config = tiny_config("llama")
    config.attention_dropout = 0.5
    model = type(tiny_model("llama"))._from_config(config, attn_implementation=ATTENTION_NAME).eval()
    batch = packed_batch(make_documents("mixed"))
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.allclose(model(**batch).logits, model(**batch).logits, atol=0.01)


def test_a_compiled_model_gives_the_same():
    documents, model = make_documents("mixed"), tiny_model("gemma2", ATTENTION_NAME)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        actual, expected = (batch_logits(any_model, documents, packed=True) for any_model in (compiled, model))
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_norms_kept_in_float32_do_not_mix_dtypes():
    model = type(tiny_model("qwen3"))._from_config(tiny_config("qwen3"), attn_implementation=ATTENTION_NAME)
    model = model.to(torch.bfloat16).eval()
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.float()
    logits = model(**packed_batch(make_documents("mixed")), use_cache=False).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_boundaries_are_laid_out_once_per_forward(monkeypatch):
    calls = []
    monkeypatch.setattr(interface, "window_segments", lambda *a: calls.append(a[2]) or window_segments(*a))
    batch_logits(tiny_model("mistral_window", ATTENTION_NAME), make_documents("mixed"), packed=True)
    assert calls == [8]


@pytest.mark.parametrize("make_batch", [packed_batch, padded_batch])
def test_what_is_remembered_dies_with_the_batch(make_batch):
    batch = make_batch(make_documents("mixed"))
    if make_batch is padded_batch:
        del batch["attention_mask"]
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(3, -1) * 2
    alive = [weakref.ref(value) for value in batch.values() if isinstance(value, torch.Tensor)]
    tiny_model("mistral_window", ATTENTION_NAME)(**batch, use_cache=False)
    del batch
    gc.collect()
    assert not any(tensor() is not None for tensor in alive)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@cuda
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "deepseek_v3"])
def test_cuda_model_equals_cpu(family, packed):
    documents = make_documents("mixed")
    batch = packed_batch(documents) if packed else padded_batch(documents)
    model = type(tiny_model(family))._from_config(tiny_config(family), attn_implementation=ATTENTION_NAME).eval()
    expected = model(**batch, use_cache=False).logits
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    actual = model.cuda()(**batch, use_cache=False).logits
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(actual[kept].cpu(), expected[kept.cpu()], atol=1e-3, rtol=1e-3)
    if family in ("gpt_oss", "deepseek_v3"):
        return  # half precision sends tokens to other experts
    half = model.to(torch.bfloat16)(**batch, use_cache=False).logits
    assert (half[kept].float().cpu() - expected[kept.cpu()]).abs().mean() < 0.1 * expected.abs().mean()


def test_the_boundaries_are_read_once_per_forward(monkeypatch):
    """On a GPU each read waits for all work under way; a batch that was moved there holds them twice."""
    calls = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(self.shape) or tolist(self))
    model = type(tiny_model("llama"))._from_config(tiny_config("llama"), attn_implementation=ATTENTION_NAME)
    batch = packed_batch(make_documents("mixed"))
    batch = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    model(**batch, use_cache=False)
    assert len(calls) == 1
