"""The options of `LongAlignSFTTrainer` that `trl.SFTConfig` does not have."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from hf_longalign.training_options import TrainingOptions


@dataclass
class LongAlignSFTConfig(TrainingOptions, SFTConfig):
    r"""Configuration of [`LongAlignSFTTrainer`]: every field of [`trl.SFTConfig`] and the ones below.

    Parameters:
        > Parameters that control the positions

        skip_strategy (`str`, *optional*, defaults to `"skip_all"`):
            How positions are skipped: `"none"`, SkipAlign's `"skip_inner"`, `"skip_outer"` and `"skip_all"`
            (https://arxiv.org/abs/2405.03939), `"skip_context"` (anywhere but before a response), `"pose"`,
            `"randpos"` or `"cream"`. See [`~hf_longalign.positions.sample_positions`].
        skip_target_length (`int` or `None`, *optional*):
            Number of positions to spread a sample over. `None`: the range the model is made for, RoPE scaling
            included.
        skip_probability (`float`, *optional*, defaults to `0.5`):
            Share of the samples that are skipped; the others keep ordinary positions.
        rope_type (`str` or `None`, *optional*):
            Scale the model's RoPE before it is loaded, so that its range covers `skip_target_length`: `"yarn"`,
            `"linear"`, `"dynamic"`, `"llama3"` or `"proportional"` (Gemma 4). The model must be given by its name; see
            [`~hf_longalign.rope.scale_rope`].

        > Parameters that control the loss

        loss_weighting (`str`, *optional*, defaults to `"token"`):
            `"token"`: every target token of an optimiser step weighs the same, as in TRL. `"sequence"`: every sequence
            does, LongAlign's formula (https://arxiv.org/abs/2401.18058), exact under packing, gradient accumulation
            and several processes.

        > Parameters that control the evaluation

        eval_distances (`list[int]`, *optional*):
            Distances, such as `[4096, 16384]`: each evaluation also gives the loss of short evaluation rows whose
            blocks are moved apart until relative distances reach them, as `eval_loss_at_4096` and so on, which
            `metric_for_best_model` may name. Measured before the first step, too. See
            [`~hf_longalign.distances.stretched_positions`].
        eval_distances_rows (`int`, *optional*, defaults to `16`):
            How many rows, the first ones of the evaluation data.

        > Parameters that control the card and the push

        base_name (`str` or `None`, *optional*):
            What the card and the published files call the base model, where it was loaded from a local folder: its
            Hub id, or a neutral name.
        license (`str` or `None`, *optional*):
            Licence of the trained model, as the Hub names it.
        languages (`list[str]`, *optional*):
            ISO 639 codes of its languages.
        hub_strategy (`str`, *optional*, defaults to `"end"`):
            With `push_to_hub`, what is pushed before the end: `"end"`, nothing, unlike TRL's default; `"every_save"`,
            every checkpoint, each as one commit that is compared and repeated like the last one. One that fails is
            logged, and the training goes on.

        > Parameters that control the checks

        preflight (`bool`, *optional*, defaults to `True`):
            Whether to prove with a few tiny forwards, before the first step, that documents do not see each other and
            that attention reaches across skipped positions.

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
