"""When a run must stop: what it may spend, and when asking is of no use."""

from dataclasses import dataclass, replace

from hf_longalign.endpoint.protocol import TOO_LONG, EndpointError, GenerationError, Request, RunStopped


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

    def at(self, share: float) -> "Budget":
        """The same limits at a share of the prices, such as 0.5 in a Batch API."""
        return replace(self, prompt_price=share * self.prompt_price, completion_price=share * self.completion_price)

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


class BudgetExceeded(RunStopped):
    """What is left of the budget is less than the next request may cost."""


# So many requests in a row without a reply, or replies of no use, and the rest would fare no better.
HOPELESS = 20
# A streak is no chance where it would be rarer than this at the rate seen before it.
_CHANCE = 1e-6
# Seeds of one task stand together, and one task may fail as a whole where the others do well.
_LONG = 200
_SHOWN = 300


class Breaker:
    """Notes what became of a run's requests and says when to stop.

    A run whose replies all fail to be read or checked stops after 20 of them; one that had better ones stops after a
    streak of at least 200 that has a chance of less than one in a million at the share of unusable ones before it.
    What an earlier run paid for counts towards that share and in no streak, so that a rerun goes on past it.
    """

    def __init__(self) -> None:
        self._paid: set[str] = set()
        self._seen = self._unusable = self._streak = self._refused = 0
        self._first = ""
        self._any_reply = False

    def paid(self, key: str) -> None:
        """A reply came from the generator, not from the journal."""
        self._paid.add(key)
        self.replied()

    def replied(self) -> None:
        """There is a reply, so not every request is refused."""
        self._any_reply = True
        self._refused = 0

    def usable(self) -> None:
        """A context, or a pair, went through all checks."""
        # A usable reply ends the streak, and what was in it now counts towards the share.
        self._seen += self._streak + 1
        self._unusable += self._streak
        self._streak = 0

    def unusable(self, reason: str, key: str, text: str) -> RunStopped | None:
        """The reply `text` to the request `key` cannot be used; returns why the run must stop, if it must."""
        if key not in self._paid:
            self._seen += 1
            self._unusable += 1
            return None
        if not self._streak:
            self._first = f"{reason}, in {' '.join(text.split())[:_SHOWN]!r}"
        self._streak += 1
        # Laplace's rule of succession: neither 0 nor 1 before anything was seen.
        share = (self._unusable + 1) / (self._seen + 2)
        least = HOPELESS if self._seen == self._unusable else _LONG
        if self._streak < least or share**self._streak > _CHANCE:
            return None
        return RunStopped(
            f"None of the last {self._streak} replies can be used. The first: {self._first}. Check the model, its "
            "chat template, `max_tokens` and the checks. The replies are in the journal; run again to go on all the "
            "same."
        )

    def refused(self, error: GenerationError) -> RunStopped | None:
        """The endpoint will not serve a request; returns why the run must stop, if it must."""
        # Texts that are too long may well stand together: they stop a run only where nothing else is served.
        if self._any_reply and error.kind == TOO_LONG:
            return None
        self._refused += 1
        return self.hopeless(error) if self._refused >= HOPELESS else None

    def hopeless(self, error: GenerationError) -> EndpointError:
        """Why to stop where every request is refused."""
        return EndpointError(f"Every request is refused. The last: {error} Mend that and run again.")
