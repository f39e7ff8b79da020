"""Loading a trained adapter on its base model, with the RoPE it was trained with."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_longalign.base_weights import check_weights
from hf_longalign.records.training import RopeRecord
from hf_longalign.rope import apply_rope, check_rope, check_rope_reached
from hf_longalign.run_record import load_record


logger = logging.getLogger(__name__)


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
