"""A trained adapter on its base model: loaded with the RoPE of its training, checked.

A base is known again by a sample of its weights. A name says little: a folder may hold another download, a Hub branch
may have moved on, a published adapter names its base neutrally. A few hundred values tell one model from another, and
the same one in another precision or quantised apart.
"""

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.rope import apply_rope, check_rope, check_rope_reached, rope_record
from hf_longalign.run_record import check_place, load_record


logger = logging.getLogger(__name__)

# Norms and embeddings are the weights that quantisation leaves as they are; adapted layers tell a base apart from what
# an adapter was merged into.
_VALUES_EACH = 32
_HEAD = 4096
_TENSORS = 8
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Beginnings of LoRA (`init_lora_weights`) that leave the base as it is.
_UNCHANGING = {"true", "false", "gaussian", "eva", "orthogonal"}
# Twice the rounding of bfloat16, in which most models are published.
_TOLERANCE = 2**-8
# Which dimension counts tokens in an adapter's weights for an embedding or a head: trained whole, by LoRA, or for new
# tokens alone.
_TOKEN_WEIGHTS = {"weight": 0, "base_layer.weight": 0, "token_adapter.base_layer.weight": 0, "lora_B.weight": 0}
_TOKEN_WEIGHTS |= {"lora_embedding_A": 1}
# How PEFT names the base's own module inside of the one that it puts around it.
_WRAPPED = re.compile(r"(\.token_adapter)?\.(base_layer|original_module)")
# Read by whoever sees PEFT's warning of it.
MARK = "rope_was_scaled_so_load_with_hf_longalign_load_adapter"


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
    training had scaled RoPE. Embeddings that training has resized are resized.

    Args:
        adapter: directory or Hub id of an adapter that `LongAlignSFTTrainer` saved.
        base_model: directory or Hub id of the base model, or the loaded model, whose RoPE is then checked; the one
            named by the adapter when `None`.
        revision: revision of the adapter.
        base_revision: revision of the base model; the one in the adapter's config when `None`.
        **model_kwargs: passed to `from_pretrained` of the base model (`dtype`, `device_map`, `quantization_config` …).

    Raises:
        ValueError: the adapter has no record, or the base model is of another kind or has another RoPE, other
            modules or other weights than the one trained on.

    Example:

    ```python
    model = load_adapter("out/checkpoint-1000", dtype="bfloat16", device_map="auto")
    ```
    """
    check_place("adapter", adapter)
    record = load_record(adapter, revision=revision)
    if isinstance(base_model, PreTrainedModel):
        check_rope(record.rope, base_model.config)
        check_rope_reached(base_model)
    else:
        source = base_of(peft_config(adapter, revision), base_model, base_revision)
        base_model = load_base(record, source, model_kwargs)
    check_weights(record.base_weights, base_model)
    return put_on(base_model, adapter, revision)


@contextmanager
def expected_mark() -> Iterator[None]:
    """Keep PEFT from warning of [`mark_scaled`] where RoPE is scaled as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{MARK}")
        yield


def peft_config(adapter: str | Path, revision: str | None = None) -> Any:
    """Return the configuration of an adapter."""
    with expected_mark():
        return PeftConfig.from_pretrained(str(adapter), revision=revision)


def mark_scaled(folder: str | Path, rope: RopeRecord, base: str) -> None:
    """Let PEFT warn whoever loads an adapter without the RoPE scaling it was trained with.

    PEFT names the keys of `adapter_config.json` that it does not know in a warning, and ignores them.

    Args:
        folder: of the adapter; nothing happens where there is none.
        rope: the RoPE of the training.
        base: name of the base; where its published RoPE is the same, or cannot be read, there is nothing to warn of.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return
    try:
        published = rope_record(AutoConfig.from_pretrained(base, local_files_only=True))
    except (OSError, ValueError):
        return
    if published != rope:
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, MARK: True}, indent=2, sort_keys=True), encoding="utf-8")


def base_of(config: Any, base_model: str | Path | None, base_revision: str | None) -> tuple[str, str | None]:
    """Name and revision of the base model: those given, else those in the adapter's config."""
    named = config.base_model_name_or_path
    model_id = str(base_model or named or "")
    if not model_id:
        raise ValueError("`base_model` must be given, got None: the adapter does not name one. Set it to its base.")
    check_place("base_model", model_id)
    if named and model_id != named:
        logger.warning("The adapter was trained on %s and is loaded on %s.", named, model_id)
    return model_id, base_revision or (config.revision if model_id == named else None)


def load_base(record: TrainingRecord, source: tuple[str, str | None], model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the base model, of the class and with the RoPE of the training."""
    model_id, revision = source
    try:
        config = AutoConfig.from_pretrained(model_id, revision=revision, **hub_kwargs(model_kwargs))
    except (OSError, ValueError) as error:  # by transformers, which has the token and the cache of `model_kwargs`
        raise ValueError(
            f"`base_model` must be a whole model, got {model_id!r}: {' '.join(str(error).split())} Set it to the "
            "folder or Hub id of the base."
        ) from error
    config = apply_rope(record.rope, config)
    # As in training: `AutoModelForCausalLM` loads of some multimodal checkpoints the text model alone, whose modules
    # have other names, so that an adapter would fit none of them.
    name = record.architecture or next(iter(config.architectures or []), "")
    loader = getattr(transformers, name, AutoModelForCausalLM)
    return loader.from_pretrained(model_id, config=config, revision=revision, **model_kwargs)


def load_tokenizer(option: str, name: str, remedy: str, **how: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that an option names.

    Raises:
        ValueError: names the option, what its files or their code raise, and the remedy.
    """
    check_place(option, name)
    try:
        return AutoTokenizer.from_pretrained(name, **how)
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"`{option}` must have a tokenizer that loads, got {name!r} with {told} {remedy}") from error


