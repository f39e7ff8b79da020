"""Looking through everything that is about to be pushed for what must not be published."""

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_longalign.hub.private import Find, Machine, find_in_text, find_private, row_patterns


_BATCH_ROWS = 256
_SHOWN = 5
# Vocabularies hold any word and path of their training data: only what is this machine's own is searched for.
_VOCABULARY = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}


class Finding(NamedTuple):
    """A find and where it is: the file, and a line, key, column or row in it."""

    file: str
    where: str
    find: Find


def check_private(files: Mapping[str, Path | bytes], machine: Machine, allow: Collection[str] = ()) -> None:
    """Raise unless nothing private is in the files.

    Args:
        files: path in the repository -> file or content.
        machine: what tells of this machine.
        allow: texts that may be published as they are.

    Raises:
        ValueError: names the first finds with file, place and kind; secrets are masked.

    Example:

    >>> check_private({"README.md": b"# Rows"}, Machine())
    >>> check_private({"README.md": b"# Rows" + b"\\n" + b"from /home/me/rows"}, Machine())
    Traceback (most recent call last):
    ...
    ValueError: What is published must not be private, got an absolute path in README.md, line 2: /home/me/rows. Take
    it out, or put a text that may be seen by everyone into `allow`.
    """
    found = list(islice(scan(files, machine, allow), _SHOWN + 1))
    if found:
        texts = [f"{find.kind} in {file}, {where}: {find.shown}" for file, where, find in found[:_SHOWN]]
        more = "; and more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"What is published must not be private, got {'; '.join(texts)}{more}. Take it out, or put a text that "
            "may be seen by everyone into `allow`."
        )


def scan(files: Mapping[str, Path | bytes], machine: Machine, allow: Collection[str] = ()) -> Iterator[Finding]:
    """Yield what is private: in file names, texts, JSON, the headers of safetensors, Parquet footers and columns."""
    for name, content in sorted(files.items()):
        for find in find_in_text(name, machine, allow):
            yield Finding(name, "its name", find)
        if name.endswith(".parquet"):
            places = _in_parquet(content, machine, allow)
        elif name.endswith(".safetensors"):
            places = _in_json(_safetensors_header(content), machine, allow)
        else:
            places = _in_file(name, _read(content), machine, allow)
        for where, find in places:
            yield Finding(name, where, find)


def _read(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _in_file(name: str, data: bytes, machine: Machine, allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        for find in find_private(data.decode("latin-1"), machine.patterns(), allow):
            yield "its bytes", find
        return
    if name in _VOCABULARY:
        for find in find_private(text, machine.patterns(), allow):
            yield "its vocabulary", find
    elif name.endswith(".json") and (value := _parsed(text)) is not None:
        yield from _in_json(value, machine, allow)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            for find in find_in_text(line, machine, allow):
                yield f"line {number}", find


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _in_json(value: Any, machine: Machine, allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    """By decoded string, so that an escaped line break is no Windows path."""
    for key, text in _strings(value):
        # The key belongs to it: "password" alone says nothing, nor does its value.
        last = key.rpartition(".")[2]
        for find in find_in_text(f'{last}: "{text}"' if last else text, machine, allow):
            yield f"key {key}" if key else "its value", find


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, name
            yield from _strings(item, f"{key}.{name}" if key else name)
    elif isinstance(value, (list, tuple)):  # a map's items are tuples
        for item in value:
            yield from _strings(item, key)


def _safetensors_header(content: Path | bytes) -> Any:
    """The header: 8 bytes of its length, then JSON (https://github.com/huggingface/safetensors#format)."""
    if isinstance(content, bytes):
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    with content.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _in_parquet(content: Path | bytes, machine: Machine, allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    source = pa.BufferReader(content) if isinstance(content, bytes) else content
    with pq.ParquetFile(source) as file:
        for key, value in (file.metadata.metadata or {}).items():
            if key != b"ARROW:schema":  # the same again, in base64
                for find in find_in_text(value.decode("utf-8", "replace"), machine, allow):
                    yield f"footer {key.decode('utf-8', 'replace')}", find
        for name in file.schema_arrow.names:
            for find in find_in_text(name, machine, allow):
                yield "a column's name", find
        yield from _in_rows(file, row_patterns(machine), allow)


def _in_rows(file: pq.ParquetFile, patterns: Mapping[str, str], allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    """RE2 tells at some hundred MB a second which texts to look at; `find_private` then says what is in them."""
    anything = "|".join(f"(?:{pattern})" for pattern in patterns.values())
    first = 0
    for batch in file.iter_batches(_BATCH_ROWS):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if any(_matches(texts, anything) for texts in _text_arrays(column)):
                for row, value in enumerate(column.to_pylist()):
                    for _, text in _strings(value):
                        for find in find_private(text, patterns, allow):
                            yield f"column {name}, row {first + row}", find
        first += batch.num_rows


def _matches(texts: pa.Array, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(texts, pattern)).as_py())


def _text_arrays(array: pa.Array) -> Iterator[pa.Array]:
    """The strings in an array, however deep they lie."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _text_arrays(array.dictionary)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield array
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _text_arrays(array.flatten())
    elif pa.types.is_map(kind):
        yield from _text_arrays(array.keys)
        yield from _text_arrays(array.items)
    elif pa.types.is_struct(kind):
        for field in array.flatten():
            yield from _text_arrays(field)
