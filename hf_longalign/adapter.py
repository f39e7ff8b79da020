"""A trained adapter on its base model: loaded with the RoPE of its training, merged into a whole model, checked.

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
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import metadata_load
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_longalign.probe import token_ids
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.rope import apply_rope, check_rope, check_rope_reached, legacy_rope, model_range, rope_record
from hf_longalign.run_record import load_record, model_file, save_record


logger = logging.getLogger(__name__)

# Norms and embeddings: the weights that quantisation leaves as they are.
_VALUES_EACH = 32
_HEAD = 4096
_TENSORS = 8
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
    record = load_record(adapter, revision=revision)
    if isinstance(base_model, PreTrainedModel):
        check_rope(record.rope, base_model.config)
        check_rope_reached(base_model)
    else:
        source = _base_of(peft_config(adapter, revision), base_model, base_revision)
        base_model = _load_base(record, source, model_kwargs)
    check_weights(record.base_weights, base_model)
    return _put_on(base_model, adapter, revision)


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
    anything is saved, the logits of the merged model are compared with those of base and adapter.

    Args:
        adapter: directory or Hub id of an adapter that `LongAlignSFTTrainer` saved.
        output_dir: where the model goes, and what is returned; files of an earlier merge are replaced.
        base_model: directory or Hub id of the base model; the one named by the adapter when `None`.
        revision, base_revision: as in [`load_adapter`].
        known_answers: whether to ask the model a few fixed prompts, one past the base's range, and keep its answers:
            `evaluate` compares with them what a server answers. Reads up to 16,384 tokens.
        max_shard_size: size of a file of weights at most, in bytes or as in "5GB".
        **model_kwargs: passed to `from_pretrained` of the base model (`dtype`, `device_map` …).

    Raises:
        ValueError: as in [`load_adapter`]; or the adapter cannot be merged, or its merged logits are others.

    Example:

    ```python
    merge_adapter("out", "merged", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained("merged")
    ```
    """
    output_dir, record = Path(output_dir), load_record(adapter, revision=revision)
    config = peft_config(adapter, revision)
    base_id, base_revision = _base_of(config, base_model, base_revision)
    # Before the base is loaded, which may take minutes.
    _check_merge(config, adapter, output_dir, base_id, model_kwargs)
    base = _load_base(record, (base_id, base_revision), model_kwargs)
    check_weights(record.base_weights, base)
    if getattr(base, "hf_quantizer", None) is not None:
        base = _dequantised(base)
    model = _put_on(base, adapter, revision).eval()
    expected = _some_logits(model)
    merged = _merged(model)
    found = _some_logits(merged)
    # What a model masks of its vocabulary is -inf on both sides; NaN equals nothing, and "not <=" refuses it.
    moved = torch.where(found == expected, 0.0, found - expected).square().mean().sqrt()
    difference = moved / expected[expected.isfinite()].square().mean().sqrt()
    # Merged weights are rounded once more to their precision.
    if not difference <= (1e-4 if merged.dtype == torch.float32 else 0.1):
        # Over a long range the logits of half precision move by more than that through rounding alone.
        remedy = "Load" if merged.dtype == torch.float32 else "Set `dtype` to float32, or load"
        raise ValueError(
            f"`{adapter}` must give the same logits merged, got a difference of {difference:.1e} of their size. "
            f"{remedy} it with `load_adapter`, which does not merge."
        )
    merged.save_pretrained(output_dir, max_shard_size=max_shard_size)
    hub = _hub_kwargs(model_kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), revision=revision, **hub)
    except (OSError, ValueError):  # the adapter was saved without one
        tokenizer = AutoTokenizer.from_pretrained(base_id, revision=base_revision, **hub)
    if getattr(merged.config.get_text_config(), "max_position_embeddings", None):
        tokenizer.model_max_length = model_range(merged.config)
    tokenizer.save_pretrained(output_dir)
    _write_legacy_rope(output_dir, merged.config)
    if known_answers:
        from hf_longalign.known_answers import known_answers as ask

        record = replace(record, answers=ask(merged.eval(), tokenizer, record.rope))
    save_record(output_dir, record)
    _write_card(output_dir, adapter, revision, base_id)
    return output_dir


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


