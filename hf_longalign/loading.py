"""What the trainer loads by a model's name: its config, with RoPE scaled or not, and its tokenizer or processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoProcessor

from hf_longalign.config import LongAlignSFTConfig
from hf_longalign.rope import model_range, scale_rope


def model_config(model: Any, args: LongAlignSFTConfig) -> Any:
    """Return the config that the model has, or will be loaded with."""
    if not isinstance(model, str):
        return model.config
    options: Any = args.model_init_kwargs or {}
    if options.get("config") is not None:
        return options["config"]
    hub = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in options}
    return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **hub)


def load_processing_class(model: Any, args: LongAlignSFTConfig) -> Any:
    """Return the tokenizer or processor of the model, as TRL loads it."""
    options: Any = (isinstance(model, str) and args.model_init_kwargs) or {}
    name, revision = model if isinstance(model, str) else model.config._name_or_path, options.get("revision")
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


@contextmanager
def scaled_rope(model: Any, args: LongAlignSFTConfig) -> Iterator[None]:
    """Let TRL load the model with a scaled config; RoPE that is set on a loaded model does nothing."""
    target_length = args.skip_target_length
    if args.rope_type is None or target_length is None:
        yield
        return
    if not isinstance(model, str):
        if model_range(model.config) < target_length:
            raise ValueError(
                f"`rope_type` must be None with a model that is loaded already, got {args.rope_type!r}: now it would "
                "do nothing. Give the trainer the model's name, or load it with "
                f"`config=hf_longalign.scale_rope(config, {target_length}, {args.rope_type!r})`."
            )
        yield
        return
    given: Any = args.model_init_kwargs
    options: dict[str, Any] = dict(given or {})
    config = model_config(model, args)
    # A whole config, not its fields: multimodal models take no `rope_parameters`.
    args.model_init_kwargs = {**options, "config": scale_rope(config, target_length, args.rope_type)}
    try:
        yield
    finally:
        args.model_init_kwargs = given  # trackers write the arguments as JSON, which no config is
