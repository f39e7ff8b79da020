"""What a run may spend: limits in tokens and dollars, and the price of a token."""

from dataclasses import dataclass

from hf_longalign.endpoint.protocol import Request


@dataclass(frozen=True)
class Spend:
    """Tokens and dollars, spent or set aside."""

    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(self.tokens + other.tokens, self.usd + other.usd)


@dataclass(frozen=True)
class Budget:
    """Limits over everything the journal holds, earlier runs and other processes included.

    Before a request is sent, the most it can cost is set aside, so that a limit is never passed. Prices are in dollars
    per million tokens, as price lists give them.

    >>> budget = Budget(usd=1.0, prompt_price=0.15, completion_price=0.60)
    >>> budget.cost(1_000_000, 500_000)
    Spend(tokens=1500000, usd=0.45)
    >>> budget.allows(Spend(10, 0.99), Spend(10, 0.02))
    False
    """

    tokens: int | None = None
    usd: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tokens", "usd"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"`budget_{name}` must be above 0, got {limit!r}. Set None for no limit.")
        for name in ("prompt_price", "completion_price"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` must be at least 0, got {getattr(self, name)!r}. Set it to $ per 1M tokens."
                )
        if self.usd is not None and not self.prompt_price and not self.completion_price:
            raise ValueError(
                "`budget_usd` must come with prices, got none. Set `prompt_price` and `completion_price` in dollars "
                "per million tokens."
            )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Spend:
        """What these tokens cost."""
        usd = (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6
        return Spend(prompt_tokens + completion_tokens, usd)

    def most(self, request: Request) -> Spend:
        """The most one attempt at `request` can cost."""
        return self.cost(request.most_prompt_tokens, request.sampling.token_limit)

    def allows(self, committed: Spend, more: Spend) -> bool:
        """Whether `more` fits beside what is spent or set aside."""
        total = committed + more
        return (self.tokens is None or total.tokens <= self.tokens) and (self.usd is None or total.usd <= self.usd)
