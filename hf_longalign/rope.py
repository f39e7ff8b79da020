"""RoPE scaling for a target length: set before the model is loaded, recorded with the adapter, checked afterwards.

Setting it on the config of a loaded model does nothing: the rotary embedding computes its frequencies once, when the
model is built. So everything here works on configs.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_longalign.records.training import RopeRecord


# The keys transformers reads for each type (`modeling_rope_utils`), `factor` apart: the target length sets it.
SCALING_KEYS = {
    "yarn": {
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "linear": set(),
    "dynamic": set(),
    "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    # Gemma 4's own; "linear" over the part of a head that rotates. transformers reads its `factor`, and warns of it.
    "proportional": set(),
}
LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's own
_EVERY_SCALING_KEY = {"factor", "type", *(key for keys in SCALING_KEYS.values() for key in keys)}


def model_range(config: PretrainedConfig) -> int:
    """Return how many positions a model is made for, its RoPE scaling included.

    Published configs disagree on whether `max_position_embeddings` already holds the scaling. The rule never claims
    more than the frequencies were computed for:

    - `yarn`: `original_max_position_embeddings * factor`. (Qwen's instructions leave `max_position_embeddings` at
      32,768 or 40,960 with a factor of 4; DeepSeek and gpt-oss raise it.)
    - `dynamic`: `max_position_embeddings * factor`; the formula takes `max_position_embeddings` for the original.
    - everything else, so also `llama3`, `longrope` and `linear`: `max_position_embeddings`. (Llama 3.2 has a factor of
      32 over 8,192 for 131,072. Of `linear` models some raise `max_position_embeddings`, some do not: where yours does
      not, set it to the length the model card names.)

    Where layer types have their own parameters (Gemma 3, Olmo 3), the smallest range of those that are not sliding
    counts.

    Raises:
        ValueError: the config has no `max_position_embeddings`.

    Example:

    >>> from transformers import Qwen3Config
    >>> yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> model_range(Qwen3Config(max_position_embeddings=40960))
    40960
    >>> model_range(Qwen3Config(max_position_embeddings=40960, rope_parameters=yarn))
    131072
    """
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if not limit:
        raise ValueError(
            f"`max_position_embeddings` must be a number of positions, got {limit!r} in the config of "
            f"{text_config.model_type!r}. Set the target length yourself."
        )
    lengths = []
    for _, parameters in _scalable(text_config):
        kind, original = _rope_type(parameters), limit
        if kind == "yarn":
            original = parameters.get("original_max_position_embeddings", limit)
        factor = parameters.get("factor") if kind in ("yarn", "dynamic") else None
        # Rounded, as a target / original * original may lie an ulp below the target.
        lengths.append(limit if factor is None else round(original * factor))
    return min(lengths, default=limit)


def _rope_type(parameters: dict[str, Any]) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _scalable(text_config: PretrainedConfig) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The RoPE parameters that meet long distances, by layer type; `None` where all layers share them."""
    parameters = getattr(text_config, "rope_parameters", None)
    if not parameters:
        return
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if not nested:
        yield None, parameters
    for layer_type, value in nested.items():
        if "sliding" not in layer_type and "chunked" not in layer_type:
            yield layer_type, value


def scale_rope(
    config: PretrainedConfig, target_length: int, rope_type: str = "yarn", **parameters: Any
) -> PretrainedConfig:
    """Return a copy of a config whose RoPE is scaled so that its range covers `target_length`.

    Load the model with it: `AutoModelForCausalLM.from_pretrained(model_id, config=scaled)`. A config that covers the
    length already comes back unchanged. A config that is scaled already is scaled further, by the same type.

    Args:
        config: the model's config; of a multimodal model, the text part is scaled.
        target_length: number of positions the model shall serve.
        rope_type: `"yarn"` (https://arxiv.org/abs/2309.00071), `"linear"`, `"dynamic"`, `"llama3"`, `"longrope"`
            (https://arxiv.org/abs/2402.13753) or Gemma 4's `"proportional"`.
        **parameters: further parameters of the type, named as in transformers. `factor` follows from the target
            length. `original_max_position_embeddings` defaults to the present range; give it where the model card
            names another (32,768 for Qwen3, whose config says 40,960). `"longrope"` needs `short_factor` and
            `long_factor`, which somebody has searched for the model.

    Raises:
        ValueError: no RoPE, an unknown type or parameter, factors missing, or a model scaled by another type.

    Example:

    >>> from transformers import LlamaConfig
    >>> scaled = scale_rope(LlamaConfig(max_position_embeddings=8192), 32768)
    >>> scaled.rope_parameters["factor"], scaled.rope_parameters["original_max_position_embeddings"]
    (4.0, 8192)
    >>> model_range(scaled)
    32768
    """
    if isinstance(target_length, bool) or not isinstance(target_length, int) or target_length < 1:
        raise ValueError(
            f"`target_length` must be a positive integer, got {target_length!r}. Set the length you need."
        )
    if rope_type not in SCALING_KEYS:
        raise ValueError(
            f"`rope_type` must be one of {sorted(SCALING_KEYS)}, got {rope_type!r}. Set 'yarn' if in doubt."
        )
    unknown = sorted(set(parameters) - SCALING_KEYS[rope_type])
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is no parameter of {rope_type!r} RoPE that can be set (`factor` follows from the target "
            f"length), got {parameters[unknown[0]]!r}. Set one of {sorted(SCALING_KEYS[rope_type])}, or nothing."
        )
    scaled = copy.deepcopy(config)
    text_config = scaled.get_text_config()
    entries = list(_scalable(text_config))
    if not entries:
        raise ValueError(
            f"RoPE can be scaled only where full attention uses it, got {text_config.model_type!r} without "
            "`rope_parameters` of such layers. Lower the target length to the model's range."
        )
    reach = model_range(config)
    if target_length <= reach:
        return scaled
    rope = dict(text_config.rope_parameters)
    for layer_type, old in entries:
        new = _scaled(old, reach, target_length, rope_type, parameters)
        rope = new if layer_type is None else {**rope, layer_type: new}
    # Dynamic scaling reads the original length in `max_position_embeddings`.
    _set_rope(text_config, rope, None if rope_type == "dynamic" else target_length)
    text_config.validate_rope()
    return scaled


