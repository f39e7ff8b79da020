"""Draws the next token of each row from a sequence of random numbers that only the row's request decides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_longalign.synthesis.generators.base import Request, Sampling


if TYPE_CHECKING:
    import torch


class Draw:
    """A logits processor that draws each row's next token itself and leaves no other to choose from.

    Token i of a row comes from number i of a sequence that the request's key seeds: the first token, by falling
    probability, at which the cumulated probability exceeds that number times the mass that `top_p` keeps.
    """

    def __init__(self, requests: Sequence[Request], width: int, longest: int, device: "torch.device") -> None:
        import torch

        self._width = width
        # On the CPU, where the same seed gives the same numbers on every machine; the step past the end is never read.
        draws = [
            torch.rand(longest + 1, generator=torch.Generator().manual_seed(int(request.key[:15], 16)))
            for request in requests
        ]
        self._draws = torch.stack(draws).to(device)
        self._temperature = torch.tensor([_temperature(request.sampling) for request in requests], device=device)
        top_p = [1.0 if request.sampling.top_p is None else request.sampling.top_p for request in requests]
        self._top_p = torch.tensor(top_p, device=device)

    def __call__(self, tokens: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores `(rows, vocabulary)` -> 0 for the token drawn, minus infinity for all others."""
        import torch

        step = min(tokens.shape[1] - self._width, self._draws.shape[1] - 1)
        greedy = self._temperature == 0
        temperature = self._temperature.masked_fill(greedy, 1.0)[:, None]
        ordered, order = (scores.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        mass = ordered.cumsum(-1)
        # A token is kept if those before it hold less than top_p: the first always is.
        kept = (mass - ordered < self._top_p[:, None]).sum(-1, keepdim=True)
        target = self._draws[:, step, None] * mass.gather(-1, kept - 1)
        place = torch.searchsorted(mass, target, right=True).clamp(max=kept - 1).masked_fill(greedy[:, None], 0)
        return torch.full_like(scores, -torch.inf).scatter(-1, order.gather(-1, place), 0.0)


def _temperature(sampling: Sampling) -> float:
    return 1.0 if sampling.temperature is None else sampling.temperature
