"""What a user sees while a run is under way: done, rejected, retried, tokens, cost, rate and time left."""

import logging
import time
from collections import Counter

from tqdm.auto import tqdm

from hf_longalign.synthesis.budget import Spend


logger = logging.getLogger(__name__)


class Progress:
    """A bar on a terminal, a log line every `log_every` seconds elsewhere.

    `counts` holds what happened to seeds and requests by name ("done", "rejected", "retried", "asked", "journaled"),
    `faults` the attempts that gave no reply.

    >>> progress = Progress(total=2, show=False)
    >>> progress.count("rejected"); progress.done(); progress.counts["rejected"], progress.counts["done"]
    (1, 1)
    """

    def __init__(
        self, total: int | None = None, *, name: str = "contexts", show: bool | None = None, log_every: float = 30.0
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.spend = Spend()
        self._name = name
        self._log_every = log_every
        self._logged = time.monotonic()
        # disable=None: tqdm hides the bar where stderr is no terminal, and the log lines take over.
        self._bar = tqdm(
            total=total, desc=name, unit="seed", smoothing=0.05, disable=None if show is None else not show
        )
        self._log = show is None and self._bar.disable

    def count(self, kind: str, number: int = 1) -> None:
        """Count one thing by its name."""
        self.counts[kind] += number

    def add(self, spend: Spend) -> None:
        """Add what a reply or a fault has cost."""
        self.spend += spend
        self._refresh()

    def done(self) -> None:
        """One seed has its outcome."""
        self.counts["done"] += 1
        self._bar.update()
        self._refresh()

    def close(self) -> None:
        """Leave the bar as it stands and log the last line."""
        self._bar.close()
        if self._log:
            logger.info("%s", self)

    def __str__(self) -> str:
        total = f"/{self._bar.total}" if self._bar.total else ""
        return f"{self._name}: {self.counts['done']}{total} done, " + ", ".join(
            f"{value} {key}" for key, value in self._shown().items()
        )

    def _shown(self) -> dict[str, str]:
        return {
            "rejected": str(self.counts["rejected"]),
            "retried": str(self.counts["retried"]),
            "faults": str(self.faults.total()),
            "tokens": f"{self.spend.tokens:,}",
            "cost": f"${self.spend.usd:.2f}",
        }

    def _refresh(self) -> None:
        if not self._bar.disable:
            self._bar.set_postfix(self._shown(), refresh=False)
        elif self._log and time.monotonic() - self._logged > self._log_every:
            self._logged = time.monotonic()
            logger.info("%s", self)
