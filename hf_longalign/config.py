"""The options of `LongAlignSFTTrainer` that `trl.SFTConfig` does not have."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

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
    'skip_all'
    """

    hub_strategy: HubStrategy | str = field(
        default="end",
        metadata={"help": "With `push_to_hub`: end (nothing before the end) or every_save (every checkpoint)."},
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and "loss_at_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers knows a loss by its last letters, and would keep the worst
        super().__post_init__()
        if self.torch_compile and self.packing and self.pad_to_multiple_of == "auto":
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
