"""RoPE scaling: ranges of real configurations, written by hand, and scaling against transformers' own frequencies."""

import json
import logging
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from hf_longalign.records.base import dumps
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.rope import (
    apply_rope,
    check_range,
    check_rope,
    check_rope_reached,
    model_range,
    rope_record,
    scale_rope,
)
from hf_longalign.run_record import RECORD_NAME, load_record, save_record


QWEN_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}
DEEPSEEK_YARN = {"rope_type": "yarn", "rope_theta": 10000, "factor": 40, "original_max_position_embeddings": 4096}
DEEPSEEK_YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PHI3_FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

# The positions of published models, as their config.json and model card give them.
PUBLISHED = {
    "llama-3.1-8b": (LlamaConfig(max_position_embeddings=131072, rope_parameters={**LLAMA31}), 131072),
    "llama-3.2-1b": (LlamaConfig(max_position_embeddings=131072, rope_parameters={**LLAMA31, "factor": 32.0}), 131072),
    "llama-2-7b": (LlamaConfig(max_position_embeddings=4096), 4096),
    "qwen2.5-7b": (Qwen2Config(max_position_embeddings=32768), 32768),
    "qwen2.5-7b, yarn of its card": (
        Qwen2Config(max_position_embeddings=32768, rope_parameters={**QWEN_YARN}),
        131072,
    ),
    "qwen3-4b": (Qwen3Config(max_position_embeddings=40960), 40960),
    "qwen3-4b, yarn of its card": (
        Qwen3Config(max_position_embeddings=40960, rope_parameters={**QWEN_YARN}),
        131072,
    ),
    "qwen3-4b, the old yarn": (Qwen3Config(max_position_embeddings=40960, rope_scaling=OLD_YARN), 131072),
    "gpt-oss-20b": (GptOssConfig(), 131072),
    "deepseek-v3": (
        AutoConfig.for_model("deepseek_v3", max_position_embeddings=163840, rope_parameters=DEEPSEEK_YARN),
        163840,
    ),
    "gemma-3-4b": (
        Gemma3Config(
            text_config={"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        ),
        131072,
    ),
    "olmo-3-7b": (
        Olmo3Config(
            max_position_embeddings=65536,
            rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
        ),
        65536,
    ),
    "phi-3-mini-128k": (
        Phi3Config(
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            hidden_size=3072,
            num_attention_heads=32,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **PHI3_FACTORS},
        ),
        131072,
    ),
    "mistral-7b-v0.1": (MistralConfig(max_position_embeddings=32768, sliding_window=4096), 32768),
    "deepseek-coder-6.7b, linear inside its range": (
        LlamaConfig(max_position_embeddings=16384, rope_parameters={"rope_type": "linear", "factor": 4.0}),
        16384,
    ),
    "internlm2.5-7b, dynamic": (
        LlamaConfig(max_position_embeddings=32768, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        65536,
    ),
    "gpt-2": (GPT2Config(), 1024),
}


def tiny():
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)


def frequencies(config):
    return AutoModelForCausalLM.from_config(config).model.rotary_emb


@pytest.mark.parametrize("name", PUBLISHED)
def test_range_of_published_models(name):
    config, expected = PUBLISHED[name]
    assert model_range(config) == expected


def test_no_range():
    with pytest.raises(ValueError, match=r"`max_position_embeddings` must be .* 'bloom'"):
        model_range(BloomConfig())


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize("target_length", [100, 128, 1000])
def test_scaling_covers_the_target_exactly(rope_type, target_length, caplog):
    with caplog.at_level(logging.WARNING):
        scaled = scale_rope(tiny(), target_length, rope_type)
    assert not caplog.records  # transformers warns of parameters it finds odd
    assert model_range(scaled) == target_length
    assert scaled.rope_parameters["factor"] == target_length / 64
    assert scaled.rope_parameters["rope_theta"] == tiny().rope_parameters["rope_theta"]


def test_yarn_reaches_the_model():
    scaled = scale_rope(tiny(), 256, beta_fast=16)
    plain, yarn = frequencies(tiny()), frequencies(scaled)
    # YaRN by its definition: the slowest dimension is interpolated by the whole factor, the fastest left alone.
    ratio = plain.inv_freq / yarn.inv_freq
    assert ratio[0].item() == pytest.approx(1.0)
    assert ratio[-1].item() == pytest.approx(4.0)
    assert yarn.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    assert scaled.rope_parameters["beta_fast"] == 16


def test_linear_reaches_the_model():
    plain, linear = frequencies(tiny()), frequencies(scale_rope(tiny(), 256, "linear"))
    torch.testing.assert_close(plain.inv_freq / 4, linear.inv_freq)


def test_scaled_config_survives_saving(tmp_path):
    scaled = scale_rope(tiny(), 256)
    scaled.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert rope_record(again) == rope_record(scaled)
    torch.testing.assert_close(frequencies(again).inv_freq, frequencies(scaled).inv_freq)


def test_long_enough_is_left_alone():
    config = PUBLISHED["llama-3.1-8b"][0]
    scaled = scale_rope(config, 131072)
    assert scaled is not config
    assert scaled.to_dict() == config.to_dict()


def test_config_given_is_not_changed():
    config = tiny()
    before = config.to_dict()
    scale_rope(config, 256)
    assert config.to_dict() == before


def test_qwen3_as_its_card_says():
    scaled = scale_rope(Qwen3Config(max_position_embeddings=40960), 131072, original_max_position_embeddings=32768)
    assert scaled.rope_parameters["factor"] == 4.0
    assert scaled.rope_parameters["original_max_position_embeddings"] == 32768
    assert model_range(scaled) == scaled.max_position_embeddings == 131072


def test_scaled_further_by_the_same_type():
    scaled = scale_rope(PUBLISHED["llama-3.1-8b"][0], 262144, "llama3")
    assert scaled.rope_parameters == {**LLAMA31, "factor": 16.0}
    scaled = scale_rope(PUBLISHED["deepseek-v3"][0], 327680)
    assert scaled.rope_parameters["factor"] == 80
    assert scaled.rope_parameters["mscale_all_dim"] == 1.0
    scaled = scale_rope(scale_rope(tiny(), 128, "dynamic"), 256, "dynamic")
    assert scaled.rope_parameters["factor"] == 4.0
    assert scaled.max_position_embeddings == 64


def test_not_scaled_by_another_type():
    with pytest.raises(ValueError, match=r"`rope_type` must be 'llama3'.*got 'yarn'"):
        scale_rope(PUBLISHED["llama-3.1-8b"][0], 262144)


def test_full_attention_layers_alone_are_scaled():
    config = Gemma3TextConfig(max_position_embeddings=8192, num_hidden_layers=6)
    sliding = dict(config.rope_parameters["sliding_attention"])
    scaled = scale_rope(config, 32768)
    assert scaled.rope_parameters["sliding_attention"] == sliding
    assert scaled.rope_parameters["full_attention"]["factor"] == 4.0
    assert scaled.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert model_range(scaled) == 32768


def test_gemma_4_is_scaled_by_its_own_type():
    """Its RoPE turns a part of each head alone; the factor interpolates that part like "linear"."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 16}
    config = Gemma4TextConfig(
        **sizes, global_head_dim=16, num_key_value_heads=1, num_hidden_layers=2, max_position_embeddings=64,
        hidden_size_per_layer_input=4, vocab_size_per_layer_input=32, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="`rope_type` must be 'proportional'"):
        scale_rope(config, 256)
    scaled = scale_rope(config, 256, "proportional")
    assert model_range(scaled) == 256
    plain, further = (AutoModelForCausalLM.from_config(one) for one in (config, scaled))
    check_rope_reached(further)
    before, after = (dict(model.named_buffers()) for model in (plain, further))
    name = "model.rotary_emb.{}_inv_freq"
    torch.testing.assert_close(before[name.format("full_attention")] / 4, after[name.format("full_attention")])
    torch.testing.assert_close(before[name.format("sliding_attention")], after[name.format("sliding_attention")])


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-4b, yarn of its card", "olmo-3-7b"])
def test_the_remedy_past_the_range_works(name):
    config, limit = PUBLISHED[name]
    check_range(config, limit)
    with pytest.raises(ValueError, match=f"`length` must be at most {limit}.*scale_rope") as error:
        check_range(config, 2 * limit, "length")
    remedy = re.search(r"scale_rope\(config, (\d+), '(\w+)'\)", str(error.value))
    check_range(scale_rope(config, int(remedy[1]), remedy[2]), 2 * limit)


def test_rope_that_follows_the_longest_of_a_batch_is_no_remedy():
    config, limit = PUBLISHED["phi-3-mini-128k"]
    with pytest.raises(ValueError, match=r"got \d+\. Lower `length`\.$"):
        check_range(config, 2 * limit, "length")


def test_rope_of_an_unknown_type_is_not_scaled():
    config = tiny()
    config.rope_parameters = {"rope_type": "axial", "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"'axial' cannot be scaled further\. Lower the target length to at most 64"):
        scale_rope(config, 256)
    with pytest.raises(ValueError, match=r"got 256\. Lower `target_length`\.$"):
        check_range(config, 256)
    assert scale_rope(config, 64).rope_parameters == config.rope_parameters


def test_text_part_of_a_multimodal_config():
    scaled = scale_rope(PUBLISHED["gemma-3-4b"][0], 262144, "linear")
    assert scaled.text_config.rope_parameters["full_attention"]["factor"] == 16.0
    assert scaled.text_config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert model_range(scaled) == 262144


def test_longrope():
    config = Phi3Config(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, num_hidden_layers=1)
    config.original_max_position_embeddings = 64
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    scaled = scale_rope(config, 256, "longrope", **factors)
    assert scaled.rope_parameters["factor"] == 4.0
    assert scaled.original_max_position_embeddings == 64
    assert model_range(scaled) == 256
    with pytest.raises(ValueError, match="`short_factor` must be a list of numbers for 'longrope', got None"):
        scale_rope(config, 256, "longrope")


def test_original_length_beside_the_parameters_follows():
    config = Phi3Config(hidden_size=32, num_attention_heads=2, max_position_embeddings=128, num_hidden_layers=1)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    scaled = scale_rope(config, 256, "longrope", **factors)
    again = Phi3Config.from_dict(scaled.to_dict())
    assert again.rope_parameters["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_length": 0}, "`target_length` must be a positive integer, got 0"),
        ({"target_length": 256.0}, "`target_length` must be a positive integer, got 256.0"),
        ({"target_length": 256, "rope_type": "ntk"}, "`rope_type` must be one of .*'yarn'.* got 'ntk'"),
        ({"target_length": 256, "factor": 4.0}, "`factor` is no parameter of 'yarn' RoPE that can be set"),
        ({"target_length": 256, "rope_type": "linear", "beta_fast": 4}, "`beta_fast` is no parameter of 'linear'"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_rope(tiny(), **arguments)


def test_no_rope_to_scale():
    with pytest.raises(ValueError, match="got 'gpt2' without `rope_parameters`"):
        scale_rope(GPT2Config(), 4096)


def test_record_is_json_and_applies():
    scaled = scale_rope(tiny(), 256)
    record = RopeRecord.from_json(json.loads(dumps(rope_record(scaled))))
    applied = apply_rope(record, tiny())
    assert rope_record(applied) == record
    check_rope(record, applied)
    torch.testing.assert_close(frequencies(applied).inv_freq, frequencies(scaled).inv_freq)


def test_check_names_what_differs():
    record = rope_record(scale_rope(tiny(), 256))
    with pytest.raises(ValueError, match=r"rope_parameters.factor = None instead of 4.0.*load_adapter") as error:
        check_rope(record, tiny())
    assert "rope_parameters.rope_type = 'default' instead of 'yarn'" in str(error.value)
    assert "max_position_embeddings = 64 instead of 256" in str(error.value)
    assert "rope_theta" not in str(error.value)


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_has_reached_the_model(rope_type, dtype):
    model = AutoModelForCausalLM.from_config(scale_rope(tiny(), 256, rope_type)).to(dtype)
    check_rope_reached(model)
    ids = torch.arange(8)[None]
    model(ids, position_ids=ids * 30)  # dynamic scaling changes the current frequencies
    check_rope_reached(model)


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "llama3"])
def test_scaling_set_on_a_loaded_model(rope_type):
    model = AutoModelForCausalLM.from_config(tiny())
    model.config.rope_parameters = scale_rope(tiny(), 128, rope_type).rope_parameters
    with pytest.raises(ValueError, match=f"`model.rotary_emb` does not turn as its config says, got .*'{rope_type}'"):
        check_rope_reached(model)


def test_scaling_per_layer_type_reaches_the_model():
    config = Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64,
    )  # fmt: skip
    check_rope_reached(AutoModelForCausalLM.from_config(scale_rope(config, 256)))
    model = AutoModelForCausalLM.from_config(config)
    model.config.rope_parameters = scale_rope(config, 256).rope_parameters
    with pytest.raises(ValueError, match="does not turn as its config says"):
        check_rope_reached(model)


def test_record_of_another_model_type():
    with pytest.raises(ValueError, match="must be a 'llama', as in training, got 'qwen2'"):
        apply_rope(rope_record(tiny()), Qwen2Config())


def test_record_file(tmp_path):
    record = TrainingRecord(rope_record(tiny()), seed=3)
    assert save_record(tmp_path / "adapter", record).name == RECORD_NAME
    assert load_record(tmp_path / "adapter") == record


def test_record_file_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match=f"has no {RECORD_NAME}"):
        load_record(tmp_path)
    (tmp_path / RECORD_NAME).write_text("{")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_record(tmp_path)
    (tmp_path / RECORD_NAME).write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        load_record(tmp_path)
