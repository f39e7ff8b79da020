"""What generation did and how long it took."""

from dataclasses import dataclass


@dataclass
class GenerationStats:
    """Counts and seconds, added up over all calls of a generator.

    Attributes:
        prompt_tokens: tokens of the prompts answered.
        cached_tokens: those of them that were not computed, because an earlier prompt had them too.
        generated_tokens: tokens of the answers.
        seconds: time spent reading and answering; of several processes the sum.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
