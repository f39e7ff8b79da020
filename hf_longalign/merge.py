"""An adapter and its base written as one model, which any server loads, and held against what the two are together.

Half precision needs a check of its own. Rounding alone moves the logits of SmolLM2-135M in bfloat16 by half of their
size over a range of 16,384 tokens, so they tell nothing of a merge. And a change smaller than half the distance of two
numbers is lost when it is added to a weight: of what its adapters of 18 steps change bfloat16 held 98 %.
"""

import json
import logging
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import metadata_load
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_longalign.adapter import base_of, check_weights, hub_kwargs, load_base, load_tokenizer, peft_config, put_on
from hf_longalign.probe import token_ids
from hf_longalign.rope import legacy_rope, model_range, rope_record
from hf_longalign.run_record import check_place, load_record, model_file, save_record


logger = logging.getLogger(__name__)

# How much of what the adapter changes the merged weights must hold, and below which share it is said.
_LEAST_HELD, _TOLD_HELD = 0.8, 0.99
# How far a layer may be from what it gave, in roundings of its precision; less than one was seen.
_ROUNDINGS = 4


def merge_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    base_model: str | Path | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    max_shard_size: str | int = "5GB",
    known_answers: bool = True,
    **model_kwargs: Any,
) -> Path:
    """Merge an adapter into its base model and save the whole: `AutoModelForCausalLM` and every server load it.

    The saved config holds the RoPE and the range of the training, where transformers 4 looks for them too, the
    tokenizer that range as `model_max_length`. A base that is quantised is merged and saved unquantised. Before
    anything is saved, the merged model is compared with base and adapter: by logits, in half precision by layers, and
    a warning says how much of what the adapter changes is lost to the rounding of merged weights.

    Args:
        adapter: directory or Hub id of an adapter that `LongAlignSFTTrainer` saved.
        output_dir: where the model goes, and what is returned; files of an earlier merge are replaced.
        base_model: directory or Hub id of the base model; the one named by the adapter when `None`.
        revision, base_revision: as in [`load_adapter`].
        known_answers: whether to ask the model a few fixed prompts, two past the base's range where that is below
            16,384 tokens, and keep its answers: `evaluate` compares with them what a server answers.
        max_shard_size: size of a file of weights at most, in bytes or as in "5GB".
        **model_kwargs: passed to `from_pretrained` of the base model (`dtype`, `device_map` …).

    Raises:
        ValueError: as in [`load_adapter`]; or the adapter cannot be merged, or is another when merged.

    Example:

    ```python
    merge_adapter("out", "merged", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained("merged")
    ```
    """
    check_place("adapter", adapter, "adapter_config.json", revision)
    output_dir, record = Path(output_dir), load_record(adapter, revision=revision)
    config = peft_config(adapter, revision)
    base_id, base_revision = base_of(config, base_model, base_revision)
    # Before the base is loaded, which may take minutes.
    _check_merge(config, adapter, output_dir, base_id, model_kwargs)
    has_own = model_file(adapter, "tokenizer_config.json", revision) is not None
    option, name, at = ("adapter", str(adapter), revision) if has_own else ("base_model", base_id, base_revision)
    remedy = "Save one into the folder of the adapter."
    tokenizer = load_tokenizer(option, name, remedy, revision=at, **hub_kwargs(model_kwargs))
    base = load_base(record, (base_id, base_revision), model_kwargs)
    check_weights(record.base_weights, base)
    if getattr(base, "hf_quantizer", None) is not None:
        base = _dequantised(base)
    model = put_on(base, adapter, revision).eval()
    expected, layers = _logits_and_layers(model)
    merged = _merged(model)
    problem = _difference(_logits(merged), expected, merged.dtype)
    if merged.dtype != torch.float32:
        problem = problem or _unlike(merged, layers)
    if problem:
        remedy = "Load" if merged.dtype == torch.float32 else "Set `dtype` to float32, or load"
        raise ValueError(
            f"`{adapter}` must give the same when merged, got {problem}. {remedy} it with `load_adapter` instead."
        )
    merged.save_pretrained(output_dir, max_shard_size=max_shard_size)
    if getattr(merged.config.get_text_config(), "max_position_embeddings", None):
        tokenizer.model_max_length = model_range(merged.config)
    tokenizer.save_pretrained(output_dir)
    _write_legacy_rope(output_dir, merged.config)
    if known_answers:
        from hf_longalign.known_answers import known_answers as ask
        from hf_longalign.known_answers import not_past_range

        answers = ask(merged.eval(), tokenizer, record.rope)
        if missing := not_past_range(answers, record.rope):
            logger.warning("Of the answers of %s that a server will be compared with, %s.", output_dir, missing)
        record = replace(record, answers=answers)
    save_record(output_dir, record)
    _write_card(output_dir, adapter, revision, base_id)
    return output_dir


