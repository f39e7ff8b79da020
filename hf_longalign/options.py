"""Options of a command line as fields of a dataclass: default, help, and the values that are right."""

import json
from dataclasses import MISSING, Field, field, fields
from inspect import get_annotations
from math import inf
from numbers import Real
from typing import Any


# Precisions of weights, as torch calls them; "auto": that of the file.
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def option(default: Any, help: str, **rules: Any) -> Any:
    """Return a field with a default, a help text and rules for its value, or for every value of a list.

    The rules that [`check_rules`] knows are `choices`, or a number's `least` and, beside it, `most`.

    Example:

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     lengths: list[int] = option([1024], "Context lengths in tokens.")
    >>> Options().lengths, Options().lengths is Options().lengths
    ([1024], False)
    """
    metadata = {"help": help, **rules}
    if isinstance(default, list):  # of which every object gets one of its own
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def own_fields(options: Any) -> list[Field[Any]]:
    """Return the fields that classes of this package declare; those of TRL's have other types and rules."""
    ours = [cls for cls in type(options).__mro__ if cls.__module__.startswith("hf_longalign.")]
    names = {name for cls in ours for name in get_annotations(cls)}
    return [one for one in fields(options) if one.name in names]


def check_rules(options: Any) -> None:
    """Refuse what the rules of an [`option`] do not allow; its default, such as `None`, is always right.

    Raises:
        ValueError: names the option, its value and the remedy.

    Example:

    >>> from hf_longalign.evaluation.options import SuiteOptions
    >>> check_rules(SuiteOptions(depths=[0.5, 2]))
    Traceback (most recent call last):
    ...
    ValueError: `depths` must be between 0 and 1, got 2. Correct it, or leave it out.
    """
    for one in own_fields(options):
        value, rules = getattr(options, one.name), one.metadata
        if not rules.keys() & {"choices", "least"}:
            continue
        for item in [value] if one.default_factory is MISSING else value:
            if item is one.default or callable(item):  # a strategy may be a function of one's own
                continue
            if "choices" in rules:
                fits, told = item in rules["choices"], f"one of {', '.join(rules['choices'])}"
            else:
                least, most = rules["least"], rules.get("most", inf)
                fits = isinstance(item, Real) and least <= item <= most
                told = f"at least {least:g}" if most == inf else f"between {least:g} and {most:g}"
            if not fits:
                raise ValueError(f"`{one.name}` must be {told}, got {item!r}. Correct it, or leave it out.")


def json_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return the value of an option that is a dictionary, or JSON on a command line; a ValueError where it is none."""
    found: Any = value or {}
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except json.JSONDecodeError:
            found = None
    if not isinstance(found, dict):
        raise ValueError(f"`{name}` must be a JSON object, got {value!r}. Quote names and text.")
    return found