def _base_of(config: Any, base_model: str | Path | None, base_revision: str | None) -> tuple[str, str | None]:
    """Name and revision of the base model: those given, else those in the adapter's config."""
    named = config.base_model_name_or_path
    model_id = str(base_model or named or "")
    if not model_id:
        raise ValueError("`base_model` must be given, got None: the adapter does not name one. Set it to its base.")
    if named and model_id != named:
        logger.warning("The adapter was trained on %s and is loaded on %s.", named, model_id)
    return model_id, base_revision or (config.revision if model_id == named else None)


def _load_base(
    record: TrainingRecord, source: tuple[str, str | None], model_kwargs: dict[str, Any]
) -> PreTrainedModel:
    model_id, revision = source
    config = AutoConfig.from_pretrained(model_id, revision=revision, **_hub_kwargs(model_kwargs))
    config = apply_rope(record.rope, config)
    # As in training: `AutoModelForCausalLM` loads of some multimodal checkpoints the text model alone, whose modules
    # have other names, so that an adapter would fit none of them.
    name = record.architecture or next(iter(config.architectures or []), "")
    loader = getattr(transformers, name, AutoModelForCausalLM)
    return loader.from_pretrained(model_id, config=config, revision=revision, **model_kwargs)


def _hub_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: model_kwargs[key] for key in ("token", "trust_remote_code", "cache_dir") if key in model_kwargs}


def _put_on(base: PreTrainedModel, adapter: str | Path, revision: str | None) -> PeftModel:
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
def _some_logits(model: Any) -> torch.Tensor:
    """Logits of 16 tokens over the model's range, float32 `(16, vocabulary)`."""
    (ids,), _ = token_ids(model.config.get_text_config(), [16])
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 16
    # Over the whole range: another RoPE gives the same logits near the beginning.
    places = torch.arange(16) * max(1, reach // 16 - 1)
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}
    inputs = {key: value[None].to(device) for key, value in inputs.items()}
    return model(**inputs, use_cache=False).logits[0].float().cpu()


def weights_sample(model: nn.Module) -> dict[str, list[float]]:
    """Return values of up to 8 norms and embeddings of a base model by name; none where weights are sharded.

    Args:
        model: the model without an adapter, or the one that an adapter was put on.

    Example:

    >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "norm": nn.LayerNorm(2)})
    >>> {name: len(values) for name, values in weights_sample(model).items()}
    {'embed.weight': 8, 'norm.weight': 2}
    """
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        kept = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        adapted = "lora_" in name or "modules_to_save" in name
        # A DTensor holds a part alone.
        if weight is not None and kept and not adapted and type(weight.data) is torch.Tensor:
            found[f"{_WRAPPED.sub('', name)}.weight"] = weight
    # From the first layer to the last, as a fine-tuned model may differ in some only.
    names, sample = sorted(found), {}
    for name in names[:: max(1, -(-len(names) // _TENSORS))]:
        head = found[name].detach().flatten()[:_HEAD]  # an embedding may have grown at its end by new tokens
        values = head[:: max(1, head.numel() // _VALUES_EACH)][:_VALUES_EACH].float().cpu().tolist()
        if values:  # ZeRO-3 leaves an empty tensor
            sample[name] = [float(f"{value:.6g}") for value in values]
    return sample


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
        near = partial(math.isclose, rel_tol=_TOLERANCE, abs_tol=1e-6)
        if len(values) != len(expected) or not all(map(near, values, expected)):
            raise ValueError(
                f"The base model must have the weights its adapter was trained on, got others in `{name}`. Give the "
                "model and revision the adapter names."
            )
