"""How long to wait before the next attempt: what the server asks for, else exponential backoff with full jitter."""

import random
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime


_FIRST = 0.5
_LONGEST = 30.0


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds the server asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as an HTTP date; else None.

    >>> retry_after({"retry-after": "1.5"}), retry_after({"retry-after-ms": "20"})
    (1.5, 0.02)
    >>> now = datetime(2026, 10, 21, 7, 28, tzinfo=timezone.utc)
    >>> retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:05 GMT"}, now)
    5.0
    """
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / scale
        except ValueError:
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - (now or datetime.now(timezone.utc))).total_seconds())


def backoff(failures: int, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: uniform over [0, min(30, 0.5 * 2^failures)].

    The full range is drawn so that requests which failed together do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    return rng.uniform(0, min(_LONGEST, _FIRST * 2 ** min(failures, 10)))
