"""A run in parts: shards on many machines, whose journals are merged, and teams of processes on one."""

import logging
import pickle
import re
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_longalign.endpoint.protocol import RunStopped
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.disk import part_of, sweep, whole
from hf_longalign.synthesis.journal import Journal


logger = logging.getLogger(__name__)

# A network's disk may show a new file only after its cache of the folder has run out: a minute, as a rule.
MEET_SECONDS = 150.0
_POLL_SECONDS = 0.1
_NAME = re.compile(r"shard-(?P<index>\d+)-of-(?P<count>\d+)\.sqlite")


def run_shard(options: Mapping[str, Any], folder: str | Path, index: int, count: int) -> Path:
    """Ask for one part of the seeds and put the journal of its replies into a folder that all machines see.

    The journal is filled on a disk of this machine, then copied whole and renamed, for sqlite does not work on
    every network's disk. A shard that is there already is skipped. One that was interrupted goes on where it stopped:
    from the journal that this machine has of it, else from the one that a machine put down as half done. What the
    finished shards of another count hold is taken over from them.

    Args:
        options: the arguments of [`ContextSynthesisBuilder`]; `cache_dir` is a folder of this machine.
        folder: where finished shards go, the same for all machines.
        index: which part, from 0.
        count: how many parts there are.

    Raises:
        ValueError: `index` and `count` that do not fit, a `journal` in `options`, or what the builder raises.
        RunStopped: the budget is spent or the endpoint gone; the same call goes on later.

    >>> import tempfile
    >>> pairs = [{"instruction": f"Which dam is dam {n}?", "answer": f"dam {n}", "context": f"It is dam {n}."}
    ...          for n in range(4)]
    >>> with tempfile.TemporaryDirectory() as disk:
    ...     options = {"seeds": pairs, "checks": ["support"], "n_distractors": 1, "cache_dir": disk}
    ...     [run_shard(options, f"{disk}/shards", index, 2).name for index in range(2)]
    ['shard-0-of-2.sqlite', 'shard-1-of-2.sqlite']
    """
    if not 0 <= index < count:
        raise ValueError(f"`index` must be from 0 to below `count`, got {index} of {count}. Count the parts from 0.")
    if options.get("journal") is not None:
        raise ValueError(f"`journal` must be None in shards, got {options['journal']!r}. Each has one of its own.")
    finished = Path(folder) / f"shard-{index}-of-{count}.sqlite"
    if not finished.exists():  # before the seeds are read
        builder = ContextSynthesisBuilder(**options)
        builder.pipeline.shard = (index, count)
        fill_shard(builder, folder)
    return finished


def fill_shard(builder: ContextSynthesisBuilder, folder: str | Path) -> bool:
    """Do what `run_shard` does, for `builder.pipeline.shard`; returns whether this process of a team led."""
    index, count = builder.pipeline.shard
    name = f"shard-{index}-of-{count}.sqlite"
    finished, half = Path(folder) / name, Path(folder) / f"{name}.half"
    if finished.exists():
        logger.info("%s is finished.", name)
        return True
    there = Path(folder).glob("shard-*.sqlite") if Path(folder).exists() else ()
    builder.pipeline.others = tuple(path for path in sorted(there) if _NAME.fullmatch(path.name))
    local = builder.pipeline.journal = builder.files.folder / "shards" / name
    local.parent.mkdir(parents=True, exist_ok=True)
    # The processes of a team come here together, and one that copied late would replace what others have open.
    with FileLock(f"{local}.lock"):
        if half.exists() and not local.exists():
            with whole(local) as unfinished:
                shutil.copy(half, unfinished)
        with Journal(local):  # one that nothing needs to be asked for is a journal too
            pass
    try:
        leads = builder.prepare_outcomes()
    # A queue that ends a job (Slurm: SIGTERM, of which `Runner` makes SystemExit) may start it again elsewhere.
    except (RunStopped, KeyboardInterrupt, SystemExit):
        if not Path(f"{local}-wal").exists():  # no other process of a team has it open: its last one puts it down
            _put_down(local, half)
        raise
    if leads:
        _put_down(local, finished)
        half.unlink(missing_ok=True)
    return leads


def merge_shards(folder: str | Path, journal: str | Path | None = None) -> Path:
    """Merge the finished shards of a folder into one journal, from which a run over all seeds composes for nothing.

    Shards may overlap, and shards of two counts may lie side by side: each reply is taken once, and all that was paid
    is counted. Returns the path of the journal, by default `journal.sqlite` in the folder.

    Raises:
        ValueError: no shard, or shards are missing; names them.
        JournalError: a shard is not whole.
    """
    target = Path(journal) if journal is not None else Path(folder) / "journal.sqlite"
    found = finished_shards(folder)  # before the journal is made
    with Journal(target) as merged:
        for path in found:
            logger.info("%s: %d new replies.", path.name, merged.merge(path))
    return target


def finished_shards(folder: str | Path) -> list[Path]:
    """Return the shards in a folder, of all counts. Raises a ValueError where of every count one is missing."""
    found = {path: match for path in sorted(Path(folder).iterdir()) if (match := _NAME.fullmatch(path.name))}
    missing: dict[int, set[int]] = {}
    for match in found.values():
        count = int(match["count"])
        missing.setdefault(count, set(range(count))).discard(int(match["index"]))
    if not any(not left for left in missing.values()):
        count = min(missing, key=lambda count: len(missing[count]), default=0)
        told = ", ".join(f"shard-{index}-of-{count}.sqlite" for index in sorted(missing.get(count, ()))[:10])
        got = f"{len(found)} without {told}" if found else "none"
        raise ValueError(f"`folder` must hold every shard of one count, got {got}. Run what is missing.")
    return list(found)


def _put_down(local: Path, shared: Path) -> None:
    snapshot = part_of(local)
    try:
        # Not the file itself: the other processes of a team may be closing it just now. On this disk, as sqlite's
        # locks do not work on every network's.
        with closing(sqlite3.connect(local)) as connection:
            connection.execute("VACUUM INTO ?", (str(snapshot),))
        with whole(shared) as unfinished:
            shutil.copy(snapshot, unfinished)
    finally:
        snapshot.unlink(missing_ok=True)


class Team:
    """One process's view of the processes that ask together, such as one per GPU: its `rank` of `size`; 0 leads first.

    The leader alone reads the seeds and decides what is asked. For each step it writes to every other process which
    part of the work is its own, does its own part and then goes through all: what the others have asked stands in the
    journal, what they are asking it waits for, and what a lost process left open it asks itself. All this goes through
    files in one folder, so nothing times out. When the leader is lost, the first to notice leads instead.

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

        Raises a ValueError where the processes do not share a disk, or run on several machines.
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
        """Write to each process the items of `step` that it begins with; returns the leader's order of all items."""
        # A process that took over goes on counting where the lost leader stopped.
        self._steps = max([self._steps, *(int(path.name[:4]) for path in self.folder.glob("*.work"))]) + 1
        for rank in set(range(self.size)) - {self.rank}:
            with whole(self.folder / f"{self._steps:04}-{rank}.work") as unfinished:
                unfinished.write_bytes(pickle.dumps((step, items[rank :: self.size])))
        # From their end, so that it meets the others at work as late as can be, and helps the slow ones.
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
    """Return the team that `accelerate` or `torchrun` started, which all see `parent`; `None` for one process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return None
    # The only word that passes between the processes otherwise than by files: which folder is this run's.
    name = [Team.found(parent).name if state.is_main_process else ""]
    broadcast_object_list(name)
    return Team(parent / name[0], state.process_index, state.num_processes)
