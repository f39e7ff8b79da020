"""The preflight passes what is right, on every family, and names each known way to be wrong."""

import logging
import sys

import pytest
import torch
from families import FAMILIES, HYBRIDS, WINDOWED, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    CpmAntConfig,
    FalconConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
)

from hf_longalign.attention import register_attention, support
from hf_longalign.collator import SkipPositionDataCollator
from hf_longalign.preflight import PreflightError, run_preflight
from hf_longalign.rope import scale_rope


VARLEN = register_attention()
REFUSED_PACKED = {"stablelm"}


def collator(packed=False, target_length=256, **overrides):
    return SkipPositionDataCollator(0, target_length=target_length, padding_free=packed, **overrides)


def llama(attn_implementation="sdpa", **overrides):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        **overrides,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation=attn_implementation)


# --- no false alarm ---


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_families_pass(family, packed):
    if packed and family in REFUSED_PACKED:
        with pytest.raises(PreflightError, match="does not hand `cu_seq_lens_q` on to its attention"):
            run_preflight(tiny_model(family, VARLEN), collator(packed))
        return
    report = run_preflight(tiny_model(family, VARLEN), collator(packed))
    assert report.leak < 1e-5
    assert report.shift < 1e-4
    assert report.near > 0.1
    assert report.stretch > 1e-3
    # A window of 8 in every layer: no token sees over a skip of 240 positions.
    assert (report.far == 0) == (family in ("mistral_window", "phi3_window", "phimoe"))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WINDOWED))
def test_padded_rows_pass_on_other_backends(family, backend):
    assert run_preflight(tiny_model(family, backend), collator()).leak < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_bfloat16_models_pass(family):
    torch.manual_seed(0)
    config = tiny_config(family)
    config.initializer_range = 0.02
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN, dtype=torch.bfloat16)
    assert run_preflight(model, collator(packed=family not in REFUSED_PACKED)).leak < 0.01


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_pass_padded_with_a_warning(family, caplog):
    with caplog.at_level(logging.WARNING, "hf_longalign"):
        assert run_preflight(tiny_model(family, VARLEN), collator()) is not None
    assert "skips act on its attention layers only" in caplog.text


@pytest.mark.parametrize(
    "strategy", ["skip_inner", "skip_outer", "skip_all", "skip_context", "pose", "randpos", "cream"]
)
@pytest.mark.parametrize("target_length", [8, 9, 64, 256])
def test_every_strategy_and_small_target_lengths(strategy, target_length):
    for packed in (False, True):
        assert run_preflight(llama(VARLEN), collator(packed, target_length, strategy=strategy)).leak == 0


def test_padding_to_a_multiple():
    for packed in (False, True):
        assert run_preflight(llama(VARLEN), collator(packed, pad_to_multiple_of=16)).leak == 0


def test_far_positions():
    model = llama(
        VARLEN, max_position_embeddings=1_000_000, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    report = run_preflight(model, collator(True, 1_000_000))
    assert report.far > 0.1
    assert report.shift < 1e-4


def test_ordinary_positions_need_no_rope():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    for packed in (False, True):
        assert run_preflight(model, collator(packed, strategy="none")).leak == 0
    assert run_preflight(model, collator(strategy="none"), pads=False) is None


def test_padding_that_is_taken_for_text():
    """It stands to the left, this model believes, and looks for no mask."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 16}
    model = AutoModelForCausalLM.from_config(CpmAntConfig(**sizes, num_hidden_layers=1, prompt_length=4))
    with pytest.raises(PreflightError, match=r"a padded batch is not what it is alone .*_train_batch_size=1"):
        run_preflight(model, collator(strategy="none"))
    assert run_preflight(model, collator(strategy="none"), pads=False) is None


def test_positions_that_a_model_gives_itself(monkeypatch):
    """RoBERTa's begin at 2, for which a packed batch knows no word; here it stands for models that nobody knows."""
    monkeypatch.setattr(support, "_NEVER_PACKED", frozenset())
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, num_hidden_layers=1, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
    with pytest.raises(PreflightError, match=r"a packed batch is not what it is alone .* Set packing=False\.$"):
        run_preflight(model, collator(packed=True, strategy="none"))


def test_packing_without_skips():
    report = run_preflight(llama(VARLEN), collator(True, strategy="none"))
    assert report.leak == 0
    assert report.near is None
    # The target length is not used then, so it may lie beyond the range.
    assert run_preflight(llama("sdpa"), collator(True, 4096, strategy="none")).leak == 0


def test_attention_that_does_not_reach_the_logits(caplog):
    model = llama()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert run_preflight(model, collator()) is None
    assert "could not see attention at work" in caplog.text


@pytest.mark.parametrize("init", [0.02, 0.3])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_pass(tmp_path, bits, init):
    pytest.importorskip("bitsandbytes", reason='needs pip install "hf_longalign[quant]"')
    llama(hidden_size=64, intermediate_size=128, initializer_range=init).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, device_map="cpu", dtype=torch.bfloat16, attn_implementation=VARLEN
    )
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(task_type="CAUSAL_LM"))
    for packed in (False, True):
        assert run_preflight(model, collator(packed)).near > 0.1


