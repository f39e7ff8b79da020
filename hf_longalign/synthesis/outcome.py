"""What became of one seed: a context, or the reason why there is none, and everything it came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_longalign.synthesis.checks import Check
from hf_longalign.synthesis.seeds import Seed


@dataclass(frozen=True)
class Provenance:
    """Where a context comes from.

    Attributes:
        generator: "openai", "transformers" or "documents".
        model: the model that wrote it; empty for a given text.
        prompt_hash: digest of the prompt that led to it; empty for a given text.
        journal_keys: the keys of its replies in the journal, in the order they were asked for.
        attempts: how many times it was begun.
    """

    generator: str = "documents"
    model: str = ""
    prompt_hash: str = ""
    journal_keys: tuple[str, ...] = ()
    attempts: int = 0


@dataclass(frozen=True)
class Outcome:
    """One seed with its context.

    Attributes:
        seed: the pair.
        context: the text; of a rejected seed the last one that was tried, or empty.
        title: what the text is about, where it is known.
        reason: why the seed was rejected; empty for one that goes into the data.
        checks: what was checked, in order.
        provenance: where the text comes from.
        scores: measured difficulty and answerability by name.
    """

    seed: Seed
    context: str = ""
    title: str | None = None
    reason: str = ""
    checks: tuple[Check, ...] = ()
    provenance: Provenance = Provenance()
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether the seed goes into the data."""
        return not self.reason


def accepted(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the indices of the accepted outcomes."""
    return [number for number, outcome in enumerate(outcomes) if outcome.accepted]