def _set_rope(text_config: PretrainedConfig, rope: dict[str, Any] | None, limit: int | None) -> None:
    if limit is not None:
        text_config.max_position_embeddings = limit
    if rope is None:
        return
    text_config.rope_parameters = rope
    if hasattr(text_config, "original_max_position_embeddings") and "original_max_position_embeddings" in rope:
        # Phi-3 keeps it beside the parameters too, and there it wins.
        text_config.original_max_position_embeddings = rope["original_max_position_embeddings"]


def _scaled(
    old: dict[str, Any], reach: int, target_length: int, rope_type: str, parameters: dict[str, Any]
) -> dict[str, Any]:
    """`old` parameters, of range `reach`, scaled to `target_length`."""
    old_type = _rope_type(old)
    if old_type not in ("default", *SCALING_KEYS):
        raise ValueError(
            f"RoPE of type {old_type!r} cannot be scaled further. Lower the target length to at most {reach}, the "
            "model's range."
        )
    if old_type not in ("default", rope_type):
        raise ValueError(
            f"`rope_type` must be {old_type!r}, the scaling this model was made with, got {rope_type!r}. Set "
            f"`rope_type={old_type!r}` to scale it further."
        )
    # What scales nothing stays: the theta, the part of a head that rotates.
    new = {key: value for key, value in old.items() if key not in _EVERY_SCALING_KEY}
    new |= LLAMA3_DEFAULTS if rope_type == "llama3" else {}
    # Of its own type only; the attention factor belongs to the old factor.
    inherited = SCALING_KEYS[rope_type] - {"attention_factor"} if old_type == rope_type else set()
    new |= {key: old[key] for key in inherited if key in old} | parameters | {"rope_type": rope_type}
    for key in ("short_factor", "long_factor") if rope_type == "longrope" else ():
        if not isinstance(new.get(key), (list, tuple)):
            raise ValueError(
                f"`{key}` must be a list of numbers for 'longrope', got {new.get(key)!r}. Set it to the factors found "
                "for this model, or take `rope_type='yarn'`, which needs none."
            )
    if "original_max_position_embeddings" in SCALING_KEYS[rope_type]:
        new.setdefault("original_max_position_embeddings", reach)
    if rope_type in ("yarn", "longrope"):
        new["factor"] = target_length / new["original_max_position_embeddings"]
    else:
        new["factor"] = float(old.get("factor") or 1.0) * target_length / reach
    return new


def doubles(shortest: int, reach: int) -> list[int]:
    """Return the powers of two from a length up to the range of a model; the range itself where none fits.

    >>> doubles(1000, 8192), doubles(1024, 1000)
    ([1024, 2048, 4096, 8192], [1000])
    """
    return [2**power for power in range(4, 31) if shortest <= 2**power <= reach] or [reach]


def check_range(config: PretrainedConfig, target_length: int, name: str = "target_length") -> None:
    """Refuse a target length, given by the option `name`, past the range of a model; see [`model_range`].

    Raises:
        ValueError: with the call of [`scale_rope`] that loads the model for it.

    Example:

    >>> from transformers import LlamaConfig
    >>> check_range(LlamaConfig(max_position_embeddings=8192), 32768)
    Traceback (most recent call last):
    ...
    ValueError: `target_length` must be at most 8192, the range of this 'llama' model, got 32768. Load it with
    `config=hf_longalign.scale_rope(config, 32768, 'yarn')`, or lower `target_length`.
    """
    text_config = config.get_text_config(decoder=True)
    if not getattr(text_config, "max_position_embeddings", None):
        return
    limit = model_range(config)
    if target_length <= limit:
        return
    types = {_rope_type(parameters) for _, parameters in _scalable(text_config)}
    remedy = f"lower `{name}`"
    # "dynamic" and "longrope" follow the largest position of a batch: no skips beyond what they were trained for.
    if types and types <= {"default", *SCALING_KEYS} - {"dynamic", "longrope"}:
        # A model that is scaled already is scaled further by its own type alone.
        kind = next(iter(types - {"default"}), "yarn")
        scaling = f"load it with `config=hf_longalign.scale_rope(config, {target_length}, {kind!r})`"
        if name == "skip_target_length":  # an option beside the one that scales
            scaling = f"set `rope_type={kind!r}` and give the model by its name"
        elif name == "distances":  # of the command line
            scaling = f"set `--rope_type {kind}`"
        remedy = f"{scaling}, or {remedy}"
    raise ValueError(
        f"`{name}` must be at most {limit}, the range of this {text_config.model_type!r} model, got {target_length}. "
        f"{remedy[0].upper()}{remedy[1:]}."
    )


