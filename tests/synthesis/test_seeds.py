import json
import re

import pytest
from datasets import Dataset

from hf_longalign.synthesis import rows
from hf_longalign.synthesis.rows import BadRowError
from hf_longalign.synthesis.seeds import read_seeds


GOOD = {"instruction": "Who was the oldest?", "answer": "Homer Wells"}


def write(path, *lines):
    text = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in text))
    return str(path)


BAD = {
    "missing": (
        json.dumps({"instruction": "Who?", "text": "x"}),
        "`answer`: missing. Columns here: instruction, text",
    ),
    "empty": (json.dumps({**GOOD, "answer": "  "}), "column `answer`: empty"),
    "type": (json.dumps({**GOOD, "answer": 7}), "column `answer`: not a string but int"),
    "null": (json.dumps({**GOOD, "instruction": None}), "column `instruction`: not a string but NoneType"),
    "context type": (json.dumps({**GOOD, "context": ["x"]}), "column `context`: not a string but list"),
    "json": ('{"instruction": "Who?" "answer": "x"}', "broken JSON at character 24: Expecting ',' delimiter"),
    "cut": ('{"instruction": "Who?", "answer": "x', "broken JSON at character 37: Invalid control character"),
    "array": ('["Who?"]', "a JSON list, not an object"),
    "encoding": (b'{"instruction": "Caf\xe9?", "answer": "x"}', "not UTF-8 at byte 21"),
    "task": (json.dumps({**GOOD, "task": "squad"}), "column `task`: unknown task. `task` must be one of 2wikimqa"),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path, line, message):
    path = write(tmp_path / "pairs.jsonl", GOOD, "", line, {**GOOD, "answer": "Ada"})
    with pytest.raises(BadRowError, match=re.escape(f"{path}, line 3") + ".*" + re.escape(message)):
        read_seeds(path)


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_skip_counts_the_bad_row_and_keeps_the_good_ones(tmp_path, line, message):
    path = write(tmp_path / "pairs.jsonl", GOOD, "", line, {**GOOD, "answer": "Ada"})
    found = read_seeds(path, on_bad_seed="skip")
    assert [seed.answer for seed in found.seeds] == ["Homer Wells", "Ada"]
    assert found.skipped.total() == 1
    assert [seed.origin for seed in found.seeds] == ["pairs.jsonl:1", "pairs.jsonl:4"]


