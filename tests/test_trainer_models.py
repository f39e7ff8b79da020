"""Which models `LongAlignSFTTrainer` takes and how it loads them; what it refuses, and whether the remedies work."""

import dataclasses
import json

import pytest
import torch
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from tiny import chat_dataset, tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_longalign import (
    LongAlignSFTConfig,
    LongAlignSFTTrainer,
    SkipPositionCallback,
    SkipPositionDataCollator,
    scale_rope,
)
from hf_longalign.attention import register_attention, support
from hf_longalign.preflight import PreflightError


SMALL = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def make_trainer(folder, model, *, peft_config=None, dataset=None, **options):
    given = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_length": 128,
        "skip_target_length": 1024,
        "skip_probability": 1.0,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "router_aux_loss_coef": 0.0,
        **options,
    }
    return LongAlignSFTTrainer(
        model,
        args=LongAlignSFTConfig(str(folder / "output"), **given),
        train_dataset=chat_dataset(8) if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def loss_of(trainer):
    trainer.train()
    return next(log["loss"] for log in trainer.state.log_history if "loss" in log)


def build(prefix, kind="", **overrides):
    config_class = getattr(transformers, f"{prefix}{kind}Config")
    fields = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: size for name, size in SMALL.items() if name in fields}
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config_class(**{**sizes, **overrides}))


# --- scaling RoPE ---

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT = {**SMALL, "head_dim": 8, "max_position_embeddings": 256}


def multimodal(name):
    if name == "Gemma3":
        windows = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        config = {"text_config": {**TEXT, **windows}, "vision_config": VISION, "mm_tokens_per_image": 4}
    elif name == "Qwen3_5":
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        config = {"text_config": {**TEXT, "layer_types": ["full_attention"] * 2}, "vision_config": vision}
    else:
        vision = {**VISION, "model_type": "pixtral", "head_dim": 8}
        text = {**TEXT, "model_type": "mistral", "sliding_window": None}
        config = {"text_config": text, "vision_config": vision}
    config = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Qwen3_5", "Mistral3"])
def test_rope_is_scaled_before_the_model_is_loaded(tmp_path, name):
    model = tiny_llama(max_position_embeddings=256) if name == "Llama" else multimodal(name)
    model.save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, str(tmp_path / "model"), rope_type="yarn", model_init_kwargs={"dtype": "float32"})
    loss_of(trainer)  # the preflight holds the frequencies against the config
    assert isinstance(trainer.model, type(model))
    text = trainer.model.config.get_text_config()
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    assert (rope["rope_type"], rope["factor"], text.max_position_embeddings) == ("yarn", 4.0, 1024)
    assert trainer.args.model_init_kwargs == {"dtype": "float32"}
    assert json.loads(trainer.args.to_json_string())["rope_type"] == "yarn"  # as trackers write them


def test_rope_of_a_loaded_model_cannot_be_scaled(tmp_path):
    tiny_llama(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`rope_type` must be None.*scale_rope\(config, 1024, 'linear'\)"):
        make_trainer(tmp_path, model, rope_type="linear")
    config = scale_rope(AutoConfig.from_pretrained(tmp_path / "model"), 1024, "linear")
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    assert loss_of(make_trainer(tmp_path, scaled, rope_type="linear")) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_type": "ntk"}, "`rope_type` must be one of yarn, linear, dynamic, llama3, proportional, got 'ntk'"),
        ({"rope_type": "yarn", "skip_target_length": None}, "`skip_target_length` must be given with `rope_type='ya"),
    ],
)
def test_wrong_rope_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_llama(), **options)


# --- what is exact in padded rows alone, or with ordinary positions alone ---

PADDED_ALONE = {
    "CodeGen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 1024},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 1024},
    "GPTNeoXJapanese": {},
    "StableLm": {},
    "Nemotron": {},
    "Doge": {},
}


@pytest.mark.parametrize("name", PADDED_ALONE)
def test_models_for_padded_rows_alone(tmp_path, name):
    model = build(name, **PADDED_ALONE[name])
    with pytest.raises(ValueError, match=r"would see each other\. Set packing=False to train padded rows\.$"):
        make_trainer(tmp_path, model, packing=True, preflight=False)
    assert loss_of(make_trainer(tmp_path, model, packing=False)) > 0


NEVER_PACKED = {
    "Falcon": {"alibi": False, "num_kv_heads": 2},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 1024},
    "Bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "Rwkv": {"attention_hidden_size": 32, "context_length": 1024},
}


