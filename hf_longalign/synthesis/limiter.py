"""How many requests one endpoint is sent at once: additive increase, multiplicative decrease."""

import math
import time
from collections.abc import Callable


_DECREASE = 0.7
# Recovery is quick up to here of where it last broke, slow beyond: as TCP CUBIC does, and for the same reason. With a
# plain sawtooth an endpoint would idle a fifth of its slots. Where nothing breaks well past that, it is history.
_NEAR = 0.95
_PAST = 1.1


class AdaptiveLimiter:
    """A limit that finds the number of slots an endpoint has.

    It starts at `most`: an endpoint that refuses requests charges nothing for them, and one that takes them is busy
    from the first second. A refusal, or a time-out, multiplies the limit by 0.7; of the requests sent before a
    decrease only one counts, since all of them met the same crowd. A reply adds one slot while the limit is away from
    the last one that was too high, and one slot for every full round of replies near it.

    >>> limiter = AdaptiveLimiter(10)
    >>> sent = [limiter.acquire() for _ in range(10)]
    >>> for ticket in sent[:3]:
    ...     limiter.release(ticket, congested=True)
    >>> limiter.limit, limiter.room()
    (7.0, 0)
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if most < 1:
            raise ValueError(f"`max_concurrency` must be at least 1, got {most!r}. Set it to the endpoint's slots.")
        self.most = most
        self.limit = float(most)
        self.in_flight = 0
        self.paused_until = -math.inf
        self._broke_at = math.inf
        self._round = 0
        self._clock = clock

    def room(self) -> int:
        """How many more requests may be sent now."""
        return 0 if self.paused else max(0, int(self.limit) - self.in_flight)

    @property
    def paused(self) -> bool:
        """Whether a pause is under way."""
        return self._clock() < self.paused_until

    def acquire(self) -> int:
        """Take a slot; the ticket goes back with `release`."""
        self.in_flight += 1
        return self._round

    def release(self, ticket: int, *, congested: bool = False, replied: bool = False) -> None:
        """Give a slot back, with what became of its request."""
        full = self.in_flight >= int(self.limit)
        if congested and ticket == self._round:
            self._round += 1
            self._broke_at = min(self.limit, self.in_flight)
            self.limit = max(1.0, self._broke_at * _DECREASE)
        elif replied and full:
            near = self._broke_at * _NEAR < self.limit + 1 and self.limit < self._broke_at * _PAST + 1
            self.limit = min(float(self.most), self.limit + (1.0 / self.limit if near else 1.0))
        self.in_flight -= 1

    def pause(self, seconds: float) -> None:
        """Send nothing for so long."""
        self.paused_until = max(self.paused_until, self._clock() + seconds)
