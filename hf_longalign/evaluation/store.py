"""Results on disk the moment they are there, so that a killed run goes on where it stopped."""

import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


class ResultStore:
    """JSON values by key in a folder, one append-only file per process; every process reads all of them.

    A value is on disk before `add` returns. A line that a kill cut off is left out when the folder is read, and
    removed before its file is written to again.

    Args:
        folder: where the files go; it is made.
        rank: number of this process.

    Raises:
        OSError: the folder cannot be written to.

    Example:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ResultStore(folder) as store:
    ...         store.add("a", {"text": "42"})
    ...     with ResultStore(folder, rank=1) as store:
    ...         store.get("a"), "b" in store
    ({'text': '42'}, False)
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"results-{rank}.jsonl"
        self._file = path.open("ab+")
        self._cut_off_torn_line()
        self._values: dict[str, Any] = {}
        self._read: dict[Path, int] = {}
        self.refresh()

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """Return the value of a key that is there."""
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Write a JSON-able value, which is on disk when this returns."""
        line = json.dumps({"key": key, "value": value})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._values[key] = value

    def refresh(self) -> None:
        """Read what the processes have added since the last time."""
        for path in sorted(self.folder.glob("results-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data.rfind(b"\n") + 1  # the rest is being written, or was cut off
            for line in data[:whole].splitlines():
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            self._read[path] = self._read.get(path, 0) + whole

    def wait_for(self, keys: Iterable[str], *, every: float = 0.5, tell_every: float = 60.0) -> None:
        """Wait until other processes have added all keys: no collective operation, so no time-out.

        Args:
            keys: what must be there.
            every: seconds between two looks.
            tell_every: seconds between two log lines with how many are missing.
        """
        missing, told = set(keys), -tell_every
        while True:
            self.refresh()
            missing = {key for key in missing if key not in self._values}
            if not missing:
                return
            if time.monotonic() - told >= tell_every:
                told = time.monotonic()
                logger.info("Waiting for %d results of other processes in %s.", len(missing), self.folder)
            time.sleep(every)

    def _cut_off_torn_line(self) -> None:
        self._file.seek(0)
        size = self._file.seek(0, os.SEEK_END)
        position, tail = size, b""
        while position and b"\n" not in tail:
            step = min(position, 1 << 16)
            position -= step
            self._file.seek(position)
            tail = self._file.read(step) + tail
        self._file.truncate(position + tail.rfind(b"\n") + 1)