def hub_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of a model that its config and tokenizer take too."""
    return {key: model_kwargs[key] for key in ("token", "trust_remote_code", "cache_dir") if key in model_kwargs}


def put_on(base: PreTrainedModel, adapter: str | Path, revision: str | None) -> PeftModel:
    """The base model with the adapter on it, embeddings resized as in training."""
    weights = load_peft_weights(str(adapter), device="cpu", revision=revision)
    # Before the adapter is put on: its embeddings, which hold the rows of new tokens, would not fit.
    _resize_embeddings(base, weights)
    with expected_mark():
        model = PeftModel.from_pretrained(base, str(adapter), revision=revision)
    # PEFT only warns of modules that the adapter has no weights for, and leaves them as they are.
    missing = sorted(set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(weights))
    if missing:
        raise ValueError(
            f"The base model must have the modules its adapter was trained on, got {type(base).__name__}, where "
            f"{len(missing)} have no weights, `{missing[0]}` among them. Give a `base_model` of the class trained on."
        )
    return model


def _resize_embeddings(base: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Give the base model as many tokens as the adapter's embeddings have; it brings the new rows itself."""
    layers: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [name for name, module in base.named_modules() if any(module is layer for layer in layers)]
    rows: dict[str, int] = {}
    for name, (part, dimension) in product(names, _TOKEN_WEIGHTS.items()):
        if (found := weights.get(f"base_model.model.{name}.{part}")) is not None:
            rows.setdefault(name, found.shape[dimension])
    new = max(rows.values(), default=0) - layers[0].weight.shape[0]
    if not rows or new == 0:
        return
    # Without the mean of all rows: the adapter brings the new ones.
    base.resize_token_embeddings(max(rows.values()), mean_resizing=False)
    shared = layers[1] is None or layers[0].weight is layers[1].weight
    for name in [] if shared else sorted(set(names) - set(rows)):
        logger.warning(
            "The adapter was saved without the rows of `%s` for %d new tokens, which are random now. Train with that "
            "module in `modules_to_save` to keep them.",
            name,
            new,
        )


def weights_sample(model: nn.Module) -> dict[str, list[float]]:
    """Return values of up to 8 norms and embeddings of a base model, and of up to 8 layers that are adapted, by name.

    Weights that are cut over processes are left out, and of adapted layers those that are quantised.

    Args:
        model: the model without an adapter, or the one that an adapter was put on.

    Example:

    >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "norm": nn.LayerNorm(2)})
    >>> {name: len(values) for name, values in weights_sample(model).items()}
    {'embed.weight': 8, 'norm.weight': 2}
    """
    configs: Any = getattr(model, "peft_config", {}).values()
    # These take out of the base what the adapter begins with, and give it back when it is loaded.
    begun = {str(getattr(config, "init_lora_weights", True)).lower() for config in configs}
    kept: dict[str, torch.Tensor] = {}
    adapted: dict[str, torch.Tensor] = {}
    for name, module in _own_modules(model):
        # Experts have no `weight`, but parameters of other names, which PEFT adapts as `target_parameters`.
        for own, weight in module.named_parameters(recurse=False):
            if own.endswith("bias") or _readable(module, own) is None:
                continue
            if _is_kept(module):
                kept[f"{_WRAPPED.sub('', name)}.{own}"] = weight
            elif _WRAPPED.search(name) and begun <= _UNCHANGING:
                adapted[f"{_WRAPPED.sub('', name)}.{own}"] = weight
    sample: dict[str, list[float]] = {}
    for found in (kept, adapted):
        # From the first layer to the last, as a fine-tuned model may differ in some only.
        names = sorted(found)
        sample |= {name: _values(found[name]) for name in names[:: max(1, -(-len(names) // _TENSORS))]}
    return sample


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model by their names, those of an adapter left out."""
    return ((n, module) for n, module in model.named_modules() if "lora_" not in n and "modules_to_save" not in n)


def _is_kept(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()


def _readable(module: nn.Module, name: str) -> torch.Tensor | None:
    """A weight of a module; `None` where its numbers are not those of the base, or not here."""
    weight = getattr(module, name, None)
    # A DTensor holds a part alone, an offloaded weight nothing; ZeRO-3 leaves an empty tensor.
    if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor:
        return None
    if weight.is_meta or not weight.numel():
        return None
    # bitsandbytes may pack 4-bit numbers into bfloat16; 8-bit floats have scales.
    packed = type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype not in _FLOATS
    return None if packed and not _is_kept(module) else weight


def _values(weight: torch.Tensor) -> list[float]:
    head = weight.detach().flatten()[:_HEAD]  # an embedding may have grown at its end by new tokens
    values = head[:: max(1, head.numel() // _VALUES_EACH)][:_VALUES_EACH].float().cpu().tolist()
    return [float(f"{value:.6g}") for value in values]


def check_weights(sample: dict[str, list[float]], model: nn.Module) -> None:
    """Refuse a base model whose weights are not those of a `weights_sample`; what cannot be read is passed over.

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
    # Of wrappers and the module inside of them, which comes later and has the weights, it is the last.
    modules = {_WRAPPED.sub("", name): module for name, module in _own_modules(model)}
    near = partial(math.isclose, rel_tol=_TOLERANCE, abs_tol=1e-6)
    for name, expected in sample.items():
        owner, _, own = name.rpartition(".")
        weight = _readable(modules[owner], own) if owner in modules else None
        if owner in modules and weight is None:
            continue
        values = [] if weight is None else _values(weight)
        if len(values) != len(expected) or not all(map(near, values, expected)):
            raise ValueError(
                f"The base model must have the weights its adapter was trained on, got others in `{name}`. Give the "
                "model and revision the adapter names."
            )
