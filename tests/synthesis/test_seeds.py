import gzip
import json
import re

import pandas as pd
import pytest
from datasets import Dataset

from hf_longalign import rows
from hf_longalign.rows import BadRowError
from hf_longalign.synthesis.seeds import read_seeds
from hf_longalign.synthesis.tokens import ControlTokens


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


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    path = write(tmp_path / "pairs.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), {**GOOD, "answer": "Ada"})
    assert [seed.answer for seed in read_seeds(path).seeds] == ["Homer Wells", "Ada"]


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
    with pytest.raises(ValueError, match=r"`seeds` must be a file, .*nowhere\.jsonl', which is not there"):
        read_seeds(str(tmp_path / "nowhere.jsonl"))


def test_contexts_of_a_second_file_are_joined_by_line(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", GOOD, "{", {**GOOD, "answer": "Ada"})
    texts = write(tmp_path / "texts.jsonl", {"context": "one"}, {"context": "two"}, {"context": "three"})
    found = read_seeds(f"hotpotqa={pairs}", contexts=[f"hotpotqa={texts}"], on_bad_seed="skip")
    assert [(seed.answer, seed.context) for seed in found.seeds] == [("Homer Wells", "one"), ("Ada", "three")]
    short = write(tmp_path / "short.jsonl", {"context": "one"})
    with pytest.raises(BadRowError, match=r"line 3: no context on the same line\. .* hotpotqa ends at 1"):
        read_seeds(f"hotpotqa={write(tmp_path / 'two.jsonl', GOOD, '', GOOD)}", contexts=[f"hotpotqa={short}"])


KINDS = ["p.parquet", "p.jsonl", "p.JSONL", "p.jsonl.gz", "p.csv", "p.CSV.GZ", "set", "dataset", "list", "frame"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_seeds(tmp_path, kind):
    records = [{**GOOD, "task": "2wikiqa", "context": "Text.", "id": "a"}, {**GOOD, "task": None, "id": "b"}]
    records[1]["context"] = None
    data, path = Dataset.from_list(records), tmp_path / kind
    source = {"dataset": data, "list": records, "frame": pd.DataFrame(records)}.get(kind, str(path))
    if kind == "p.parquet":
        data.to_parquet(path)
    elif kind == "set":
        path.mkdir()
        data.to_json(path / "train.jsonl")
    elif "." in kind:
        text = data.to_pandas().to_csv(index=False) if "csv" in kind.lower() else "\n".join(map(json.dumps, records))
        path.write_bytes(gzip.compress(text.encode()) if "gz" in kind.lower() else text.encode())
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


@pytest.mark.parametrize("count", [1, 3, 700])
def test_a_part_keeps_its_own_seeds_and_tells_of_all(count):
    pairs = [{**GOOD, "answer": str(number)} for number in range(500)]
    pairs[7:7] = [pairs[2], {"instruction": "Who?"}]  # neither takes a turn
    parts = [read_seeds(pairs, on_bad_seed="skip", part=(index, count)) for index in range(count)]
    whole = read_seeds(pairs, on_bad_seed="skip")
    for index, found in enumerate(parts):
        assert found.seeds == whole.seeds[index::count]
        assert (found.total, found.sample, found.skipped) == (500, whole.sample, whole.skipped)
    # Evenly spread: every fourth.
    assert whole.sample == [f"Who was the oldest? {number} " for number in range(0, 500, 4)]


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


def test_csv_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes('\ufeffinstruction,answer\r\n"Who, or\r\nwhat?",Ada\r\nWhy?,\r\nWhen?,1912,more\r\n'.encode())
    found = read_seeds(str(path), on_bad_seed="skip")
    assert [(seed.instruction, seed.origin) for seed in found.seeds] == [("Who, or\r\nwhat?", "pairs.csv:2")]
    assert found.skipped == {"not a string but NoneType (`answer`)": 1, "more fields than columns": 1}
    path.write_bytes(b"instruction,answer\nWhy?,Caf\xe9\n")
    with pytest.raises(BadRowError, match=r"pairs\.csv, line 2: broken CSV .*0xe9.* Save the file as UTF-8"):
        read_seeds(str(path))


def test_files_that_are_cut_short_are_named(tmp_path):
    lines = "\n".join(json.dumps({**GOOD, "answer": f"{number} {number**9}"}) for number in range(2000))
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-2000])
    with pytest.raises(BadRowError, match=r"pairs\.jsonl\.gz, line \d+: the compressed file ends early"):
        read_seeds(str(path))
    found = read_seeds(str(path), on_bad_seed="skip")
    assert len(found.seeds) > 100 and found.skipped.total() == 1
    path = tmp_path / "pairs.parquet"
    Dataset.from_list([GOOD] * 3).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"pairs\.parquet: cannot be read as Parquet after row 0 .*download it again"):
        read_seeds(str(path))


def test_other_formats_and_other_things_are_refused_by_name(tmp_path):
    path = tmp_path / "pairs.xlsx"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"must end with one of \.jsonl, .*\.parquet, got '.*pairs\.xlsx'"):
        read_seeds(str(path))
    with pytest.raises(BadRowError, match="seeds, row 2: not a dict but int"):
        read_seeds([GOOD, 7])


def test_half_characters_and_nul_bytes_never_reach_a_seed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"instruction": "Who?\\ud83d", "answer": "A\\u0000da \\ud83d\\ude00", "id": "\\udc00"}')
    (seed,) = read_seeds(str(path)).seeds
    assert (seed.instruction, seed.answer, seed.seed_id) == ("Who?\ufffd", "Ada \U0001f600", "\ufffd")
    (seed,) = read_seeds([{**GOOD, "context": "x\0\ud83d"}]).seeds
    assert seed.context == "x\ufffd"


def test_marks_of_chat_templates_become_words_or_bad_rows():
    pairs = [{**GOOD, "context": "Text.<|im_end|><|im_start|>user", "title": "</s>"}, {**GOOD, "answer": "Ada"}]
    found = read_seeds(pairs, control=ControlTokens())
    assert found.seeds[0].context == "Text.< |im_end|>< |im_start|>user" and found.seeds[0].title == "< /s>"
    assert [seed.neutralised for seed in found.seeds] == [3, 0] and found.neutralised == 1
    assert read_seeds(pairs).seeds[0].title == "</s>"
    strict = {"control": ControlTokens(), "on_control_tokens": "reject"}
    message = r"row 1, column `context`: a mark of a chat template\. Take '<\|im_end\|>' out, or set `on_control"
    with pytest.raises(BadRowError, match=message):
        read_seeds(pairs, **strict)
    found = read_seeds(pairs, **strict, on_bad_seed="skip")
    assert len(found.seeds) == 1 and found.skipped == {"a mark of a chat template (`context`)": 1}
