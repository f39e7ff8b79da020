"""What the stages hand to each other on disk: Arrow files and arrays that appear whole or not at all."""

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features


_BATCH = 1000


def write_table(path: Path, rows: Iterable[dict[str, Any]], features: Features) -> None:
    """Write rows as an Arrow file."""
    schema = features.arrow_schema
    rows = iter(rows)

    def write(unfinished: Path) -> None:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            while batch := list(islice(rows, _BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))

    _whole(path, write)


def read_table(path: Path) -> pa.Table:
    """Map an Arrow file into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array."""

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            np.save(file, array)

    _whole(path, write)


def read_array(path: Path) -> np.ndarray:
    """Map an array into memory."""
    return np.load(path, mmap_mode="r")


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path` and rename: a killed process leaves no half file that a rerun would trust."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
