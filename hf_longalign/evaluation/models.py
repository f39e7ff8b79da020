"""Loading what is evaluated: a model, or an adapter with its base, so that the two may be compared."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_longalign.adapter import load_adapter, peft_config
from hf_longalign.evaluation.runner import Examinee, Generator
from hf_longalign.records.names import is_hub_id
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import apply_rope, rope_record
from hf_longalign.run_record import load_record


logger = logging.getLogger(__name__)

BASE, SCALED, ADAPTER = "base", "base, scaled RoPE", "adapter"


def load_model(
    model: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Load a model, or an adapter on its base model with the RoPE it was trained with.

    Args:
        model: directory or Hub id of the model, of an adapter the base.
        adapter: directory or Hub id of an adapter.
        revision: revision of the model.
        adapter_revision: revision of the adapter.
        **kwargs: passed to `from_pretrained` (`dtype`, `device_map`, `quantization_config` …).

    Raises:
        ValueError: the adapter was trained on another base, revision or RoPE.
    """
    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, **kwargs).eval()
    record = record_of(adapter, adapter_revision)
    revision = base_revision(model, adapter, revision, adapter_revision)
    if record:
        return load_adapter(
            adapter, base_model=model, revision=adapter_revision, base_revision=revision, **kwargs
        ).eval()
    # Trained elsewhere: it goes on, for most such adapters never had their RoPE changed.
    logger.warning("%s has no record of its training: whether it had this RoPE cannot be told.", adapter)
    base = AutoModelForCausalLM.from_pretrained(model, revision=revision, **kwargs)
    return PeftModel.from_pretrained(base, adapter, revision=adapter_revision).eval()


def load_config(
    model: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    **kwargs: Any,
) -> PretrainedConfig:
    """Return the config of a model that is served, with the RoPE its adapter was trained with; see [`load_model`]."""
    revision = base_revision(model, adapter, revision, adapter_revision)
    config = AutoConfig.from_pretrained(model, revision=revision, **kwargs)
    record = record_of(adapter, adapter_revision)
    return apply_rope(record.rope, config) if record else config


def base_revision(model: str, adapter: str | None, revision: str | None, adapter_revision: str | None) -> str | None:
    """Return the revision of a base: the one given, else the one its adapter names.

    Raises:
        ValueError: the adapter was trained on another base or revision, see [`check_base`].
    """
    if adapter is None:
        return revision
    config = peft_config(adapter, adapter_revision)
    record = record_of(adapter, adapter_revision)
    check_base(config, model, revision, known_by_weights=record is not None and bool(record.base_weights))
    return revision or (config.revision if model == config.base_model_name_or_path else None)


def check_there(**names: str | None) -> None:
    """Refuse names that are paths to nothing; the libraries would call them bad Hub ids.

    Raises:
        ValueError: names the option and its value.

    >>> check_there(adapter="./gone")
    Traceback (most recent call last):
    ValueError: `adapter` must be a folder or a Hub id, got './gone', which is not there. Correct the path.
    """
    for option, name in names.items():
        if name is not None and not Path(name).exists() and not is_hub_id(name):
            raise ValueError(
                f"`{option}` must be a folder or a Hub id, got {name!r}, which is not there. Correct the path."
            )


def record_of(adapter: str | None, revision: str | None = None) -> TrainingRecord | None:
    """Return the training record of an adapter; `None` where it has none."""
    try:
        return load_record(adapter, revision) if adapter is not None else None
    except ValueError as error:
        if "has no" in str(error):
            return None
        raise


def check_base(config: PeftConfig, model: str, revision: str | None, *, known_by_weights: bool) -> None:
    """Refuse to compare an adapter with a base it was not trained on.

    `known_by_weights`: whether the adapter's record tells its base by the weights, so that the name may differ.

    Raises:
        ValueError: another name or revision.
    """
    named = config.base_model_name_or_path
    if named and named != model and not known_by_weights:
        raise ValueError(
            f"`model` must be the base of the adapter, {named!r}, got {model!r}. Set `--model {named}`, or train the "
            "adapter with `LongAlignSFTTrainer`, whose record tells its base by the weights."
        )
    if revision is not None and config.revision is not None and revision != config.revision:
        raise ValueError(
            f"`model_revision` must be the adapter's, {config.revision!r}, got {revision!r}. Leave it out."
        )


