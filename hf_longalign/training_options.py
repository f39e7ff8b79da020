"""The options of `LongAlignSFTConfig` that are this package's own, and what is wrong with them: without torch."""

from dataclasses import dataclass, field
from typing import Literal

from hf_longalign.positions import STRATEGIES, check_share, check_target_length, get_strategy


# Those that need nothing but a length; "longrope" needs factors that somebody has searched for the model.
ROPE_TYPES = ("yarn", "linear", "dynamic", "llama3", "proportional")


@dataclass
class TrainingOptions:
    """The fields of `LongAlignSFTConfig` without those of `trl.SFTConfig`, for a command line; they are told there."""

    skip_strategy: str = field(
        default="skip_all",
        metadata={
            "help": "How positions are skipped: none, skip_inner, skip_outer, skip_all, skip_context, pose, randpos "
            "or cream.",
            "choices": list(STRATEGIES),
        },
    )
    skip_target_length: int | None = field(
        default=None,
        metadata={"help": "Number of positions to spread a sample over. Default: the range the model is made for."},
    )
    skip_probability: float = field(
        default=0.5,
        metadata={"help": "Share of the samples that are skipped; the others keep ordinary positions."},
    )
    rope_type: str | None = field(
        default=None,
        metadata={
            "help": "Scale RoPE so that the model's range covers `skip_target_length`. Default: the model's own.",
            "choices": list(ROPE_TYPES),
        },
    )
    loss_weighting: Literal["token", "sequence"] = field(
        default="token",
        metadata={"help": "Whether every target token (token) or every sequence (sequence) weighs the same."},
    )
    base_name: str | None = field(
        default=None,
        metadata={"help": "What the card calls a base that was a local folder: its Hub id, or a neutral name."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the trained model, as the Hub names it."})
    languages: list[str] = field(default_factory=list, metadata={"help": "ISO 639 codes of its languages."})
    eval_distances: list[int] | None = field(
        default=None,
        metadata={"help": "Distances at which evaluations give the loss of stretched rows, such as 4096 16384."},
    )
    eval_distances_rows: int = field(
        default=16, metadata={"help": "Rows of the evaluation data that are stretched to `eval_distances`."}
    )
    preflight: bool = field(
        default=True,
        metadata={"help": "Whether to prove before the first step that attention over skipped positions is right."},
    )

    def check(self) -> None:
        """Refuse values that no training could use.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        from hf_longalign.cards.page import check_license

        check_license(license=self.license)
        get_strategy(self.skip_strategy, name="skip_strategy")
        check_share("skip_probability", self.skip_probability)
        if self.skip_target_length is not None:
            check_target_length(self.skip_target_length, name="skip_target_length")
        if self.rope_type is not None and self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"`rope_type` must be one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}. Set 'yarn' if in doubt."
            )
        if self.rope_type is not None and self.skip_target_length is None:
            raise ValueError(
                f"`skip_target_length` must be given with `rope_type={self.rope_type!r}`, which scales the model's "
                "range to it, got None. Set it to the length you need."
            )
        for distance in self.eval_distances or ():
            check_target_length(distance, name="eval_distances")
        if self.eval_distances_rows < 1:
            raise ValueError(
                f"`eval_distances_rows` must be at least 1, got {self.eval_distances_rows!r}. Set 16 if in doubt."
            )
        if self.loss_weighting not in ("token", "sequence"):
            raise ValueError(
                f"`loss_weighting` must be 'token' or 'sequence', got {self.loss_weighting!r}. "
                "Set 'token' for TRL's loss."
            )
