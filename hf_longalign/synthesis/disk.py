"""Files and folders that appear whole or not at all, and the tables and arrays among them."""

import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


# A table is read row by row: by number, from batches of this many rows.
_BATCH = 4000
# Longer than any single file takes to write.
_OLD_SECONDS = 24 * 3600.0
_NETWORK = ("nfs", "lustre", "gpfs", "cifs", "smb", "fuse.", "ceph", "beegfs", "glusterfs", "afs", "9p", "virtiofs")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the path of an unfinished file or folder beside `path`, which becomes `path` when the block ends well.

    What stood at `path` is replaced. Two that write one path at once both succeed, and the last one stays. What a
    killed process left unfinished is removed by the next one that writes `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    # Beside it and not in a temporary folder: a rename is atomic on one file system alone.
    unfinished = part_of(path)
    try:
        yield unfinished
        while True:
            try:
                os.replace(unfinished, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            # A folder cannot replace one that holds something: move that one away first. Another process may put its
            # own folder there in between, so until it works.
            old = part_of(path)
            with suppress(FileNotFoundError):
                os.replace(path, old)
            _remove(old)
    finally:
        _remove(unfinished)


def sweep(path: Path) -> None:
    """Remove what processes that no longer run have left beside `path`; of other machines what is older than a day."""
    import psutil

    # The host stands in the name: a process id says nothing on another machine.
    names = re.compile(rf"{re.escape(path.name)}\.(?P<host>.+)-(?P<pid>\d+)-\w+\.part")
    for other in path.parent.glob("*.part"):
        match = names.fullmatch(other.name)
        if match is None:
            continue
        here = match["host"] == socket.gethostname()
        try:
            gone = (
                not psutil.pid_exists(int(match["pid"]))
                if here
                else time.time() - other.stat().st_mtime > _OLD_SECONDS
            )
        except FileNotFoundError:  # its owner has just finished it
            continue
        if gone:
            _remove(other)


def part_of(path: Path) -> Path:
    """Return a new path beside `path` that `sweep` removes once this process is gone."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as an Arrow file."""
    rows = iter(rows)
    with whole(path) as unfinished, pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def read_table(path: Path) -> pa.Table:
    """Map an Arrow file into memory."""
    # Mapped, so that the processes that compose share one copy of all contexts.
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def table_row(table: pa.Table, number: int) -> dict[str, Any]:
    """Return one row of a table."""
    # Not `table.take`, which copies the whole of a chunked column of texts first.
    return table.slice(number, 1).to_pylist()[0]


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a `.npy` file."""
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.save(file, array)


def network_file_system(folder: Path) -> str | None:
    """Return the type of the network's file system that `folder` lies on, or `None` for a disk of this machine."""
    import psutil

    folder = folder.resolve()
    mounted = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    # The nearest mount point above it, as a network's disk may lie inside a local one.
    kind = next((mounted[place] for place in (folder, *folder.parents) if place in mounted), "")
    return kind if kind.startswith(_NETWORK) else None
