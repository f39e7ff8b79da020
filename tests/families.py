"""Tiny random models of many families, and the naive reference every attention backend is held against.

All are float32 and in eval mode, windows are 8 tokens, so that skips of less and of more than a window occur.
"""

from functools import lru_cache

import torch
import transformers
from transformers import PreTrainedModel


VOCABULARY = 32
WINDOW = 8

_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # The default 0.02 leaves attention next to uniform, and errors in it next to invisible.
    "initializer_range": 0.3,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 32.0,
        "original_max_position_embeddings": 8,
        "truncate": False,
    }
}

# name: (class prefix, what differs from _TINY)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, **_EXPERTS}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 2.0, **_LOCAL}),
    "gemma3": ("Gemma3", {"head_dim": 8, **_LOCAL}),
    "gemma4": (
        "Gemma4",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "initializer_range": 0.2,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3_window": ("Phi3", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _LOCAL),
    "granite": ("Granite", {"attention_multiplier": 0.2}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 1.0, **_LOCAL}),
    "glm4": ("Glm4", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_YARN, **_LOCAL}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "phimoe": ("Phimoe", {"sliding_window": WINDOW, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"use_sliding_window": True, "shared_expert_intermediate_size": 16, **_LOCAL, **_EXPERTS},
    ),
}
HYBRIDS: dict[str, tuple[str, dict]] = {
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
            **_EXPERTS,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}
WINDOWED = {
    "mistral_window", "gemma2", "gemma3", "gemma4", "phi3_window", "olmo3", "cohere2", "gpt_oss", "phimoe", "qwen2_moe"
}  # fmt: skip


def tiny_config(family: str) -> transformers.PretrainedConfig:
    prefix, own = (FAMILIES | HYBRIDS)[family]
    multimodal = prefix in ("Gemma3", "Gemma4")
    config_class = getattr(transformers, f"{prefix}TextConfig" if multimodal else f"{prefix}Config")
    return config_class(**(_TINY | own))


@lru_cache
def tiny_model(family: str, attn_implementation: str = "eager") -> PreTrainedModel:
    """A model with the same weights for every backend; do not change it."""
    model_class = getattr(transformers, f"{(FAMILIES | HYBRIDS)[family][0]}ForCausalLM")
    torch.manual_seed(0)
    model = model_class._from_config(tiny_config(family), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("sinks", "bias", "q_norm.weight", "k_norm.weight")) or "norm" in name:
                weights.add_(0.3 * torch.randn_like(weights))
    if attn_implementation != "eager":
        model.set_attn_implementation(attn_implementation)
    return model


def naive_logits(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a document with skipped positions means: the long sequence with a masked token at each skipped position.

    Args:
        model: an eager model.
        input_ids: int64 (tokens,), one document.
        positions: int64 (tokens,), strictly rising; skipped positions before the first token are masked as well.

    Returns:
        (tokens, vocabulary), the logits of the document's tokens.
    """
    assert model.config._attn_implementation == "eager"
    length = int(positions[-1]) + 1
    tokens = torch.zeros(1, length, dtype=torch.long)
    mask = torch.zeros(1, length, dtype=torch.long)
    tokens[0, positions], mask[0, positions] = input_ids, 1
    ordinary = torch.arange(length)[None]
    return model(tokens, attention_mask=mask, position_ids=ordinary, use_cache=False).logits[0, positions]
