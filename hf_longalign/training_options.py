"""The options of `LongAlignSFTConfig` that are this package's own, and what is wrong with them: without torch."""

from dataclasses import dataclass
from typing import Any

from hf_longalign.options import check_rules, option
from hf_longalign.positions import STRATEGIES, check_share, check_target_length


@dataclass
class CardOptions:
    """What the card of an adapter or a model says that the files do not know."""

    base_name: str | None = option(
        None, "What the card calls a base that is a local folder: its Hub id, or a neutral name."
    )
    license: str | None = option(None, "Licence of the model, as the Hub names it: apache-2.0, cc-by-4.0 …")
    languages: list[str] = option([], "ISO 639 codes of its languages.")

    def check(self) -> None:
        """Refuse a licence that is not written as the Hub's ids are."""
        from hf_longalign.cards.page import check_license

        check_license(license=self.license)

    def card(self) -> dict[str, Any]:
        """Return them as arguments of `write_adapter_card`."""
        return {"base_model": self.base_name, "license": self.license, "languages": self.languages}


@dataclass
class TrainingOptions(CardOptions):
    """The fields of [`LongAlignSFTConfig`] without those of [`trl.SFTConfig`]; each is told in its help."""

    # Parameters that control the positions
    skip_strategy: str = option(
        "skip_context",
        "How positions are skipped: none, SkipAlign's skip_inner, skip_outer and skip_all "
        "(https://arxiv.org/abs/2405.03939), skip_context (not before a response), pose, randpos or cream.",
        choices=list(STRATEGIES),
    )
    skip_target_length: int | None = option(
        None, "Number of positions to spread a sample over. Unset: the range the model is made for, scaling included."
    )
    skip_probability: float = option(0.5, "Share of the samples that are skipped; the others keep ordinary positions.")
    rope_type: str | None = option(
        None,
        "Scale RoPE before the model is loaded, so that its range covers `skip_target_length`; the model "
        "must be given by its name. proportional is Gemma 4's. Unset: the model's own.",
        # Those that need nothing but a length; "longrope" needs factors that somebody has searched for the model.
        choices=["yarn", "linear", "dynamic", "llama3", "proportional"],
    )

    # Parameters that control the loss
    loss_weighting: str = option(
        "token",
        "Whether every target token of a step weighs the same, as in TRL (token), or every sequence "
        "(sequence), LongAlign's formula (https://arxiv.org/abs/2401.18058).",
        choices=["token", "sequence"],
    )

    # Parameters that control the evaluation
    eval_distances: list[int] | None = option(
        None,
        "Distances such as 4096 16384: each evaluation also gives the loss of short rows whose blocks are "
        "moved apart until relative distances reach them, as eval_loss_at_4096, and that of tokens to be copied "
        "from there, as eval_copy_loss_at_4096; before the first step too.",
    )

    # Parameters that control the checks
    preflight: bool = option(
        True,
        "Prove by a few tiny forwards before the first step that documents do not see each other and that "
        "attention reaches across skipped positions.",
    )

    def check(self) -> None:
        """Refuse values that no training could use.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        super().check()
        check_rules(self)
        check_share("skip_probability", self.skip_probability)
        if self.skip_target_length is not None:
            check_target_length(self.skip_target_length, name="skip_target_length")
        if self.rope_type is not None and self.skip_target_length is None:
            raise ValueError(
                f"`skip_target_length` must be given with `rope_type={self.rope_type!r}`, which scales the model's "
                "range to it, got None. Set it to the length you need."
            )
        for distance in self.eval_distances or ():
            check_target_length(distance, name="eval_distances")
