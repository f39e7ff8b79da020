"""The processes of one run, such as one per GPU: one leads, the others ask for what it hands out.

The leader alone reads the seeds and decides what is asked. For each step it writes to every other process which part
of the work is its own, does its own part and then goes through all: what the others have asked stands in the journal,
what they are asking it waits for, and what a lost process left open it asks itself. All this goes through files in one
folder, so nothing times out however long a model writes. When the leader is lost, the first to notice leads instead.
"""

import logging
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_longalign.synthesis.disk import part_of, sweep, whole


logger = logging.getLogger(__name__)

# A network's disk may show a new file only after its cache of the folder has run out: a minute, as a rule.
MEET_SECONDS = 150.0
_POLL_SECONDS = 0.1


class Team:
    """One process's view of the processes that ask together: its `rank` of `size`; 0 leads at first.

    `folder` is for this run alone and seen by all of them; the leader makes it with `found`.
    """

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder = folder
        self.rank = rank
        self.size = size
        self._lead = FileLock(folder / "leader.lock", thread_local=False)
        self._here = folder / f"{rank}.host"
        self._steps = 0

    @staticmethod
    def found(parent: Path) -> Path:
        """Make the folder of a new team in `parent`; what killed teams have left there is removed."""
        sweep(parent / "team")
        folder = part_of(parent / "team")
        folder.mkdir(parents=True)
        return folder

    def run(self, lead: Callable[[], object], follow: Callable[[Any], object]) -> bool:
        """Lead, or follow until the leader is done; returns whether this process was the leader at the end.

        Raises:
            ValueError: the processes do not share a disk, or run on several machines.
        """
        self._meet()
        if self.rank and not self._follow(follow):
            return False
        try:
            lead()
        finally:
            (self.folder / "done").touch()
            self._lead.release()
            self._leave()
        return True

    def hand_out(self, step: Any, items: Sequence[Any]) -> list[int]:
        """Write to each process the items of `step` that it begins with; returns the leader's own order of all items.

        The leader goes through the parts of the others from their end, so that it meets them at work as late as can
        be, and helps the slow ones.
        """
        # A process that took over goes on counting where the lost leader stopped.
        self._steps = max([self._steps, *(int(path.name[:4]) for path in self.folder.glob("*.work"))]) + 1
        for rank in set(range(self.size)) - {self.rank}:
            with whole(self.folder / f"{self._steps:04}-{rank}.work") as unfinished:
                unfinished.write_bytes(pickle.dumps((step, items[rank :: self.size])))
        others = [number for number in range(len(items)) if number % self.size != self.rank]
        return [*range(self.rank, len(items), self.size), *reversed(others)]

    def _meet(self) -> None:
        """Wait until every process is seen in the folder, before anything is paid for."""
        deadline = time.monotonic() + MEET_SECONDS
        # Before its own mark is written, for which the others wait: there is never a moment without a leader.
        if not self.rank:
            self._lead.acquire()
        missing = set(range(self.size))
        while missing:
            if self.folder.is_dir() and not self._here.exists():
                self._here.write_text(socket.gethostname(), encoding="utf-8")
            # One that was quick has left already. A file that is empty is being written.
            found = {}
            for path in self.folder.glob("*.host"):
                with suppress(FileNotFoundError):  # left meanwhile: seen under its other name the next time
                    found[path] = path.read_text(encoding="utf-8")
            missing -= {int(path.name.split(".")[0]) for path, host in found.items() if host}
            elsewhere = sorted({host for host in found.values() if host} - {socket.gethostname()})
            if elsewhere or (missing and time.monotonic() > deadline):
                got = f"others on {', '.join(elsewhere)}" if elsewhere else f"no sign of process {min(missing)}"
                raise ValueError(
                    f"The {self.size} processes must run on one machine and share the folder of `cache_dir`, got "
                    f"{got}: each machine would pay for everything. Start one run per machine, with `--num_shards` "
                    "and its own `--shard_index`, then merge the journals."
                )
            if missing:
                time.sleep(_POLL_SECONDS)

    def _follow(self, follow: Callable[[Any], object]) -> bool:
        """Do what is handed out; returns whether the leader is lost, so that this process leads now."""
        done = self.folder / "done"
        seen: set[Path] = set()
        while True:
            for path in sorted(set(self.folder.glob(f"*-{self.rank}.work")) - seen):
                seen.add(path)
                # Written by a process of this very run, into a folder of its own.
                follow(pickle.loads(path.read_bytes()))
            try:
                self._lead.acquire(timeout=0)
            except Timeout:
                time.sleep(_POLL_SECONDS)
                continue
            # The lock is free because the leader has ended well, and not because it was lost.
            if done.exists():
                self._lead.release()
                self._leave()
                return False
            logger.warning("The process that led is lost: process %d leads now.", self.rank)
            return True

    def _leave(self) -> None:
        """Remove the folder with the last process; after a kill the next run does."""
        self._here.rename(self.folder / f"{self.rank}.left.host")
        if len(list(self.folder.glob("*.left.host"))) == self.size:
            shutil.rmtree(self.folder, ignore_errors=True)


def join_team(parent: Path) -> Team | None:
    """Return the team of the processes that `accelerate` or `torchrun` started, or `None` for one process alone.

    `parent` is the same folder in every process, on a disk that all of them see.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return None
    # The only word that passes between the processes otherwise than by files: which folder is this run's.
    name = [Team.found(parent).name if state.is_main_process else ""]
    broadcast_object_list(name)
    return Team(parent / name[0], state.process_index, state.num_processes)