# --- the model is left as it was ---


def wrapped(kind):
    model = llama(VARLEN, attention_dropout=0.5)
    if kind == "lora":
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable()
    return model


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["plain", "lora", "checkpointing", "ddp"])
def test_model_is_left_as_it_was(kind, one_process_group):
    model = wrapped(kind).train()
    list(model.modules())[3].eval()  # a user may keep some of it in evaluation mode
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state, grads = torch.get_rng_state(), [parameter.requires_grad for parameter in model.parameters()]
    batches = collator(packed=True)
    assert run_preflight(model, batches).leak == 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert batches == collator(packed=True)
    assert vars(batches)["_without_place"] == 0


def test_modes_come_back_after_a_failure():
    model = llama().train()
    with pytest.raises(PreflightError):
        run_preflight(model, Without("attention_mask"))
    assert all(module.training for module in model.modules())


# --- mutations: each known way to be wrong is caught by name ---


class Without(SkipPositionDataCollator):
    """Batches that lack some of what the collator gives."""

    def __init__(self, *keys, packed=False, ones=False):
        super().__init__(0, target_length=256, padding_free=packed)
        self.keys = keys
        self.ones = ones

    def __call__(self, rows):
        batch = super().__call__(rows)
        for key in self.keys:
            del batch[key]
        if self.ones:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch


BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_skips_without_a_mask(backend):
    with pytest.raises(
        PreflightError, match=r"Attention is cut at skipped positions: in a padded batch under"
    ) as error:
        run_preflight(llama(backend), Without("attention_mask"))
    assert f'"{backend}" attention (full_attention)' in str(error.value)
    assert "with their `attention_mask`" in str(error.value)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "olmo3"])
def test_skips_without_a_mask_under_windows(family):
    model = tiny_model(family, "sdpa" if family != "gpt_oss" else "eager")
    with pytest.raises(PreflightError, match="counts the window of sliding_attention layers in tokens"):
        run_preflight(model, Without("attention_mask"))


@pytest.mark.parametrize("strategy", ["skip_context", "none"])
def test_logits_that_are_no_numbers(strategy):
    """They move by nothing that a comparison could see."""
    model = llama(VARLEN)
    torch.nn.init.constant_(model.lm_head.weight[3:], torch.nan)
    with pytest.raises(PreflightError, match="logits must be numbers, got NaN"):
        run_preflight(model, collator(strategy=strategy))


def test_a_loss_that_is_no_number():
    with pytest.raises(PreflightError, match="TRL's loss is not that of LlamaForCausalLM"):
        run_preflight(llama(VARLEN), collator(), log_probs=lambda _, batch: batch["labels"][:, 1:] * torch.nan)


def test_packing_on_a_backend_that_reads_positions():
    with pytest.raises(PreflightError, match='"sdpa" takes every skipped position in a packed row for the end of a'):
        run_preflight(llama("sdpa"), collator(packed=True))


def replace_attention(monkeypatch, function):
    """Let the name of the package's attention stand for a broken one."""
    mapping = {**AttentionInterface._global_mapping, VARLEN: function}
    masks = {
        **AttentionMaskInterface._global_mapping,
        VARLEN: lambda *args, attention_mask=None, **kwargs: attention_mask,
    }
    monkeypatch.setattr(AttentionInterface, "_global_mapping", mapping)
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)


def attend(query, key, value, scaling, visible):
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def broken_attention(boundaries, causal=True):
    """Attention within what `boundaries(length, kwargs)` says: int (length,), the document of each token."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        document = boundaries(query.shape[2], kwargs)
        visible = document[:, None] == document
        return attend(query, key, value, scaling, visible.tril() if causal else visible)

    return attention


def of_positions_at_the_least(length, kwargs):
    """As flash attention infers them without `cu_seq_lens`: a document begins wherever the smallest position is."""
    positions = kwargs["position_ids"][0]
    return (positions == positions.min()).cumsum(0)


def of_position_jumps(length, kwargs):
    """As transformers' masks infer them: a document begins wherever the position is not the next one."""
    positions = kwargs["position_ids"][0]
    return torch.cat([torch.zeros(1), (positions.diff() != 1)]).cumsum(0)


def of_lengths(length, kwargs):
    starts = torch.zeros(length, dtype=torch.long)
    starts[kwargs["cu_seq_lens_q"][1:-1].long()] = 1
    return starts.cumsum(0)


def off_by_one(length, kwargs):
    return of_lengths(length, kwargs).roll(1)


def one_for_all(length, kwargs):
    return torch.zeros(length)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        (of_positions_at_the_least, "Document boundaries are taken from the position ids"),
        (of_position_jumps, "Attention is cut at skipped positions: in a packed batch"),
        (one_for_all, "Documents leak into each other: changing document 0 of a packed batch moved document 1"),
        (off_by_one, "Documents leak into each other"),
    ],
)
def test_broken_boundaries(monkeypatch, boundaries, message):
    model = llama(VARLEN)
    replace_attention(monkeypatch, broken_attention(of_lengths))
    assert run_preflight(model, collator(packed=True)).leak == 0
    replace_attention(monkeypatch, broken_attention(boundaries))
    with pytest.raises(PreflightError, match=message) as error:
        run_preflight(model, collator(packed=True))
    assert f'"{VARLEN}"' in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [0.02, 0.3])