def load_tokenizer(
    model: str,
    *,
    adapter: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that base and adapter are both asked with; the arguments are those of [`load_model`].

    Args:
        model: directory or Hub id of the model.
        adapter: of an adapter, which may have a tokenizer of its own.
        tokenizer: directory or Hub id of the tokenizer to take for both.
        revision: revision of the model.
        adapter_revision: revision of the adapter.
        **kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: the adapter's tokenizer or chat template is another than the base's, and none was chosen.
    """
    if tokenizer is not None:
        return AutoTokenizer.from_pretrained(tokenizer, **kwargs)
    of_base = AutoTokenizer.from_pretrained(model, revision=revision, **kwargs)
    if adapter is None:
        return of_base
    try:
        of_adapter = AutoTokenizer.from_pretrained(adapter, revision=adapter_revision, **kwargs)
    except (OSError, ValueError):  # it was saved without one
        return of_base
    # Compared by content, not by file: saving writes the same tokenizer in other words.
    for what, one, other in (
        ("chat template", of_base.chat_template, of_adapter.chat_template),
        ("vocabulary", of_base.get_vocab(), of_adapter.get_vocab()),
    ):
        if one != other:
            raise ValueError(
                f"Base and adapter must be asked identical prompts, got another {what} with {adapter} than with "
                f"{model}. Set `--tokenizer {adapter}` (or {model}) to ask both with the same one."
            )
    return of_base


def examinees(
    model: PreTrainedModel | PeftModel,
    generator: Generator,
    settings: dict[str, Any],
    plain: PretrainedConfig | None = None,
) -> list[Examinee]:
    """Return what is evaluated: the model, or base and adapter, which share the weights in memory.

    Args:
        model: as loaded.
        generator: answers for it.
        settings: whatever else shapes the answers, JSON-able.
        plain: the base's config as published; `None`: the model's own.
    """
    published: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = published.config
    folder = Path(config._name_or_path)
    files = sorted(path for kind in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(kind))
    # What tells a base from every other: the commit of the Hub, or the state of its files, and its RoPE and precision.
    # Hashing the weights themselves would read 140 GB of a 70B model at every start.
    weights = {
        "name": config._name_or_path,
        "commit": getattr(config, "_commit_hash", None),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "rope": rope_record(config).to_json(),
        "dtype": str(published.dtype),
    }
    base_identity = _digest({"weights": weights, **settings})
    if not isinstance(model, PeftModel):
        return [Examinee(BASE, base_identity, generator, what="the model")]
    # An adapter is small, and often trained again into the same folder: its weights themselves are hashed.
    state = hashlib.sha256(_json(model.active_peft_config.to_dict()).encode())
    for name, weight in sorted(get_peft_model_state_dict(model).items()):
        state.update(name.encode())
        state.update(weight.detach().float().cpu().numpy().tobytes())
    adapter_identity = _digest({"base": base_identity, "adapter": state.hexdigest()})
    adapter = Examinee(ADAPTER, adapter_identity, generator, what="the base with the adapter, as trained")
    base = Examinee(BASE, base_identity, generator, model.disable_adapter, what="the base without the adapter")
    if plain is None or rope_record(plain) == rope_record(model.config):
        return [base, adapter]

    # Scaling alone changes a model, on short texts for the worse: what it does must not be put down to the training,
    # nor hidden by it. So there are three.
    @contextmanager
    def as_published() -> Iterator[None]:
        with model.disable_adapter(), other_rope(model, plain):
            yield

    plain_identity = _digest({"base": base_identity, "rope": rope_record(plain).to_json()})
    base.label, base.what = SCALED, "the base without the adapter, with the RoPE scaling it was trained with"
    return [
        Examinee(BASE, plain_identity, generator, as_published, what="the base as published, RoPE not scaled"),
        base,
        adapter,
    ]


@contextmanager
def other_rope(model: torch.nn.Module, config: PretrainedConfig) -> Iterator[None]:
    """Let a model turn its queries and keys by another config's RoPE for a while, and nothing else be changed."""
    # Rotary embeddings are the only modules that hold frequencies, and transformers builds each from the config alone.
    found = {
        name: module
        for name, module in model.named_modules()
        if "rotary" in type(module).__name__.lower() and hasattr(module, "config")
    }
    text = config.get_text_config()
    try:
        for name, module in found.items():
            device = next((buffer.device for buffer in module.buffers()), None)
            model.set_submodule(name, type(module)(text).to(device))
        yield
    finally:
        for name, module in found.items():
            model.set_submodule(name, module)


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()[:16]


def _json(value: Any) -> str:
    # The order of a set, such as `target_modules`, differs from one process to the next.
    return json.dumps(
        value, sort_keys=True, default=lambda other: sorted(other) if isinstance(other, set) else str(other)
    )