def test_a_byte_order_mark_is_named(tmp_path):
    path = write(tmp_path / "pairs.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), {**GOOD, "answer": "Ada"})
    with pytest.raises(BadRowError, match="line 1: starts with a byte order mark"):
        read_seeds(path)
    assert [seed.answer for seed in read_seeds(path, on_bad_seed="skip").seeds] == ["Ada"]


def test_a_line_over_10_mb_is_named_and_the_next_one_is_read(tmp_path):
    huge = json.dumps({**GOOD, "context": "x" * (rows.MAX_LINE_BYTES * 2)})
    path = write(tmp_path / "pairs.jsonl", GOOD, huge, {**GOOD, "answer": "Ada"})
    with pytest.raises(BadRowError, match="line 2: longer than 10 MB"):
        read_seeds(path)
    found = read_seeds(path, on_bad_seed="skip")
    assert [seed.origin for seed in found.seeds] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert found.skipped == {"longer than 10 MB": 1}


def test_a_duplicate_id_names_both_places(tmp_path):
    path = write(tmp_path / "pairs.jsonl", {**GOOD, "id": "q1"}, {**GOOD, "answer": "Ada", "id": "q1"})
    with pytest.raises(BadRowError, match=r"line 2, column `id`: duplicate id\. 'q1' stands at line 1 of .*pairs"):
        read_seeds(path)
    assert len(read_seeds(path, on_bad_seed="skip").seeds) == 1


def test_the_same_row_twice_is_dropped_and_counted(tmp_path):
    found = read_seeds(write(tmp_path / "pairs.jsonl", GOOD, GOOD))
    assert len(found.seeds) == 1 and found.skipped == {"the same row twice": 1}


def test_no_good_row_and_no_such_file(tmp_path):
    path = write(tmp_path / "pairs.jsonl", "{", "[")
    with pytest.raises(ValueError, match=r"at least one good row, got none and 2 bad"):
        read_seeds(path, on_bad_seed="skip")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        read_seeds(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="`on_bad_seed`"):
        read_seeds([GOOD], on_bad_seed="ignore")


def test_contexts_of_a_second_file_are_joined_by_line(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", GOOD, "{", {**GOOD, "answer": "Ada"})
    texts = write(tmp_path / "texts.jsonl", {"context": "one"}, {"context": "two"}, {"context": "three"})
    found = read_seeds(f"hotpotqa={pairs}", contexts=[f"hotpotqa={texts}"], on_bad_seed="skip")
    assert [(seed.answer, seed.context) for seed in found.seeds] == [("Homer Wells", "one"), ("Ada", "three")]
    short = write(tmp_path / "short.jsonl", {"context": "one"})
    with pytest.raises(BadRowError, match=r"line 3: no context on the same line\. .* hotpotqa ends at 1"):
        read_seeds(f"hotpotqa={write(tmp_path / 'two.jsonl', GOOD, '', GOOD)}", contexts=[f"hotpotqa={short}"])


@pytest.mark.parametrize("kind", ["parquet", "dataset", "list", "directory"])
def test_every_source_gives_the_same_seeds(tmp_path, kind):
    records = [{**GOOD, "task": "2wikiqa", "context": "Text.", "id": "a"}, {**GOOD, "task": None, "id": "b"}]
    records[1]["context"] = None
    data = Dataset.from_list(records)
    if kind == "parquet":
        source = str(tmp_path / "pairs.parquet")
        data.to_parquet(source)
    elif kind == "directory":
        (tmp_path / "set").mkdir()
        data.to_json(tmp_path / "set" / "train.jsonl")
        source = str(tmp_path / "set")
    else:
        source = data if kind == "dataset" else records
    seeds = read_seeds(source).seeds
    assert [(seed.seed_id, seed.task, seed.context) for seed in seeds] == [
        ("a", "2wikimqa", "Text."),
        ("b", "general", None),
    ]


def test_per_task_keeps_the_first_of_each_task():
    pairs = [{**GOOD, "answer": str(i), "task": task} for i in range(5) for task in ("qasper", "qmsum")]
    kept = read_seeds(pairs, per_task=2).seeds
    assert [(seed.task, seed.answer) for seed in kept] == [
        (task, str(i)) for i in range(2) for task in ("qasper", "qmsum")
    ]


def test_the_id_of_a_row_is_its_content(tmp_path):
    one = read_seeds(write(tmp_path / "a.jsonl", GOOD)).seeds[0]
    two = read_seeds(write(tmp_path / "b.jsonl", {**GOOD, "answer": "Ada"}, GOOD)).seeds[1]
    assert one.seed_id == two.seed_id


def test_marks_of_published_multi_news_become_line_breaks():
    context = "A storm. NEWLINE_CHAR NEWLINE_CHAR NEWLINE_CHAR It rained. ||||| Floods  NEWLINE_CHAR  followed."
    pairs = [{**GOOD, "task": task, "context": context} for task in ("multinews", "hotpotqa")]
    cleaned, kept = read_seeds(pairs).seeds
    assert cleaned.context == "A storm.\n\nIt rained.\n\nFloods\nfollowed." and kept.context == context


def test_one_file_of_contexts_cannot_serve_two_files_of_seeds(tmp_path):
    texts = write(tmp_path / "texts.jsonl", {"context": "one"})
    seeds = [f"hotpotqa={write(tmp_path / name, GOOD)}" for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ValueError, match="`contexts` of hotpotqa must belong to one file of seeds, got 2"):
        read_seeds(seeds, contexts=[f"hotpotqa={texts}"])