@pytest.mark.parametrize("name", NEVER_PACKED)
def test_models_that_see_a_row_as_one_document(tmp_path, name):
    """Documents leak in them, with ordinary positions too; see `benchmarks/model_classes.py` for the others."""
    model = build(name, **NEVER_PACKED[name])
    with pytest.raises(ValueError, match=r"would see each other\. Set packing=False to train padded rows\.$"):
        make_trainer(tmp_path, model, packing=True, skip_strategy="none", preflight=False)
    assert loss_of(make_trainer(tmp_path, model, packing=False, skip_strategy="none")) > 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}), ("BioGpt", {"hidden_dropout_prob": 0.0})],
)
def test_learned_positions_are_packed_by_the_attention_of_this_package(tmp_path, name, overrides):
    losses = []
    for packing in (False, True):
        model = build(name, **overrides, attention_dropout=0.0)
        options = {"skip_strategy": "none", "packing": packing, "per_device_train_batch_size": 1 if packing else 8}
        losses.append(loss_of(make_trainer(tmp_path, model, **options, max_length=1024)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_an_attention_that_nobody_knows_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(support, "_PADDED_ALONE", {})
    model = build("GPTJ", **PADDED_ALONE["GPTJ"])
    with pytest.raises(ValueError, match="GPTJForCausalLM computes its attention itself, and") as error:
        make_trainer(tmp_path, model, packing=True, preflight=False)
    assert "Set packing=False and skip_strategy='none'." in str(error.value)
    assert loss_of(make_trainer(tmp_path, model, packing=False, skip_strategy="none")) > 0


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_layers_that_are_not_exact_over_skips(tmp_path, packing):
    sizes = {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "index_n_heads": 2, "index_head_dim": 16,
    }  # fmt: skip
    model = build("DeepseekV32", **sizes)
    with pytest.raises(ValueError, match=r'indexed_attention layers .* Set packing=False and skip_strategy="none"\.$'):
        make_trainer(tmp_path, model, packing=packing, preflight=False)
    assert loss_of(make_trainer(tmp_path, model, packing=False, skip_strategy="none")) > 0


def test_windows_whose_attention_knows_no_positions(tmp_path):
    sizes = {"ffn_dim": 48, "head_dim": 8, "audio_vocab_size": 32, "sliding_window": 16, "num_codebooks": 2}
    model = build("Moshi", **sizes)
    for packing in (False, True):
        with pytest.raises(ValueError, match=r'`position_ids` .* Set skip_strategy="none"\.$'):
            make_trainer(tmp_path, model, packing=packing, preflight=False)
        assert loss_of(make_trainer(tmp_path, model, packing=packing, skip_strategy="none")) > 0


# --- the loss ---


def plain_loss(folder, model, strategy):
    """By transformers' own trainer, the loss that the model itself computes."""
    ids = [list(range(5 + start, 25 + start)) for start in range(4)]
    collator = SkipPositionDataCollator(0, target_length=1024, strategy=strategy)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), max_steps=1, logging_steps=1, remove_unused_columns=False, **options),
        data_collator=collator,
        train_dataset=[{"input_ids": row, "labels": [-100] * 10 + row[10:]} for row in ids],
        callbacks=[SkipPositionCallback(collator)],
    )
    return loss_of(trainer)


LLAMA4 = {
    "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention"] * 2,
    "no_rope_layers": [1, 1], "attention_chunk_size": 8192,
}  # fmt: skip
OWN_HEADS = {
    "ModernBertDecoder": ({"sliding_window": 16, "local_attention": 32}, "skip_all", "TRL's loss is not that of Mode"),
    "RecurrentGemma": (
        {
            "block_types": ["recurrent", "attention"],
            "lru_width": 32,
            "head_dim": 8,
            "initializer_range": 1.0,
            "logits_soft_cap": 3.0,
        },
        "none",
        "TRL's loss is not that of RecurrentGemmaForCausalLM",
    ),
    "XLMRoberta": ({"is_decoder": True}, "none", "TRL's loss is not that of XLMRobertaForCausalLM"),
    "Llama4": (LLAMA4, "skip_all", "TRL cannot compute the loss of Llama4ForCausalLM"),
}


@pytest.mark.parametrize("name", OWN_HEADS)
def test_a_loss_that_is_not_the_models_own(tmp_path, name):
    overrides, strategy, message = OWN_HEADS[name]
    model = build(name, kind="Text" if name == "Llama4" else "", **overrides)
    trainer = make_trainer(tmp_path, model, skip_strategy=strategy)
    with pytest.raises(PreflightError, match=message) as error:
        trainer.train()
    assert trainer.state.global_step == 0
    assert "`transformers.Trainer`, `SkipPositionDataCollator` and `SkipPositionCallback`" in str(error.value)
    model = build(name, kind="Text" if name == "Llama4" else "", **overrides)
    if name == "ModernBertDecoder":
        model.set_attn_implementation(register_attention())
    assert plain_loss(tmp_path, model, strategy) > 0


