"""When a run must stop because asking is of no use: replies that nobody can use, requests that are refused."""

from hf_longalign.endpoint.protocol import TOO_LONG, EndpointError, GenerationError, RunStopped


# A streak is no chance where it would be rarer than this at the rate seen before it.
_CHANCE = 1e-6
_HOPELESS = 20
# Seeds of one task stand together, and one task may fail as a whole where the others do well.
_LONG = 200
_SHOWN = 300


class Breaker:
    """Notes what became of a run's requests and says when to stop.

    Replies that cannot be read or fail a check are unusable. A run whose replies are all unusable stops after 20 of
    them; one that had better ones stops after a streak of at least 200 that has a chance of less than one in a million
    at the share of unusable ones before it. What an earlier run paid for counts towards that share and in no streak,
    so that a rerun goes on past the same replies.

    >>> breaker = Breaker()
    >>> for number in range(20):
    ...     breaker.paid(f"key {number}")
    ...     stop = breaker.unusable("parse: no context", f"key {number}", "As you wish.")
    >>> str(stop)[:68]
    'None of the last 20 replies can be used. The first: parse: no contex'
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
        share = (self._unusable + 1) / (self._seen + 2)
        least = _HOPELESS if self._seen == self._unusable else _LONG
        if self._streak < least or share**self._streak > _CHANCE:
            return None
        return RunStopped(
            f"None of the last {self._streak} replies can be used. The first: {self._first}. Check the model, its "
            "chat template, `max_tokens` and the checks. The replies are in the journal; run again to go on all the "
            "same."
        )

    def refused(self, error: GenerationError) -> RunStopped | None:
        """The endpoint will not serve a request; returns why the run must stop, if it must.

        Texts that are too long may well stand together: they stop a run only where nothing else is served.
        """
        if self._any_reply and error.kind == TOO_LONG:
            return None
        self._refused += 1
        return self.hopeless(error) if self._refused >= _HOPELESS else None

    def hopeless(self, error: GenerationError) -> EndpointError:
        """Why to stop where every request is refused."""
        return EndpointError(f"Every request is refused. The last: {error} Mend that and run again.")
