"""LongBench's rows, from the Hub or from local files in its format.

The Hub repository of v1 offers its data through a loading script, which `datasets` no longer runs: its `data.zip` is
read. That of v2 holds one `data.json`.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from huggingface_hub import hf_hub_download

from hf_longalign.evaluation.longbench.tasks import EVEN_TASKS, V2, find_task, length_range


HUB_ID, V2_HUB_ID = "zai-org/LongBench", "zai-org/LongBench-v2"


@dataclass(frozen=True)
class Row:
    """One row of a task.

    Attributes:
        context: the long text.
        input: the question or the last example; empty where a task has none. In v2 the question and its choices.
        answers: the references, at least one.
        classes: all labels of a classification task, in the data's order.
        parts: parts of the task that it counts to: LongBench-E's range of lengths, v2's difficulty and length.
    """

    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    parts: tuple[str, ...] = ()


def read_rows(task: str, source: str | Path | None = None) -> Iterator[Row]:
    """Yield the rows of a task in the data's order.

    Args:
        task: LongBench's name of the task, such as "hotpotqa", "hotpotqa_e" or "longbench_v2".
        source: a folder with `<task>.jsonl` (or `data/<task>.jsonl`), one such file, LongBench's `data.zip`, or the id
            of a data set on the Hub that holds `data.zip`. For v2 a folder with `data.json`, that file, or the id of a
            data set that holds it. `None`: LongBench's own on the Hub.

    Raises:
        ValueError: no such task; a row that is not LongBench's, with its file, line and column.
        FileNotFoundError: the source does not have the task.
        ConnectionError: the Hub could not be asked, with what to do.
    """
    needs_classes = find_task(task).metric == "classification"
    if task == V2:
        yield from _v2_rows(_local(V2_HUB_ID if source is None else source, "data.json"))
        return
    with _open(task, _local(HUB_ID if source is None else source, "data.zip")) as (name, lines):
        for number, line in enumerate(lines, 1):
            if line.strip():
                row, place = _checked_json(line, f"{name}, line {number}"), f"{name}, line {number}"
                yield _row(row, place, needs_classes, even=task in EVEN_TASKS)


def _local(source: str | Path, file: str) -> Path:
    """The path itself, or the file fetched from the Hub."""
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or str(source).count("/") != 1 or path.suffix or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"`longbench_source` must be a file, a folder or a Hub id, got {str(source)!r}, which is not there. "
            "Correct the path."
        )
    try:
        return Path(hf_hub_download(str(source), file, repo_type="dataset"))
    except Exception as error:  # the client raises its own, httpx's, OSError and ValueError, by what went wrong
        raise ConnectionError(
            f"LongBench's data could not be fetched from the Hub data set {str(source)!r} ({type(error).__name__}: "
            f"{error}). Download its {file} on a machine that reaches the Hub, and set `longbench_source` to that "
            "file or to the folder it unpacks to."
        ) from error


@contextmanager
def _open(task: str, source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The task's file with its name, in a folder, in an archive or by itself."""
    if source.is_dir():
        places = [source / f"{task}.jsonl", source / "data" / f"{task}.jsonl"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"`longbench_source` must hold {task}.jsonl, got the folder {str(source)!r} without it. Set it "
                "to another folder, or leave the task out."
            )
        with found.open("rb") as file:
            yield str(found), file
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == f"{task}.jsonl"), None)
            if member is None:
                raise FileNotFoundError(
                    f"`longbench_source` must hold {task}.jsonl, got the archive {str(source)!r} without it. Set "
                    "it to LongBench's data.zip, or leave the task out."
                )
            with archive.open(member) as file:
                yield f"{source}/{member}", file
    else:
        if source.name != f"{task}.jsonl":
            raise FileNotFoundError(
                f"`longbench_source` must be {task}.jsonl to have the task {task!r}, got {str(source)!r}. Set it to "
                "the folder."
            )
        with source.open("rb") as file:
            yield str(source), file


def _checked_json(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(
            f"{place}: a row must be JSON, got {line[:80]!r} ({error}). Mend or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object, got {line[:80]!r}. Mend or remove the line.")
    return row


def _column(row: dict[str, Any], place: str, column: str, kind: str, fits: Callable[[Any], bool]) -> Any:
    if column not in row or not fits(row[column]):
        got = repr(row[column])[:80] if column in row else "no such column"
        raise ValueError(f"{place}: `{column}` must be {kind}, got {got}. Mend or remove the row.")
    return row[column]


def _row(row: dict[str, Any], place: str, needs_classes: bool, *, even: bool) -> Row:
    answers = _column(
        row, place, "answers", "a list of one or more texts", lambda value: _texts(value) and bool(value)
    )
    classes = (
        _column(row, place, "all_classes", "a list of texts", _texts) if needs_classes else row.get("all_classes")
    )
    words = _column(row, place, "length", "a number of words", lambda value: isinstance(value, int)) if even else 0
    return Row(
        context=_column(row, place, "context", "a text", _text),
        input=_column(row, place, "input", "a text", _text),
        answers=tuple(answers),
        classes=tuple(classes or ()),
        parts=(length_range(words),) if even else (),
    )


def _v2_rows(source: Path) -> Iterator[Row]:
    places = [source / f"{V2}.jsonl", source / "data.json"] if source.is_dir() else [source]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"`longbench_source` must hold data.json to have LongBench v2, got the folder {str(source)!r} without it."
        )
    if path.suffix == ".jsonl":
        lines = enumerate(path.read_bytes().splitlines(), 1)
        rows = ((_checked_json(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines)
    elif path.suffix == ".json":
        whole = json.loads(path.read_text(encoding="utf-8"))
        rows = ((row, f"{path}, row {number}") for number, row in enumerate(whole, 1))
    else:
        raise FileNotFoundError(
            f"`longbench_source` must be data.json to have LongBench v2, got {str(source)!r}. Set it to that file."
        )
    for row, place in rows:
        question, *choices = (
            _column(row, place, name, "a text", _text).strip()
            for name in ("question", "choice_A", "choice_B", "choice_C", "choice_D")
        )
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", choices, strict=True))
        yield Row(
            context=_column(row, place, "context", "a text", _text).strip(),
            input=f"{question}\nChoices:\n{listed}",
            answers=(_column(row, place, "answer", "one of A, B, C, D", lambda value: value in ("A", "B", "C", "D")),),
            classes=(),
            parts=tuple(_column(row, place, name, "a word", _text) for name in ("difficulty", "length")),
        )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))
