"""Records come back from JSON as they were, and a file that is not one is refused by name."""

import dataclasses
import json
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_longalign.records import Report, TrainingRecord
from hf_longalign.records.base import dumps
from hf_longalign.records.report import Difference, Grid, Score
from hf_longalign.records.training import HubSource, PositionsRecord, RopeRecord


# Lone surrogates are no text that a file could hold, see `hf_longalign.text`.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


ANYTHING = TEXT | st.integers() | st.booleans() | st.lists(st.integers(), max_size=2)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def values(hint):
    """Any value of a type hint that a record may have; hypothesis itself does not know `Any`."""
    inner, origin = get_args(hint), get_origin(hint)
    if hint is Any:
        return ANYTHING
    if origin in (Union, UnionType):
        return st.one_of(st.none() if part is type(None) else values(part) for part in inner)
    if dataclasses.is_dataclass(hint):
        hints = {name: value for name, value in get_type_hints(hint).items() if get_origin(value) is not ClassVar}
        return st.builds(hint, **{name: st.just(1) if name == "version" else values(h) for name, h in hints.items()})
    if origin is dict:
        return st.dictionaries(TEXT, values(inner[1]), max_size=2)
    if origin is list:
        return st.lists(values(inner[0]), max_size=2)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    return {str: TEXT, float: FLOATS, int: st.integers(), bool: st.booleans()}[hint]


@pytest.mark.parametrize("kind", [TrainingRecord, Report])
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_every_record_survives_json(kind, data):
    record = data.draw(values(kind))
    assert kind.from_json(json.loads(dumps(record))) == record


def test_nested_values_become_records():
    record = TrainingRecord(RopeRecord("llama"), PositionsRecord("skip_all", 32768, 0.5), base=HubSource("user/base"))
    found = TrainingRecord.from_json(record.to_json())
    assert found.positions.target_length == 32768 and found.base == HubSource("user/base")
    grid = Grid([1024], [0.0, 1.0], {"base": [[0.5], [1.0]]}, {"base": [Score(0.75, 0.5, 1.0)]})
    assert Grid.from_json(grid.to_json()).by_length["base"][0].high == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be a JSON object, got list"),
        ({}, "must hold `rope`"),
        ({"rope": {"model_type": 3}}, "`RopeRecord.model_type` must be str, got 3"),
        ({"rope": {"model_type": "llama"}, "seed": True}, "`TrainingRecord.seed` must be int, got True"),
        ({"rope": {"model_type": "llama"}, "version": 99}, "version 99 is newer"),
    ],
)
def test_what_is_no_record_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        TrainingRecord.from_json(value)


def test_unknown_keys_are_ignored_and_whole_numbers_are_floats():
    found = Score.from_json({"value": 1, "low": 0, "middle": 5})
    assert found == Score(1.0, 0.0) and isinstance(found.value, float) and isinstance(found.low, float)


def test_a_difference_is_significant_where_its_interval_leaves_out_zero():
    assert Difference("b", "a", 0.1, 0.05, 0.15).significant and Difference("b", "a", -0.1, -0.2, -0.1).significant
    assert not Difference("b", "a", 0.1, -0.05, 0.25).significant and not Difference("b", "a", 0.1).significant
