"""The options of `LongAlignSFTTrainer`, and what is loaded by them: a config, with RoPE scaled or not, a tokenizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import AutoConfig, AutoProcessor, TrainingArguments
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from hf_longalign.rope import model_range, scale_rope
from hf_longalign.training_options import TrainingOptions


@dataclass
class LongAlignSFTConfig(TrainingOptions, SFTConfig):
    """Configuration of [`LongAlignSFTTrainer`]: every field of [`trl.SFTConfig`], and those of [`TrainingOptions`].

    With `push_to_hub`, nothing is pushed before the end, unlike in TRL: set `hub_strategy="every_save"` to push every
    checkpoint. Each is one commit that is compared and repeated like the last one; one that fails is logged, and the
    training goes on.

    Example:

    >>> from hf_longalign import LongAlignSFTConfig
    >>> config = LongAlignSFTConfig(output_dir="out", packing=True, skip_target_length=65536, bf16=False)
    >>> config.skip_strategy
    'skip_context'
    """

    hub_strategy: HubStrategy | str = field(
        default="end",
        metadata={"help": "With `push_to_hub`: end (nothing before the end) or every_save (every checkpoint)."},
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and "loss_at_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers knows a loss by its last letters, and would keep the worst
        automatic = self.pad_to_multiple_of == "auto"  # TRL makes it None
        super().__post_init__()
        if automatic and self.compiled and self.packing:
            # Packed rows are nearly full: filled up, they are all of one length, and compiled once.
            self.pad_to_multiple_of = self.max_length
        self.check()
        if self.packing and self.packing_strategy == "wrapped" and self.skip_strategy != "none":
            raise ValueError(
                "`packing_strategy` must be 'bfd' or 'bfd_split' with "
                f"`skip_strategy={self.skip_strategy!r}`, got 'wrapped', which cuts documents and lets them see each "
                "other. Set 'bfd'."
            )
        if self.loss_weighting == "sequence" and not self.average_tokens_across_devices:
            raise ValueError(
                "`loss_weighting='sequence'` averages over the sequences of all devices, got "
                "`average_tokens_across_devices=False`. Set it to True."
            )
        if self.loss_weighting == "sequence" and (self.loss_type == "dft" or self.label_smoothing_factor > 0):
            raise ValueError(
                f"`loss_weighting='sequence'` weighs the negative log-likelihood, got "
                f"`loss_type={self.loss_type!r}` and "
                f"`label_smoothing_factor={self.label_smoothing_factor!r}`. Set 'nll' and 0."
            )

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled, by `torch_compile` or by `accelerate launch --dynamo_backend`."""
        return bool(self.torch_compile) or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"

    @classmethod
    def of(cls, args: TrainingArguments | None, model: Any) -> "LongAlignSFTConfig":
        """Complete other arguments with the defaults of this class, the way `SFTTrainer` takes `TrainingArguments`."""
        if isinstance(args, cls):
            return args
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            return cls(f"{name.split('/')[-1]}-SFT")
        # Not `to_dict`, which hides every field whose name ends in "_token".
        return cls(
            **{item.name: getattr(args, item.name) for item in fields(cls) if item.init and hasattr(args, item.name)}
        )


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
