"""A trained adapter on its base model: loaded with the RoPE of its training, merged into a whole model, checked.

A base is known again by a sample of its weights. A name says little: a folder may hold another download, a Hub branch
may have moved on, a published adapter names its base neutrally. A few hundred values tell one model from another, and
the same one in another precision or quantised apart.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_longalign.records.training import RopeRecord
from hf_longalign.rope import apply_rope, check_rope, check_rope_reached
from hf_longalign.run_record import load_record


logger = logging.getLogger(__name__)

# Norms and embeddings: the weights that quantisation leaves as they are.
_VALUES_EACH = 32
_HEAD = 4096
_TENSORS = 8
# Twice the rounding of bfloat16, in which most models are published.
_TOLERANCE = 2**-8


def load_adapter(
    adapter: str | Path,
    *,
    base_model: str | Path | PreTrainedModel | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    **model_kwargs: Any,
) -> PeftModel:
    """Load an adapter on its base model, with RoPE scaled before loading as in training.

    `peft.PeftModel.from_pretrained` on a base model loaded as published gives other logits, without a word, when the
    training had scaled RoPE.

    Args:
        adapter: directory or Hub id of an adapter that `LongAlignSFTTrainer` saved.
        base_model: directory or Hub id of the base model, or the loaded model, whose RoPE is then checked; the one
            named by the adapter when `None`.
        revision: revision of the adapter.
        base_revision: revision of the base model; the one in the adapter's config when `None`.
        **model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`,
            `quantization_config` …).

    Raises:
        ValueError: the adapter has no record, or the base model is of another kind or has another RoPE or other
            weights than the one trained on.

    Example:

    ```python
    model = load_adapter("out/checkpoint-1000", dtype="bfloat16", device_map="auto")
    ```
    """
    record = load_record(adapter, revision=revision)
    if isinstance(base_model, PreTrainedModel):
        check_rope(record.rope, base_model.config)
        check_rope_reached(base_model)
    else:
        adapter_config = PeftConfig.from_pretrained(str(adapter), revision=revision)
        base_model = _load_base(record.rope, adapter_config, base_model, base_revision, model_kwargs)
    check_weights(record.base_weights, base_model)
    return PeftModel.from_pretrained(base_model, str(adapter), revision=revision)


def _load_base(
    rope: RopeRecord,
    adapter_config: PeftConfig,
    base_model: str | Path | None,
    base_revision: str | None,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    named = adapter_config.base_model_name_or_path
    model_id = str(base_model or named or "")
    if not model_id:
        raise ValueError("`base_model` must be given, got None: the adapter does not name one. Set it to its base.")
    if named and model_id != named:
        logger.warning("The adapter was trained on %s and is loaded on %s.", named, model_id)
    revision = base_revision or (adapter_config.revision if model_id == named else None)
    hub_kwargs = {key: model_kwargs[key] for key in ("token", "trust_remote_code", "cache_dir") if key in model_kwargs}
    config = apply_rope(rope, AutoConfig.from_pretrained(model_id, revision=revision, **hub_kwargs))
    return AutoModelForCausalLM.from_pretrained(model_id, config=config, revision=revision, **model_kwargs)


def weights_sample(model: nn.Module) -> dict[str, list[float]]:
    """Return values of up to 8 norms and embeddings of a base model by name; none where weights are sharded.

    Args:
        model: the model without an adapter, or the one that an adapter was put on.

    Example:

    >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "norm": nn.LayerNorm(2)})
    >>> {name: len(values) for name, values in weights_sample(model).items()}
    {'embed.weight': 8, 'norm.weight': 2}
    """
    found = {name: weight for name, weight in _kept_weights(model) if type(weight.data) is torch.Tensor}
    names = sorted(found)
    step = max(1, -(-len(names) // _TENSORS))
    sample = {}
    for name in names[::step]:
        flat = found[name].detach().flatten()
        head = flat[:_HEAD]  # an embedding may have grown at its end by new tokens
        values = head[:: max(1, head.numel() // _VALUES_EACH)][:_VALUES_EACH].float().cpu().tolist()
        if values:  # ZeRO-3 leaves an empty tensor
            sample[name] = [float(f"{value:.6g}") for value in values]
    return sample


def _kept_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        weight = getattr(module, "weight", None)
        # PEFT keeps the base's own module, if it trains a copy, under `original_module`.
        adapted = "lora_" in name or "modules_to_save" in name
        if weight is not None and not adapted and ("norm" in kind or isinstance(module, nn.Embedding)):
            clean = name.replace(".base_layer", "").replace(".original_module", "")
            yield f"{clean}.weight", weight


def check_weights(sample: dict[str, list[float]], model: nn.Module) -> None:
    """Refuse a base model whose weights are not those of a `weights_sample`.

    Raises:
        ValueError: names the first weight that differs.

    Example:

    >>> model = nn.ModuleDict({"norm": nn.LayerNorm(2)})
    >>> check_weights({"norm.weight": [1.0, 1.0]}, model)
    >>> check_weights({"norm.weight": [1.0, 1.5]}, model)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: The base model must have the weights its adapter was trained on, got others in `norm.weight`. ...
    """
    present = weights_sample(model)
    if not present:
        return
    for name, expected in sample.items():
        values = present.get(name, [])
        same = len(values) == len(expected) and all(
            abs(value - other) <= _TOLERANCE * max(abs(value), abs(other)) + 1e-6
            for value, other in zip(values, expected, strict=True)
        )
        if not same:
            raise ValueError(
                f"The base model must have the weights its adapter was trained on, got others in `{name}`. Give the "
                "model and revision the adapter names."
            )