def test_a_leak_in_one_layer_of_many(monkeypatch, dtype, init):
    model = llama(VARLEN, num_hidden_layers=12, initializer_range=init).to(dtype)

    def attention(module, *args, **kwargs):
        return broken_attention(one_for_all if module.layer_idx == 7 else of_lengths)(module, *args, **kwargs)

    replace_attention(monkeypatch, attention)
    with pytest.raises(PreflightError, match="Documents leak into each other"):
        run_preflight(model, collator(packed=True))


def test_a_mask_of_ones_over_a_packed_row():
    model = llama("sdpa")
    with pytest.raises(PreflightError, match="Documents leak into each other"):
        run_preflight(model, WithoutSkips(*BOUNDARIES, packed=True, ones=True))


class WithoutSkips(Without):
    """The same with ordinary positions, which transformers' masks can pack."""

    def __init__(self, *keys, **kwargs):
        super().__init__(*keys, **kwargs)
        self.strategy = "none"


def test_a_mask_of_ones_over_a_packed_row_with_skips():
    with pytest.raises(PreflightError, match=r'"longalign_varlen" attention .* refused a packed batch: '):
        run_preflight(llama(VARLEN), Without(*BOUNDARIES, packed=True, ones=True))


def test_no_boundaries_at_all():
    with pytest.raises(PreflightError, match="neither `cu_seq_lens_q` nor `attention_mask` says where"):
        run_preflight(llama(VARLEN), Without(*BOUNDARIES, packed=True))


def test_attention_that_is_not_causal(monkeypatch):
    model = llama(VARLEN)
    replace_attention(monkeypatch, broken_attention(of_lengths, causal=False))
    with pytest.raises(PreflightError, match="Tokens see later ones"):
        run_preflight(model, collator(packed=True))


TINY_POSITIONS = {
    "gpt2": (GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2), r"'gpt2' with learned absolute .*wpe\)"),
    "opt": (
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        ),
        r"'opt' with learned absolute positions \(model.decoder.embed_positions\)",
    ),
    "bloom": (BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), "'bloom' with ALiBi"),
    "mpt": (MptConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2), "'mpt' with ALiBi"),
    "falcon": (
        FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True),
        "'falcon' with ALiBi",
    ),
}


@pytest.mark.parametrize("name", TINY_POSITIONS)
def test_positions_that_are_not_rotary(name):
    config, message = TINY_POSITIONS[name]
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PreflightError, match=rf"Positions can be skipped only where they are rotary, got {message}"):
        run_preflight(model, collator())


@pytest.mark.parametrize(
    ("name", "message"), [("gpt2", "Positions are not relative: shifting"), ("bloom", "Position ids do not count")]
)
@pytest.mark.parametrize("init", [0.02, 0.3])
def test_positions_found_out_by_behaviour(monkeypatch, name, message, init):
    """A model of unknown make is found out without its config."""
    monkeypatch.setattr(sys.modules["hf_longalign.preflight"], "_position_kind", lambda *args: "rotary")
    config = TINY_POSITIONS[name][0]
    config.initializer_range = init
    with pytest.raises(PreflightError, match=message):
        run_preflight(AutoModelForCausalLM.from_config(config), collator())


def test_no_positions_at_all(monkeypatch):
    """RoPE that turns by no angle at all."""
    model = llama(VARLEN)
    model.model.rotary_emb.inv_freq.zero_()
    with pytest.raises(PreflightError, match="Position ids do not count: stretching a skip from 16 to 64 positions"):
        run_preflight(model, collator(packed=True))


def test_range_too_short():
    model = llama()
    with pytest.raises(PreflightError, match="must be at most 256, the range of this 'llama' model, got 257") as error:
        run_preflight(model, collator(target_length=257))
    assert "config=hf_longalign.scale_rope(config, 257, 'yarn')" in str(error.value)
    scaled = AutoModelForCausalLM.from_config(scale_rope(model.config, 257, "yarn"))
    assert run_preflight(scaled, collator(target_length=257)).leak == 0


def test_range_claimed_after_loading():
    model = llama(max_position_embeddings=64)
    scaled = scale_rope(model.config, 256)
    model.config.rope_parameters, model.config.max_position_embeddings = scaled.rope_parameters, 256
    with pytest.raises(PreflightError, match=r"`model.rotary_emb` does not turn as its config says"):
        run_preflight(model, collator())


def test_chunked_attention():
    config = Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        max_position_embeddings=256,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    )
    with pytest.raises(PreflightError, match='"sdpa" is not exact for chunked_attention layers'):
        run_preflight(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), collator())


def test_windows_everywhere_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "hf_longalign"):
        run_preflight(tiny_model("mistral_window", VARLEN), collator())
    assert "slide over 8 positions: a skip of that size or more cuts a sample in two" in caplog.text
