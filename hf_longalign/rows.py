"""Rows and texts from anywhere, each with its file and line, so that a bad one can be named.

JSONL and CSV are read here rather than by `datasets`, which names neither line nor column of a broken row, and by the
line, so that a file of any size is read in constant memory.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any

from hf_longalign.text import clean


MAX_LINE_BYTES = 10_000_000
FORMATS = ".jsonl, .json, .csv (each also as .gz), .parquet"
_FILE = re.compile(r"(\.jsonl|\.json|\.csv)(\.gz)?$|\.parquet$", re.IGNORECASE)
# A name that ends like a file is none of the Hub's, whose names have full stops too.
_HUB_NAME = re.compile(
    r"(?!.*\.(jsonl|json|csv|gz|parquet|txt|md)$)"
    r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<config>[^:@/\\]+))?(@(?P<split>[\w.-]+))?"
)
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


class BadRowError(ValueError):
    """A row that cannot be used, named by file, line and column.

    Attributes:
        reason: the kind of fault in a few words, by which skipped rows are counted.
    """

    def __init__(self, row: "Row", reason: str, remedy: str, column: str | None = None):
        where = f", column `{column}`" if column else ""
        super().__init__(f"{row.place}{where}: {reason}. {remedy}")
        self.reason = f"{reason} (`{column}`)" if column else reason


@dataclass(frozen=True)
class Row:
    """One row and the place it came from: `file` as the user wrote it, `number` counted from 1, 0 for a whole file.

    A row that could not be read has a `fault` for whoever asks for its values.
    """

    found: dict[str, Any]
    file: str
    number: int
    unit: str = "line"
    fault: "BadRowError | None" = None

    @property
    def values(self) -> dict[str, Any]:
        """What was read, column to value; raises the fault of a broken row."""
        if self.fault:
            raise self.fault
        return self.found

    @property
    def place(self) -> str:
        """File and number, for messages."""
        return f"{self.file}, {self.unit} {self.number}"

    @property
    def origin(self) -> str:
        """File name and number, without directories: fit for a row that is published."""
        return f"{_name(self.file)}:{self.number}" if self.number else _name(self.file)


@cache  # a million rows have one name
def _name(file: str) -> str:
    # Python keeps the bytes of a file name that is not UTF-8 as half characters.
    return clean(Path(file).name)


def read_rows(source: Any, option: str = "seeds", *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a source, their texts made safe by `hf_longalign.text.clean`; a broken one carries its fault.

    `source` is a path to JSONL, CSV (both also compressed, `.gz`) or Parquet, a directory or Hub data set
    `user/name[:config][@split]`, a `datasets.Dataset`, a pandas `DataFrame`, or a list of dicts; `option` is what
    messages call it. With `streaming`, a Hub data set is read as far as it is needed, and not kept on disk.

    Raises a ValueError where it is none of them, or a Parquet file that is not whole; a ConnectionError for a data set
    that cannot be had.

    >>> [row.values for row in read_rows([{"answer": "Ada\\0"}])]
    [{'answer': 'Ada'}]
    """
    if not isinstance(source, str | Path):
        rows = _read_memory(source)
    elif not (path := Path(source)).is_file():
        rows = _read_dataset(str(source), option, streaming)
    elif kind := _FILE.search(path.name):
        # Parquet compresses by itself and is read from its end: not as .gz.
        readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv, "": _read_parquet}
        rows = readers[(kind[1] or "").lower()](path)
    else:
        raise ValueError(f"`{option}` must end with one of {FORMATS}, got {str(source)!r}. Convert or rename it.")
    for row in rows:
        # Made anew and not by `replace`, which takes as long as reading the line.
        yield row if row.fault else Row(_cleaned(row.found), row.file, row.number, row.unit)


def read_texts(source: str, option: str, *, streaming: bool = False) -> Iterator[tuple[str, Row]]:
    """Yield the texts of a source, not stripped, each with the row it stands in.

    `source` is a text file, which is one text, or what [`read_rows`] takes, with a column `text` or `context`; for the
    other arguments see there. Raises a BadRowError for a row without such a column, a ValueError for a file that is
    empty or not UTF-8, and what `read_rows` raises.
    """
    path = Path(source)
    if path.is_file() and not _FILE.search(path.name):
        try:
            # utf-8-sig: Windows editors put a byte order mark in front, which would be the first token of the text.
            text = clean(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            told = f"got {source!r}, which is not at byte {error.start + 1}. Save it as UTF-8."
            raise ValueError(f"`{option}` must be UTF-8, {told}") from None
        if not text.strip():
            raise ValueError(f"`{option}` must hold text, got an empty file, {source!r}. Leave it out.")
        yield text, Row({}, source, 0)
        return
    for row in read_rows(source, option, streaming=streaming):
        found = [row.values[name] for name in ("text", "context") if name in row.values] or [None]
        text = next(filter(None, found), found[0])  # "" where none holds more: data sets have such between paragraphs
        if not isinstance(text, str):
            raise BadRowError(row, "no text", f"Give `{option}` a column text or context.")
        yield text, row


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key) if isinstance(key, str) else key: _cleaned(part) for key, part in value.items()}
    return [_cleaned(part) for part in value] if isinstance(value, list | tuple) else value


