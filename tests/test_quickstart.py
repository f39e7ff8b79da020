"""The quickstart: its data says what it seems to say, and a very short run writes what it promises."""

import json
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    try:
        import quickstart
    finally:
        sys.path.remove(str(RECIPES))
    return quickstart


@pytest.fixture(scope="module")
def task(recipe):
    return sys.modules["quickstart_task"]


def meanings(text):
    """The facts of a text by code: "Amber: copper." says that amber means copper."""
    sentences = text.replace("\n", " ").split(". ")
    pairs = [sentence.split(": ") for sentence in sentences if ": " in sentence]
    return {code.strip().lower(): meaning.strip(".") for code, meaning in pairs}


def test_samples_answer_from_their_notes_and_fit(task):
    tokenizer = task.make_tokenizer()
    for row in task.make_chats(50, np.random.default_rng(0)):
        first = row["messages"][0]["content"]
        facts = meanings(first[: first.rindex("\n")])
        for part in row["parts"]:
            text = first[part["start"] : part["end"]]
            assert text.startswith("Find ") or text.endswith(".")
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            assert facts[question["content"].split("Find ")[1]] == answer["content"]
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        assert len(ids) <= task.TRAIN_TOKENS
        assert tokenizer.unk_token_id not in ids


def test_prompts_are_long_and_hold_the_fact_at_its_depth(task):
    tokenizer = task.make_tokenizer()
    prompts = task.make_prompts(1, 4)
    assert len(prompts) == 4 * len(task.EXAM_LENGTHS) * len(task.EXAM_DEPTHS)
    for prompt in prompts:
        notes, question = prompt.text.rsplit("\n\n", 1)
        code = question.removeprefix("Find ")
        assert (meanings(notes)[code],) == prompt.answers
        assert len(meanings(notes)) == task.MAX_FACTS
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}], return_dict=True)["input_ids"]
        assert 0.98 * prompt.length <= len(ids) + 1 <= prompt.length
        assert tokenizer.unk_token_id not in ids
        sentence = 4 / prompt.length + task.MAX_FACTS * 2 / prompt.length  # of filler, and the other facts
        assert notes.index(f"{code}:") / len(notes) == pytest.approx(prompt.depth, abs=sentence + 0.02)


def test_rows_that_are_aligned_keep_the_blocks_of_their_parts(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "one_step", lambda: None)
    monkeypatch.setattr(recipe, "examine", lambda *_: None)
    recipe.train_base(recipe.Plan(tmp_path, base_steps=1, steps=1, samples=1, rows=8), 0)
    rows = torch.load(tmp_path / "base-0.pt", weights_only=True)["rows"]
    assert len(rows["blocks"]) == 8
    for labels, blocks in zip(rows["labels"], rows["blocks"], strict=True):
        first = labels.index(next(label for label in labels if label != -100))  # of the first answer
        assert len(set(blocks[:first])) > 1


def test_a_short_run_writes_table_pictures_and_json(tmp_path):
    command = [sys.executable, str(RECIPES / "quickstart.py"), "--output", str(tmp_path / "out"), "--workers", "2"]
    command += [
        "--base_steps",
        "2",
        "--steps",
        "2",
        "--samples",
        "4",
        "--rows",
        "96",
        "--strategies",
        "none",
        "skip_all",
    ]
    run = forked.run(command, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "skip_all" in run.stdout and "1,024" in run.stdout
    written = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    assert set(written["accuracy"]) == {"base", "none", "skip_all"}
    assert np.shape(written["accuracy"]["skip_all"]) == (1, 5, 5)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"accuracy_by_length.png", "heatmap.png"}
    assert not list((tmp_path / "out").glob("*.pt"))
