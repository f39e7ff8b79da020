"""A sample of a base model's weights, by which an adapter knows its base again under any name.

A name says little: a folder may hold another download, a Hub branch may have moved on, a published adapter names its
base neutrally. A few hundred values tell one model from another, the same one in another precision or quantised apart.
"""

from collections.abc import Iterator

import torch
from torch import nn


# Norms and embeddings: the weights that quantisation leaves as they are.
_VALUES_EACH = 32
_HEAD = 4096
_TENSORS = 8
# Twice the rounding of bfloat16, in which most models are published.
_TOLERANCE = 2**-8


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
