"""One option of a command line as a field of a dataclass: its default and the words by which `--help` tells it."""

from dataclasses import field
from typing import Any


# Precisions of weights, as torch calls them; "auto": that of the file.
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def option(default: Any, help: str, **shown: Any) -> Any:
    """Return a field with a default, a help text, and what else a parser reads of it, such as `choices`.

    Example:

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     lengths: list[int] = option([1024], "Context lengths in tokens.")
    >>> Options().lengths, Options().lengths is Options().lengths
    ([1024], False)
    """
    metadata = {"help": help, **shown}
    if isinstance(default, list):  # of which every object gets one of its own
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
