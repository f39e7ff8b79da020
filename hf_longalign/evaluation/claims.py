"""Who does what: names in a shared folder, each of which one living process at a time holds.

    0f3a…  -> 5d1c…-4711-9e2b     a link: the name, by its digest, and the process that holds it
    5d1c…-4711-9e2b.alive         touched every few seconds for as long as that process lives

Processes need not know of each other: whoever works in the folder shares the work, however it was started. What a
lost process held is free again: on the same machine at once, else when it gave no sign of life for `LIMIT` seconds.
"""

import hashlib
import os
import socket
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


# Seconds without a sign of life after which a process is lost; network disks show a sign up to a minute late.
LIMIT = 180.0


@cache
def _machine() -> str:
    """What tells this machine, and within it this container, from others: here process ids say who lives."""
    try:
        told = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        told = socket.gethostname()
    return hashlib.sha256(told.encode()).hexdigest()[:12]


class Claims:
    """The names that this process holds, in a folder on a disk that all processes share.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one, other = Claims(folder), Claims(folder)
    ...     told = [one.take("a"), other.take("a"), one.take("a")]
    ...     one.close()
    ...     told, other.take("a"), other.close()
    ([True, False, True], True, None)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.met = {self.process}  # all that were seen alive so far
        self._sign = self.folder / f"{self.process}.alive"
        self._sign.touch()
        self.began = self._sign.stat().st_mtime_ns  # by the disk's own clock, as the times of files are
        self._closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with suppress(FileNotFoundError):  # see `check`
            while not self._closed.wait(LIMIT / 12):
                os.utime(self._sign)

    def check(self) -> None:
        """Refuse to go on where the others took this process for lost: what it holds is theirs now.

        Raises:
            RuntimeError: says so.
        """
        try:
            os.utime(self._sign)
        except FileNotFoundError:
            raise RuntimeError(
                f"This process gave no sign of life for {LIMIT:.0f} seconds, and others have taken its share over. "
                "Start it again: it then helps them."
            ) from None

    def take(self, name: str) -> bool:
        """Return whether this process holds a name now: it was free, or held by a process that is lost."""
        path = self._path(name)
        while True:
            try:
                os.symlink(self.process, path)  # never seen without its holder, as a file that is still empty would be
                return True
            except FileExistsError:
                holder = self._holder(path)
                if holder == self.process:
                    return True
                if holder is None or not self._lost(holder):
                    return False
                # One process alone clears up: a second would remove what the first has taken since.
                if not self.take(f"what {holder} held"):
                    return False
                self._remove(holder)
                self.release([f"what {holder} held"])
            except OSError as error:  # disks without links, such as Google Drive: one process needs no claims
                if self.alive() > 1:
                    raise ValueError(
                        f"`output_dir` must be on a disk with symbolic links where processes share it, got "
                        f"{str(self.folder)!r} ({error}). Set another folder, or start one process."
                    ) from error
                return True

    def release(self, names: Iterable[str]) -> None:
        """Let others have names that this process holds."""
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def alive(self) -> int:
        """Return how many processes live that work in the folder, this one among them."""
        living = {path.stem for path in self.folder.glob("*.alive") if not self._lost(path.stem)}
        self.met |= living
        return len(living | {self.process})

    def close(self) -> None:
        """Give up everything: this process leaves."""
        self._closed.set()
        self._remove(self.process)

    def _path(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _holder(self, path: Path) -> str | None:
        try:
            return os.readlink(path)
        except FileNotFoundError:  # released just now
            return None

    def _lost(self, process: str) -> bool:
        machine, pid, _ = process.split("-")
        try:
            # What was killed keeps its number until its parent asks how it ended.
            if machine == _machine() and psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
                return True
            # Both times are the disk's, so clocks that differ do not matter.
            self.check()
            sign = (self.folder / f"{process}.alive").stat().st_mtime
            return self._sign.stat().st_mtime - sign > LIMIT
        except (psutil.NoSuchProcess, FileNotFoundError):
            return True

    def _remove(self, process: str) -> None:
        for path in self.folder.iterdir():
            if path.suffix != ".alive" and self._holder(path) == process:
                path.unlink(missing_ok=True)
        (self.folder / f"{process}.alive").unlink(missing_ok=True)
