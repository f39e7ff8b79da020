"""Dataclasses as JSON and back, nested ones included."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


Self = TypeVar("Self", bound="Record")


class Record:
    """Gives a dataclass `to_json` and `from_json`.

    Fields may be strings, numbers, booleans, `None`, records, and lists and string-keyed dicts of these. What is
    `None` is left out of the JSON. A key that no field has is ignored, so that a file of a newer release with more
    fields can be read; one with a larger `version` cannot, as its fields may mean something else.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Point(Record):
    ...     x: int
    ...     y: int | None = None
    >>> Point(1).to_json(), Point.from_json({"x": 1, "y": 2, "z": 3})
    ({'x': 1}, Point(x=1, y=2))
    """

    VERSION: ClassVar[int | None] = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        fields = dataclasses.asdict(
            self,  # type: ignore[call-overload] # every subclass is a dataclass
            dict_factory=lambda items: {name: value for name, value in items if value is not None},
        )
        # Through text, so that it is what a file gives back: lists for tuples, strings for keys.
        values: dict[str, Any] = json.loads(json.dumps(fields))
        return values

    @classmethod
    def from_json(cls: type[Self], value: Any) -> Self:
        """Return the record that `to_json` gave.

        Raises:
            ValueError: not an object, a field without a value, a value of the wrong type, or a newer version.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"A {cls.__name__} must be a JSON object, got {type(value).__name__}. Write it again.")
        if cls.VERSION is not None and value.get("version", 1) > cls.VERSION:
            raise ValueError(
                f"A {cls.__name__} of version {value['version']} is newer than this package, which knows version "
                f"{cls.VERSION}. Update it: pip install -U hf_longalign"
            )
        # Fields that a later release added are left out without a word; those it needs are in the version above.
        hints, given = get_type_hints(cls), {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name in value:
                given[field.name] = typed(hints[field.name], value[field.name], f"{cls.__name__}.{field.name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"A {cls.__name__} must hold `{field.name}`, got {sorted(value)}. Write it again.")
        return cls(**given)


def dumps(record: Record) -> str:
    """Return a record as the text of a file: two runs that know the same write the same bytes."""
    return json.dumps(record.to_json(), indent=2, ensure_ascii=False) + "\n"


def typed(hint: Any, value: Any, where: str) -> Any:
    """Return a value as a hint says it: records made of objects, floats of whole numbers.

    Raises:
        ValueError: it cannot be; the message calls it as `where` says.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        *others, last = [part for part in inner if part is not NoneType]
        for part in others:
            with suppress(ValueError):
                return typed(part, value, where)
        return typed(last, value, where)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    kind = origin or hint
    if isinstance(value, dict) and kind is dict:
        return {key: typed(inner[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple) and kind is list:
        return [typed(inner[0], item, where) for item in value]
    # JSON knows one kind of number, so 1.0 may come back as 1; `True` is an int to Python and to no reader.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = value in inner if origin is Literal else isinstance(value, kind)
    if not fits or (kind is int and isinstance(value, bool)):
        raise ValueError(f"`{where}` must be {getattr(kind, '__name__', kind)}, got {value!r}. Write the file again.")
    return value
