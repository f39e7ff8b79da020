"""Rows of a data file, each with its file and line, so that a bad one can be named.

JSONL is read here rather than by `datasets`, which names neither line nor column of a broken row, and by the line, so
that a file of any size is read in constant memory.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO


MAX_LINE_BYTES = 10_000_000
_BOM = b"\xef\xbb\xbf"
_HUB_NAME = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?$")


class BadRowError(ValueError):
    """A row that cannot be used, named by file, line and column.

    Attributes:
        reason: the kind of fault in a few words, by which skipped rows are counted.
    """

    def __init__(self, row: "Row", reason: str, remedy: str, column: str | None = None):
        place = f"{row.file}, {row.unit} {row.number}" + (f", column `{column}`" if column else "")
        super().__init__(f"{place}: {reason}. {remedy}")
        self.reason = f"{reason} (`{column}`)" if column else reason


@dataclass(frozen=True)
class Row:
    """One row: its values, and the place it came from (`file` as the user wrote it, `number` counted from 1).

    A row that could not be read has a `fault` and no values: the reader raises it or counts it.
    """

    values: dict[str, Any]
    file: str
    number: int
    unit: str = "line"
    fault: "BadRowError | None" = None

    @property
    def origin(self) -> str:
        """File name and number, without directories: fit for a row that is published."""
        return f"{Path(self.file).name}:{self.number}"


def read_rows(source: Any) -> Iterator[Row]:
    """Yield the rows of a source; a broken one carries its fault.

    Args:
        source: a path to JSONL or Parquet, a directory or Hub data set `user/name[:config][@split]`, a
            `datasets.Dataset`, or a list of dicts.

    Raises:
        ValueError: no such file, and not the name of a Hub data set either.

    Example:

    >>> [row.values for row in read_rows([{"answer": "Ada"}])]
    [{'answer': 'Ada'}]
    """
    if not isinstance(source, (str, Path)):
        yield from (Row(dict(values), "seeds", number, "row") for number, values in enumerate(source, 1))
    elif Path(source).suffix in (".jsonl", ".json") and Path(source).is_file():
        yield from _read_jsonl(Path(source))
    elif Path(source).suffix == ".parquet" and Path(source).is_file():
        yield from _read_parquet(Path(source))
    else:
        yield from _read_dataset(str(source))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = Row({}, str(path), number)
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                limit = f"longer than {MAX_LINE_BYTES // 1_000_000} MB"
                yield _broken(place, limit, "Split the row, or store the data as Parquet.")
            elif line.strip():
                yield _parse(line, place)


def _skip_line(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)


def _parse(line: bytes, place: Row) -> Row:
    if line.startswith(_BOM):
        return _broken(place, "starts with a byte order mark", "Save the file as UTF-8 without one.")
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _broken(place, f"not UTF-8 at byte {error.start + 1}", "Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return _broken(place, f"broken JSON at character {error.colno}: {error.msg}", "Mend or delete the line.")
    if not isinstance(values, dict):
        return _broken(place, f"a JSON {type(values).__name__}, not an object", "Write one object per line.")
    return replace(place, values=values)


def _broken(place: Row, reason: str, remedy: str) -> Row:
    return replace(place, fault=BadRowError(place, reason, remedy))


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
        for values in batch.to_pylist():
            number += 1
            yield Row(values, str(path), number, "row")


def _read_dataset(source: str) -> Iterator[Row]:
    from datasets import load_dataset

    match = _HUB_NAME.match(source)
    if Path(source).is_dir():
        name, config, split = source, None, None
    elif match and not Path(source).suffix:
        name, config, split = match["name"], match["config"], match["split"]
    else:
        raise ValueError(
            f"{source}: no such file. Give a .jsonl or .parquet file or a Hub data set user/name[@split]."
        )
    for number, values in enumerate(load_dataset(name, config, split=split or "train"), 1):
        yield Row(dict(values), source, number, "row")
