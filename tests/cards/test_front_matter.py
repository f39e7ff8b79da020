import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.cards.front_matter import split_card, split_entries, to_yaml


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), values, max_size=5))
def test_yaml_reads_back_what_was_written(mapping):
    assert yaml.safe_load(to_yaml(mapping)) == (mapping or None)


@pytest.mark.parametrize(
    "word", ["no", "y", "1K<n<10K", "10", "1e5", "2024-01-01", "a: b", "a #b", "~", "=", "0x1f", "on"]
)
def test_words_stay_words(word):
    assert yaml.safe_load(to_yaml({"language": [word]})) == {"language": [word]}


def test_numbers_stay_numbers():
    read = yaml.safe_load(to_yaml({"a": 1e-05, "b": 1e22, "c": math.inf, "d": math.nan, "e": 93.4}))
    assert read["a"] == 1e-05 and read["b"] == 1e22 and read["c"] == math.inf and math.isnan(read["d"])
    with pytest.raises(TypeError, match="plain values, got set"):
        to_yaml({"a": {1}})


FRONT = """\
# mine
license: mit # x

"quoted key": 1
tags:
- a
# between
- b
text: |
  one

  two
last: [a,
  b]
# end
"""


def test_entries_join_to_what_was_split():
    entries = split_entries(FRONT)
    assert "".join(entry.lead + entry.text for entry in entries) == FRONT
    assert [entry.key for entry in entries] == ["license", "quoted key", "tags", "text", "last", None]
    assert entries[0].lead == "# mine\n" and entries[2].text == "tags:\n- a\n# between\n- b\n"


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), values, min_size=1, max_size=4))
def test_what_is_written_can_be_taken_apart(mapping):
    entries = split_entries(split_card(f"---\n{to_yaml(mapping)}---\nbody")[0])
    assert [entry.key for entry in entries] == list(mapping)
    assert {key: value for entry in entries for key, value in yaml.safe_load(entry.text).items()} == mapping
