"""A run in parts, on many machines: each fills a journal, the journals are merged, and one run composes."""

import logging
import re
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_longalign.endpoint.protocol import RunStopped
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.disk import part_of, whole
from hf_longalign.synthesis.journal import Journal


logger = logging.getLogger(__name__)

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
