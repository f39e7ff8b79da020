"""Puzzles are right by construction: a solver that reads the text alone solves all, a matcher of words does not."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from hf_longalign.puzzles import TASKS, draw_puzzle, set_f1
from hf_longalign.puzzles.puzzle import lengthen, named_in
from hf_longalign.puzzles.tasks import ASSOCIATIONS, FORMS, GOODS, PARTS, TOPICS, part_of


SAMPLES = range(12)
FILLER = [f" The {adjective} {noun} stood still." for adjective in ("old", "red") for noun in ("mill", "boat", "gate")]


def words(text):
    return len(text.split())


def rng(index=0):
    return np.random.default_rng(index)


def body(text):
    """The lines between header and question, and the question."""
    _, lines, question = text.split("\n\n")
    return lines.split("\n"), question


def solve(text):
    """Answer a puzzle from its text, by other means than it was made."""
    lines, question = body(text)
    edges = [line.split(" -> ") for line in lines if " -> " in line]
    if found := re.search(r"exactly (\d+) steps from (\w+)", question):
        reached = {found[2]}
        for _ in range(int(found[1])):
            reached = {end for start, end in edges if start in reached}
        return reached
    if found := re.search(r"arrow that leads to (\w+)", question):
        return {start for start, end in edges if end == found[1]}
    if found := re.search(r"answer number (\d+) to the request for a (.+), in the order", question):
        form, topic = found[2].split(" about ")
        signers = [line.rstrip(".").split()[-1] for line in lines if f"Write a {form} about {topic}." in line]
        return set(signers[int(found[1]) - 1 : int(found[1])])
    holds = dict(re.findall(r"Box (\w+) holds the (.+)\.", "\n".join(lines)))
    if found := re.search(r"Begin with box (\w+)", question):
        box = found[1]
        while "key" in holds.get(box, ""):
            box = holds[box].split()[-1]
        return {holds[box].split()[-1]} if box in holds else set()
    if found := re.search(r"crates of (\w+) were", question):
        amounts = re.findall(rf"sold (\d+) crates of {found[1]}\.", "\n".join(lines))
        return {str(sum(map(int, amounts)))}
    if found := re.search(r"guards gate (\w+) according", question):
        entries = re.findall(rf"Day (\d+): gate {found[1]} is guarded by (\w+)\.", "\n".join(lines))
        return {max(entries, key=lambda entry: int(entry[0]))[1]} if entries else set()
    if found := re.search(r"Which person (.+)\? Answer", question):
        fact = next(fact for pairs in ASSOCIATIONS.values() for fact, asked in pairs if asked == found[1])
        return {line.split()[0] for line in lines if line.endswith(f"{fact}.")}
    found = re.search(r"Which code does box (\w+) hold", question)
    held = holds.get(found[1], "")
    return {held.split()[-1]} if held.startswith("code") else {"unanswerable"}


def match_words(text):
    """Answer with what stands in the line that shares most words with the question."""
    lines, question = body(text)
    asked = set(re.findall(r"\w+", question))
    best = max(lines, key=lambda line: len(asked & set(re.findall(r"\w+", line))))
    return named_in(best) - asked


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_solver_solves_all_and_none_without_the_evidence(task, part):
    for index in SAMPLES:
        puzzle = draw_puzzle(task, 0, index, part)
        text = lengthen(puzzle, 600, words, FILLER, rng(index)).text
        assert solve(text) == set(puzzle.answers)
        assert solve(puzzle.open_evidence()) == set(puzzle.answers)
        assert set_f1(", ".join(sorted(solve(text))), puzzle.answers) == 1.0
        for line in puzzle.evidence:
            assert solve(text.replace(line + "\n", "", 1)) != set(puzzle.answers), line
        assert not set(puzzle.answers) & named_in(puzzle.closed_book()) or puzzle.answers == ("unanswerable",)


COMMON = "a an the in of to and at with by is for who her his must be are on up past"
# The share of right answers of who matches words: where several lines look alike it is one of so many.
CHANCE = {
    "graph_walk": 0.0,
    "graph_parents": 0.5,
    "repeated_request": 0.5,
    "key_chain": 0.1,
    "count": 0.1,
    "latest": 0.5,
    "association": 0.25,
}


@pytest.mark.parametrize("task", CHANCE)
def test_matching_words_is_near_chance(task):
    right = 0
    for index in range(60):
        puzzle = draw_puzzle(task, 1, index)
        right += match_words(lengthen(puzzle, 600, words, FILLER, rng(index)).text) == set(puzzle.answers)
    assert right / 60 <= CHANCE[task]


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_kept_and_shorter_texts_are_told(task):
    for length in (300, 3000, 30_000):
        long = lengthen(draw_puzzle(task, 0, 0), length, words, FILLER, rng())
        assert 0.97 * length <= words(long.text) <= length
    with pytest.raises(ValueError, match=f"`lengths` must be at least .* for the task '{task}', got 20"):
        lengthen(draw_puzzle(task, 0, 0), 20, words, FILLER, rng())


def test_long_texts_take_few_counts():
    counted = []

    def count(text):
        counted.append(len(text))
        return words(text)

    long = lengthen(draw_puzzle("key_chain", 0, 0), 1_000_000, count, FILLER, rng())
    assert len(counted) < 10 and 999_000 < words(long.text) <= 1_000_000
    assert solve(long.text) == set(long.puzzle.answers)


@pytest.mark.parametrize("task", TASKS)
def test_evidence_lies_anywhere(task):
    depths = []
    for index in range(40):
        puzzle = draw_puzzle(task, 2, index)
        if puzzle.evidence:
            text = lengthen(puzzle, 900, words, FILLER, rng(index)).text
            depths += [text.index(line) / len(text) for line in puzzle.evidence]
    assert min(depths) < 0.3 and max(depths) > 0.7 and 0.3 < np.mean(depths) < 0.7


def test_training_and_evaluation_share_no_word_that_is_asked_for():
    names = {part: set() for part in PARTS}
    for part in PARTS:
        for task in TASKS:
            for index in SAMPLES:
                text = lengthen(draw_puzzle(task, 0, index, part), 900, words, FILLER, rng()).text
                names[part] |= {item for item in named_in(text) if item.isupper()}
        assert all(part_of(name) == part for name in names[part])
    assert len(names["training"]) > 1000 and not names["training"] & names["evaluation"]
    for pools in (GOODS, TOPICS, FORMS):
        assert not set(pools["training"]) & set(pools["evaluation"])
    facts = {part: {text for pair in pairs for text in pair} for part, pairs in ASSOCIATIONS.items()}
    assert not facts["training"] & facts["evaluation"]


def test_associations_share_no_word_with_what_is_asked():
    common = set(COMMON.split())
    for pairs in ASSOCIATIONS.values():
        assert len({asked for _, asked in pairs}) == len(pairs)
        for fact, asked in pairs:
            assert not (set(fact.lower().split()) & set(asked.lower().split())) - common, (fact, asked)


@pytest.mark.parametrize("task", TASKS)
def test_training_rows_tell_their_parts(task):
    long = lengthen(draw_puzzle(task, 0, 3, "training"), 400, words, FILLER, rng())
    row = long.row()
    content = row["messages"][0]["content"]
    pieces = [content[part["start"] : part["end"]] for part in row["parts"]]
    assert pieces == [*body(long.text)[0], long.puzzle.question]
    assert set(row["messages"][1]["content"].split(", ")) == set(long.puzzle.answers)


def test_half_of_the_unanswerable_ones_can_be_answered():
    answers = [draw_puzzle("unanswerable", 0, index).answers[0] for index in range(200)]
    assert 70 < answers.count("unanswerable") < 130


def test_the_same_on_every_platform():
    texts = [lengthen(draw_puzzle(task, 0, 0), 400, words, FILLER, rng()).text for task in TASKS]
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] == "4fce75866652f490"


def test_bad_names_are_told():
    with pytest.raises(ValueError, match=r"`task` must be one of .*, got 'walk'"):
        draw_puzzle("walk", 0, 0)
    with pytest.raises(ValueError, match=r"`part` must be one of \['evaluation', 'training'\], got 'test'"):
        draw_puzzle("latest", 0, 0, "test")


def test_without_filler_all_lines_look_alike():
    long = lengthen(draw_puzzle("latest", 0, 0), 400, words, [], rng())
    assert all(line.startswith("Day ") for line in body(long.text)[0])
    assert solve(long.text) == set(replace(long.puzzle).answers)