def rope_record(config: PretrainedConfig) -> RopeRecord:
    """Return what defines a model's positions: model type, RoPE parameters, `max_position_embeddings`."""
    text_config = config.get_text_config()
    # Through JSON, so that a record from a file and one from a config compare equal: no tuples, no NumPy numbers.
    parameters = json.loads(json.dumps(getattr(text_config, "rope_parameters", None)))
    return RopeRecord(text_config.model_type, getattr(text_config, "max_position_embeddings", None), parameters)


def apply_rope(record: RopeRecord, config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a base model's config with the RoPE of a `rope_record`, to load the model with.

    Raises:
        ValueError: the record is of another model type.
    """
    scaled = copy.deepcopy(config)
    text_config = scaled.get_text_config()
    if text_config.model_type != record.model_type:
        raise ValueError(
            f"The base model must be a {record.model_type!r}, as in training, got {text_config.model_type!r}. Give "
            "the base model the adapter was trained on."
        )
    # transformers writes into the dictionary that a config is given.
    _set_rope(text_config, copy.deepcopy(record.rope_parameters), record.max_position_embeddings)
    return scaled


def legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of a config with `rope_theta` and `rope_scaling` too, where transformers 4 looks for them.

    transformers 5 reads the same from both. Parameters by layer type have no such form, and nothing is added.

    Example:

    >>> rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> legacy = legacy_rope({"rope_parameters": rope})
    >>> legacy["rope_theta"], legacy["rope_scaling"]["factor"], "rope_theta" in legacy["rope_scaling"]
    (1000000.0, 4.0, False)
    """
    added: dict[str, Any] = {key: legacy_rope(value) for key, value in config.items() if key == "text_config"}
    rope = config.get("rope_parameters")
    if rope and not any(isinstance(value, dict) for value in rope.values()):
        apart = ("rope_theta", "partial_rotary_factor")
        added |= {key: rope[key] for key in apart if key in rope}
        scaling = {key: value for key, value in rope.items() if key not in apart}
        added["rope_scaling"] = None if _rope_type(rope) == "default" else scaling
    return {**config, **added}


def check_rope(record: RopeRecord, config: PretrainedConfig) -> None:
    """Refuse a config whose positions are not those of a `rope_record`.

    Raises:
        ValueError: names each value that differs.
    """
    trained, present = _flat(record.to_json()), _flat(rope_record(config).to_json())
    differing = [
        f"{key} = {present.get(key)!r} instead of {trained.get(key)!r}"
        for key in sorted({*trained, *present})
        if present.get(key) != trained.get(key)
    ]
    if differing:
        raise ValueError(
            f"The base model must have the RoPE its adapter was trained with, got {'; '.join(differing)}. Load both "
            "with `hf_longalign.load_adapter`, which sets it before loading; afterwards it does nothing."
        )


def check_rope_reached(model: torch.nn.Module) -> None:
    """Refuse a model whose config was given RoPE parameters after it had been built: they did not reach it.

    Each rotary embedding is held against one built anew from the config.

    Raises:
        ValueError: names the module and the remedy.
    """
    for name, module in model.named_modules():
        if "rotary" not in type(module).__name__.lower() or not hasattr(module, "config"):
            continue
        try:
            anew = type(module)(module.config)
        except TypeError:  # a vision tower's, built from other arguments
            continue
        expected = dict(anew.named_buffers())
        for key, frequencies in module.named_buffers():
            # The current ones may follow the batch ("dynamic", "longrope"); these stay. Half precision rounds by 0.4%.
            if not key.endswith("original_inv_freq") or frequencies.is_meta:
                continue
            if not torch.allclose(frequencies.float().cpu(), expected[key].float().cpu(), rtol=0.01, atol=0.0):
                present = ", ".join(f"{key}={value!r}" for key, value in _flat(module.config.rope_parameters).items())
                raise ValueError(
                    f"`{name}` does not turn as its config says, got {present} set on a loaded model, "
                    "where it does nothing. Load the model with the config: "
                    "`from_pretrained(model_id, config=hf_longalign.scale_rope(config, target_length))`."
                )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat.update(_flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {prefix + key: entry})
    return flat