def test_a_model_that_cannot_read_text(tmp_path):
    """Musicgen's decoder takes rows of codebooks."""
    sizes = {"num_codebooks": 4, "ffn_dim": 48}
    trainer = make_trainer(tmp_path, build("Musicgen", "Decoder", **sizes), skip_strategy="none")
    with pytest.raises(
        PreflightError, match=r"MusicgenForCausalLM cannot run on a batch of text .* that reads text alone"
    ):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_is_the_models_own(tmp_path, dtype):
    for options in ({}, {"packing": True}, {"skip_strategy": "none"}, {"packing": True, "skip_strategy": "none"}):
        model = build("Gemma2", head_dim=8, final_logit_softcapping=3.0, initializer_range=0.3).to(dtype)
        assert loss_of(make_trainer(tmp_path, model, **options)) > 0


# --- adapters that put tokens of their own before the rows ---

VIRTUAL = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_have_one_refusal(tmp_path, method):
    for options in ({}, {"packing": True}, {"packing": True, "skip_strategy": "none"}):
        with pytest.raises(PreflightError, match=f"virtual tokens before the rows, got {method}: .*or take LoRA"):
            make_trainer(tmp_path, tiny_llama(), peft_config=VIRTUAL[method], preflight=False, **options)
    ordinary = {"skip_strategy": "none", "packing": False}
    assert loss_of(make_trainer(tmp_path, tiny_llama(), peft_config=VIRTUAL[method], **ordinary)) > 0
    assert loss_of(make_trainer(tmp_path, tiny_llama(), peft_config=LoraConfig(task_type="CAUSAL_LM"))) > 0


# --- rows cut over devices ---


class CopyingHook(AlignDevicesHook):
    """What accelerate does between devices: each layer is handed tensors of its own."""

    def pre_forward(self, module, *args, **kwargs):
        args, kwargs = super().pre_forward(module, *args, **kwargs)
        copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        return args, copies


class CutRows(ParallelismConfig):
    """accelerate's parallelism as its YAML sets it, without the GPUs that it needs."""

    def __bool__(self):
        return False


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"cp_size": 2}, {}, "`cp_size` must be 1 with packed rows, skipped positions or"),
        ({"cp_size": 2}, {"skip_strategy": "none", "loss_weighting": "sequence"}, "`cp_size` must be 1"),
        ({"sp_size": 2}, {"skip_strategy": "none"}, "`sp_size` must be 1, got 2"),
        ({"cp_size": 2}, {"skip_strategy": "none"}, None),
    ],
)
def test_rows_cut_over_devices_are_refused(tmp_path, monkeypatch, sizes, options, message):
    held = property(lambda self: CutRows(**sizes), lambda self, value: None)
    monkeypatch.setattr(AcceleratorState, "parallelism_config", held, raising=False)
    if message is None:
        make_trainer(tmp_path, tiny_llama(), **options)
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_llama(), **options)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    """By TRL in its trainers; `SkipPositionCallback` refuses them in any other."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"does not support `nn\.DataParallel`"):
        make_trainer(tmp_path, tiny_llama(), packing=True)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    Accelerator()  # every trainer has one, whose state says how rows are cut
    for options in ({"padding_free": True, "strategy": "none"}, {}):
        callback = SkipPositionCallback(SkipPositionDataCollator(0, 1024, **options))
        with pytest.raises(ValueError, match=r"`n_gpu` must be 1 .*got 2: .*`accelerate launch --num_processes 2 …`"):
            callback.on_train_begin(args, TrainerState(), TrainerControl(), model=tiny_llama())
    SkipPositionCallback(SkipPositionDataCollator(0, 1024, strategy="none")).on_train_begin(
        args, TrainerState(), TrainerControl(), model=tiny_llama()
    )


def test_layers_on_several_devices_are_one_model(tmp_path):
    """A `device_map` moves what each layer is handed; boundaries and positions come as tensors of its device."""
    model = tiny_llama()
    losses = []
    for spread in (False, True):
        if spread:
            for layer in model.model.layers:
                add_hook_to_module(layer, CopyingHook(execution_device="cpu", io_same_device=True))
        trainer = make_trainer(tmp_path, model, packing=True, learning_rate=0.0)
        losses.append(loss_of(trainer))
    assert losses[0] == losses[1]


def test_a_target_length_past_the_range_names_a_remedy_that_works(tmp_path):
    """A model that is scaled already is scaled by its own type."""
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny_llama(max_position_embeddings=256, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"Set `rope_type='llama3'` and give the model by its name"):
        make_trainer(tmp_path, model)
    model.save_pretrained(tmp_path / "model")
    assert loss_of(make_trainer(tmp_path, str(tmp_path / "model"), rope_type="llama3")) > 0
    scaled = type(model)(scale_rope(model.config, 1024, "llama3"))
    assert loss_of(make_trainer(tmp_path, scaled)) > 0
