"""LongBench's rows, from the Hub's archive or from local files in its format.

The Hub repository offers its data through a loading script, which `datasets` no longer runs: its `data.zip` is read.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from huggingface_hub import hf_hub_download

from hf_longalign.evaluation.longbench.tasks import find_task


HUB_ID = "zai-org/LongBench"


@dataclass(frozen=True)
class Row:
    """One row of a task.

    Attributes:
        context: the long text.
        input: the question or the last example; empty where a task has none.
        answers: the references, at least one.
        classes: all labels of a classification task, in the data's order.
        length: words of the row, or characters in Chinese, where the data say it.
    """

    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int | None


def read_rows(task: str, source: str | Path = HUB_ID) -> Iterator[Row]:
    """Yield the rows of a task in the data's order.

    Args:
        task: LongBench's name of the task, such as "hotpotqa" or "hotpotqa_e".
        source: a folder with `<task>.jsonl` (or `data/<task>.jsonl`), one such file, LongBench's `data.zip`, or the id
            of a data set on the Hub that holds `data.zip`.

    Raises:
        ValueError: no such task; a row that is not LongBench's, with its file, line and column.
        FileNotFoundError: the source does not have the task.
        ConnectionError: the Hub could not be asked, with what to do.
    """
    needs_classes = find_task(task).metric == "classification"
    with _open(task, _local(source)) as (name, lines):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(line, f"{name}, line {number}", needs_classes)


def _local(source: str | Path) -> Path:
    """The path itself, or the archive fetched from the Hub."""
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or str(source).count("/") != 1 or path.suffix or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"`source` must be a file, a folder or a Hub id, got {str(source)!r}, which is not there."
        )
    try:
        return Path(hf_hub_download(str(source), "data.zip", repo_type="dataset"))
    except Exception as error:  # the client raises its own, httpx's, OSError and ValueError, by what went wrong
        raise ConnectionError(
            f"LongBench's data could not be fetched from the Hub data set {str(source)!r} ({type(error).__name__}: "
            f"{error}). Download its data.zip on a machine that reaches the Hub, and set `source` to that file or to "
            "the folder it unpacks to."
        ) from error


@contextmanager
def _open(task: str, source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The task's file with its name, in a folder, in an archive or by itself."""
    if source.is_dir():
        places = [source / f"{task}.jsonl", source / "data" / f"{task}.jsonl"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"`source` must hold {task}.jsonl, got the folder {str(source)!r} without it.")
        with found.open("rb") as file:
            yield str(found), file
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == f"{task}.jsonl"), None)
            if member is None:
                raise FileNotFoundError(
                    f"`source` must hold {task}.jsonl, got the archive {str(source)!r} without it."
                )
            with archive.open(member) as file:
                yield f"{source}/{member}", file
    else:
        if source.name != f"{task}.jsonl":
            raise FileNotFoundError(
                f"`source` must be {task}.jsonl to have the task {task!r}, got {str(source)!r}. Set it to the folder."
            )
        with source.open("rb") as file:
            yield str(source), file


def _row(line: bytes, place: str, needs_classes: bool) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(
            f"{place}: a row must be JSON, got {line[:80]!r} ({error}). Mend or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object, got {line[:80]!r}. Mend or remove the line.")

    def checked(column: str, kind: str, fits: bool) -> Any:
        if not fits:
            got = repr(row[column])[:80] if column in row else "no such column"
            raise ValueError(f"{place}: `{column}` must be {kind}, got {got}. Mend or remove the line.")
        return row[column]

    answers, classes, length = row.get("answers"), row.get("all_classes"), row.get("length")
    return Row(
        context=checked("context", "a text", isinstance(row.get("context"), str)),
        input=checked("input", "a text", isinstance(row.get("input"), str)),
        answers=tuple(checked("answers", "a list of one or more texts", _texts(answers) and bool(answers))),
        classes=tuple(checked("all_classes", "a list of texts", _texts(classes)) if needs_classes else classes or ()),
        length=checked("length", "a number of words", isinstance(length, int)) if "length" in row else None,
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
