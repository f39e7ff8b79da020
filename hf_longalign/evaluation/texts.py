"""Texts for haystacks and perplexity, from files or from a data set."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

from hf_longalign.evaluation.haystack import read_texts


def load_texts(source: str, *, column: str = "text", split: str = "train") -> Iterable[str]:
    """Return the texts of a file or folder, see [`read_texts`], or of a column of a data set, read as they are needed.

    Args:
        source: path, or id of a data set on the Hub.
        column: of the data set.
        split: of the data set.

    Raises:
        ValueError: a path to nothing, or no such column.
        ConnectionError: the data set cannot be had.
    """
    if (
        Path(source).exists()
        or Path(source).suffix == ".txt"
        or source.count("/") > 1
        or source.startswith((".", "~", "/"))
    ):
        return read_texts(source)
    try:
        rows = load_dataset(source, split=split, streaming=True)
    except Exception as error:  # the Hub's, the network's, the format's
        raise ConnectionError(
            f"`haystack` must be a text file, a folder or a data set, got {source!r}: there is no such path, and as a "
            f"data set it cannot be had ({type(error).__name__}: {error}). Correct it, or leave it out."
        ) from error
    return _column(rows, column)


def _column(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ValueError(
                f"`haystack_column` must be one of {', '.join(row)}, got {column!r}. Set it to the text's."
            )
        yield row[column]