def _read_memory(source: Any) -> Iterator[Row]:
    if hasattr(source, "to_dict") and hasattr(source, "isna"):
        # A DataFrame iterates over its columns, and writes NaN where a value is missing.
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    for number, values in enumerate(source, 1):
        place = Row({}, "seeds", number, "row")
        if isinstance(values, dict):
            yield replace(place, found=dict(values))
        else:
            yield _broken(place, f"not a dict but {type(values).__name__}", "Give rows as dicts, column to value.")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        yield from read_jsonl(file, str(path), MAX_LINE_BYTES)


def read_jsonl(file: IO[bytes], name: str, most: int = sys.maxsize - 1) -> Iterator[Row]:
    """Yield the rows of JSONL as they are, of a file of that name; a line of over `most` bytes is a fault."""
    for number in count(1):
        place = Row({}, name, number)
        try:
            line = file.readline(most + 1)
            # A line that is too long is read to its end in pieces and thrown away, so that its number and the next
            # row are right.
            rest = line
            while len(line) > most and rest and not rest.endswith(b"\n"):
                rest = file.readline(most)
        except _BROKEN_GZIP as error:
            yield _broken(place, f"the compressed file ends early or is damaged ({error})", "Write it again.")
            return
        if not line:
            return
        if len(line) > most:
            yield _broken(place, f"longer than {most // 1_000_000} MB", "Split the row, or store the data as Parquet.")
        elif line.strip():
            yield _parse(line, place)


def _parse(line: bytes, place: Row) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig"))  # as for texts
    except UnicodeDecodeError as error:
        return _broken(place, f"not UTF-8 at byte {error.start + 1}", "Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return _broken(place, f"broken JSON at character {error.colno}: {error.msg}", "Mend or delete the line.")
    if not isinstance(values, dict):
        return _broken(place, f"a JSON {type(values).__name__}, not an object", "Write one object per line.")
    return Row(values, place.file, place.number)


def _broken(place: Row, reason: str, remedy: str) -> Row:
    return replace(place, fault=BadRowError(place, reason, remedy))


def _read_csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a line of column names; spreadsheets put a byte order mark in front, which is fine."""
    # The csv module's own limit is 128 KiB for a field, fewer than one context has; it is global, so only raise it.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        # Without `strict` an unclosed quote swallows the rest of the file as one field and nobody is told.
        reader = csv.DictReader(file, restkey="", strict=True)
        while True:
            # The line where the row begins: one with line breaks in its quotes spans several. Line 1 has the names.
            place = Row({}, str(path), max(2, reader.line_num + 1))
            try:
                values = next(reader, None)
            except (csv.Error, UnicodeDecodeError, *_BROKEN_GZIP) as error:
                # What follows cannot be told apart into rows any more.
                yield _broken(place, f"broken CSV ({error})", "Save the file as UTF-8 CSV, with a closed quote each.")
                return
            if values is None:
                return
            if "" in values:
                yield _broken(place, "more fields than columns", "Put text with commas into double quotes.")
            else:
                yield replace(place, found={name: value or None for name, value in values.items()})


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # In batches: a whole column of contexts would not fit into memory.
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, str(path), number, "row")
    except (pyarrow.ArrowException, OSError) as error:
        # Arrow's messages go on for lines with its own C++ sources.
        told = str(error).partition(". ")[0]
        raise ValueError(
            f"{path}: cannot be read as Parquet after row {number} ({told}). The file is cut short or damaged: write "
            "or download it again."
        ) from None


def _read_dataset(source: str, option: str, streaming: bool) -> Iterator[Row]:
    match = None if Path(source).is_dir() else _HUB_NAME.fullmatch(source)
    name, config, split = match.group("name", "config", "split") if match else (source, None, None)
    told = f"`{option}` must be a file, a folder or a data set, user/name[:config][@split], got {source!r}, which "
    if not match and not Path(source).is_dir():
        raise ValueError(f"{told}is not there. Correct it.")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split or "train", streaming=streaming)
    except Exception as error:  # the Hub's, the network's, the format's
        raise ConnectionError(
            f"{told}is no file and as a data set cannot be had ({type(error).__name__}: {error}). Correct it."
        ) from error
    for number, values in enumerate(rows, 1):
        yield Row(dict(values), source, number, "row")


def text_arrays(array: Any) -> Iterator[Any]:
    """Yield the arrays of strings in an Arrow array, however deep they lie."""
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        yield from text_arrays(array.dictionary)
    elif types.is_string(kind) or types.is_large_string(kind):
        yield array
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        # `values` would ignore that a batch is a slice of a longer array.
        yield from text_arrays(array.flatten())
    elif types.is_map(kind):
        yield from text_arrays(array.keys)
        yield from text_arrays(array.items)
    elif types.is_struct(kind):
        for field in array.flatten():
            yield from text_arrays(field)
