"""Questions for RULER: those invented here have one answer, and those of files are read as they are published."""

import json
import re

import pytest

from hf_longalign.evaluation.ruler_data import Question, invented_questions, load_questions


SUBJECT = r"(?:was|does|of|which) ([A-Z]\w+(?: [A-Z]\w+| [IVX]+)*)(?: founded| lie| born|\?| was)"


@pytest.mark.parametrize("hops", [1, 2])
def test_invented_questions_have_one_answer_in_their_documents(hops):
    questions = invented_questions(hops, 900)
    assert len({question.query for question in questions}) == 900
    pool = {document for question in questions for document in question.documents}
    assert len(pool) == 900 * hops
    for question in questions:
        assert len(question.documents) == hops
        assert any(question.answers[0] in document for document in question.documents)
        assert not any(question.answers[0] == name for name in re.findall(r"\w+", question.query))
        # Nobody else bears the name that is asked for, so no other document could answer.
        subject = re.search(SUBJECT, question.query)[1]
        assert sum(document.startswith(f"{subject}\n") for document in pool) == 1


def test_two_hops_need_both_documents():
    for question in invented_questions(2, 50):
        person, town = question.documents
        assert question.answers[0] not in person and town.split("\n")[0] not in question.query


def test_fewer_questions_are_the_first_of_more():
    assert invented_questions(1, 5) == invented_questions(1, 9)[:5] != invented_questions(2, 5)


def test_files_are_read_as_they_are_published(tmp_path):
    squad = {"data": [{"paragraphs": [{"context": "Ann sells wool.", "qas": [
        {"question": "What does Ann sell?", "answers": [{"text": "wool"}, {"text": "wool"}]},
        {"question": "What does Ben sell?", "answers": []},
    ]}]}]}  # fmt: skip
    hotpot = [{"question": "Where?", "answer": "Rome", "context": [["A", ["One. ", "Two."]], ["B", ["Three."]]]}]
    rows = [{"instruction": "Who?", "answer": "Ann", "context": "It was Ann."}]
    rows.append({"question": "Who?", "answers": ["A", "B"], "contexts": ["x", "y"]})
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_questions(tmp_path / "squad.json") == [
        Question("What does Ann sell?", ("wool",), ("Ann sells wool.",))
    ]
    assert load_questions(tmp_path / "hotpot.json") == [Question("Where?", ("Rome",), ("A\nOne. Two.", "B\nThree."))]
    assert load_questions(tmp_path / "rows.jsonl")[1] == Question("Who?", ("A", "B"), ("x", "y"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"question": "Who?", "answer": "A"}', "`context` must be given .* none in rows.jsonl:1"),
        ("rows.jsonl", '{"question": "Who?"\n', "rows.jsonl, line 1: broken JSON at character"),
        ("rows.jsonl", '{"question": "Who?", "answers": "Paris", "context": "x"}', "`answers` must be a list"),
        ("x.json", '[{"question": "Who?", "answer": "A", "context": "text"}]', "must be HotpotQA's"),
        ("rows.jsonl", "\n[]", "rows.jsonl, line 2: a JSON list, not an object"),
        ("x.json", "{", "`ruler_questions` must hold JSON, got .* in x.json"),
        ("x.json", '{"rows": []}', "must be SQuAD's, with `data`, got x.json"),
        ("x.json", '[{"question": "Who?"}]', "must be HotpotQA's"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / name)
    with pytest.raises(ValueError, match="`ruler_questions` must be a file"):
        load_questions(tmp_path / "none.jsonl")