def _check_merge(
    config: Any, adapter: str | Path, output_dir: Path, base_id: str, model_kwargs: dict[str, Any]
) -> None:
    if config.is_prompt_learning:
        raise ValueError(
            f"`{adapter}` must change weights to be merged, got {config.peft_type.value}, which puts virtual tokens "
            "before the prompt. Load it with `load_adapter`."
        )
    if model_kwargs.get("quantization_config") is not None:
        raise ValueError(
            "`quantization_config` must be left out: weights are merged and saved unquantised. Quantise the merged "
            "model when you load it."
        )
    if output_dir.resolve() in (Path(adapter).resolve(), Path(base_id).resolve()):
        raise ValueError(
            f"`output_dir` must be another folder than those of adapter and base, got '{output_dir}'. Set a new one."
        )


def _dequantised(base: Any) -> PreTrainedModel:
    base = base.dequantize()
    # transformers would undo on saving what it did on loading, and cannot with the quantised names that are left here.
    kept = []
    for step in base._weight_conversions or []:
        with suppress(NotImplementedError):
            step.reverse_transform()
            kept.append(step)
    base._weight_conversions = kept
    return base


def _merged(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter in its weights; embeddings stay tied only if they are still equal."""
    base: Any = model.get_base_model()
    text_config = base.config.get_text_config()
    inner, outer = _own_layer(base.get_input_embeddings()), _own_layer(base.get_output_embeddings())
    tied = outer is not None and inner.weight is outer.weight
    if tied:
        # One of the two may be trained alone: merged into a shared weight, it would change both.
        outer.weight = nn.Parameter(outer.weight.detach().clone())
        base.config.tie_word_embeddings = text_config.tie_word_embeddings = False
    # safe_merge: PEFT raises where merged weights would not be finite.
    merged = model.merge_and_unload(safe_merge=True)
    if tied and torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        merged.get_output_embeddings().weight = merged.get_input_embeddings().weight
        base.config.tie_word_embeddings = text_config.tie_word_embeddings = True
    return merged


def _own_layer(layer: Any) -> Any:
    """The model's own layer inside the wrappers of PEFT."""
    while hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        layer = getattr(layer, "base_layer", None) or layer.original_module
    return layer


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Logits of 16 tokens over the model's range, float32 `(16, vocabulary)`."""
    (ids,), _ = token_ids(model.config.get_text_config(), [16])
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 16
    # Over the whole range: another RoPE gives the same logits near the beginning.
    places = torch.arange(16) * max(1, reach // 16 - 1)
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}
    inputs = {key: value[None].to(device) for key, value in inputs.items()}
    return model(**inputs, use_cache=False).logits[0].float().cpu()


class _Layer(NamedTuple):
    """An adapted layer: what it was given last, and what it gives with the adapter and without."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    plain: torch.Tensor


def _in_float32(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What a layer gives, its weights as they are, but without rounding its sums: those hide what a merge loses."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    weights = {name: wide(weight) for name, weight in layer.named_parameters()}
    given = tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}
    return functional_call(layer, weights, *given)


@torch.no_grad()
def _logits_and_layers(model: PeftModel) -> tuple[torch.Tensor, dict[str, _Layer]]:
    """Logits of the model, and by name what its adapted layers did for them; both embeddings count as adapted."""
    base: Any = model.get_base_model()
    embeddings = base.get_input_embeddings(), base.get_output_embeddings()
    layers: dict[str, Any] = {}
    calls: dict[str, tuple[Any, Any]] = {}
    for name, module in base.named_modules():
        # Of wrappers in wrappers the outer one, whose name the merged layer has.
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if not inside and (isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or module in embeddings):
            layers[name] = module
    hooks = [
        layer.register_forward_hook(lambda *call, name=name: calls.update({name: call[1:3]}), with_kwargs=True)
        for name, layer in layers.items()
    ]
    logits = _logits(model)
    for hook in hooks:
        hook.remove()
    # Weights that are offloaded are on no device until they are used.
    here = [name for name in calls if not any(weight.is_meta for weight in layers[name].parameters())]
    outputs = {name: _in_float32(layers[name], *calls[name]) for name in here}
    with model.disable_adapter():
        return logits, {
            name: _Layer(*calls[name], outputs[name], _in_float32(layers[name], *calls[name])) for name in here
        }


def _difference(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with the logits of a merged model; in half precision only that some are not finite."""
    # What a model masks of its vocabulary is -inf on both sides; NaN equals nothing, and "not <=" refuses it.
    moved = torch.where(found == expected, 0.0, found - expected).square().mean().sqrt()
    difference = moved / expected[expected.isfinite()].square().mean().sqrt()
    if difference <= (1e-4 if dtype == torch.float32 else math.inf):
        return None
    return f"logits that differ by {difference:.1e} of their size"


@torch.no_grad()
def _unlike(merged: PreTrainedModel, layers: dict[str, _Layer]) -> str | None:
    """What is wrong with the layers of a merged model, each given what it was given before."""
    held = changed = 0.0
    for name, layer in layers.items():
        found = _in_float32(merged.get_submodule(name), layer.args, layer.kwargs)
        error, size = (found - layer.output).norm(), layer.output.norm()
        if not error <= _ROUNDINGS * torch.finfo(merged.dtype).eps * size:
            return f"a difference of {error:.1e} from {size:.1e} in `{name}`"
        change = layer.output - layer.plain
        held += float(((found - layer.plain) * change).sum())
        changed += float(change.square().sum())
    share = held / changed if changed else 1.0
    if share < _LEAST_HELD:
        return f"{share:.0%} of what the adapter changes: the rest is lost to rounding in {merged.dtype}"
    if share < _TOLD_HELD:
        logger.warning(
            "The merged weights hold %.0f %% of what the adapter changes; rounding in %s takes the rest. Set `dtype` "
            "to float32 to keep it.",
            100 * share,
            merged.dtype,
        )
    return None


def _write_legacy_rope(folder: Path, config: Any) -> None:
    """Let servers on transformers 4 read the RoPE too, unless it changed what is read here."""
    path = folder / "config.json"
    plain = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(legacy_rope(json.loads(plain)), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # By its class: `AutoConfig` asks again whether the code of a model of one's own may run.
    if rope_record(type(config).from_pretrained(folder)) != rope_record(config):
        path.write_text(plain, encoding="utf-8")


def _write_card(folder: Path, adapter: str | Path, revision: str | None, base_id: str) -> None:
    """The card of the merged model, with what the adapter's own says of licence, languages and base."""
    from hf_longalign.cards import write_adapter_card
    from hf_longalign.plots import draw_training

    card = None
    with suppress(ConnectionError):  # the weights are there, which a card is not worth
        card = model_file(adapter, "README.md", revision)
    data: dict[str, Any] = (card and metadata_load(card)) or {}
    languages = data.get("language") or []
    with suppress(ImportError):
        draw_training(load_record(folder), folder / "assets")
    write_adapter_card(
        folder,
        license=data.get("license"),
        languages=[languages] if isinstance(languages, str) else languages,
        base_model=data.get("base_model") if Path(base_id).exists() else base_id,
    )
