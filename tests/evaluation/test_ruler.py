"""RULER's samples equal those of the official generator where it needs no data, and fit wherever they come from."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest

from hf_longalign.evaluation.ruler import DEPTHS, HOPS, RulerBuilder, string_match
from hf_longalign.evaluation.ruler_data import TASKS, Pairs, Question


def words(text):
    return len(text.split())


# SHA-256 of the first four samples that https://github.com/NVIDIA/RULER made with seed 42, words as tokens.
OFFICIAL = {
    ("niah_single_1", 1024): "4adf73d597037929",
    ("niah_single_1", 4096): "3a9dbba4e54dc24c",
    ("niah_multikey_2", 1024): "9b632d7acf29beea",
    ("niah_multikey_2", 4096): "3ad81259997ff258",
    ("niah_multikey_3", 1024): "ed3a4fd76532e42e",
    ("niah_multikey_3", 4096): "4ccaa9ee1f513501",
    ("ruler_vt", 1024): "d75acdd7c5dba1a9",
    ("ruler_vt", 4096): "90016842aa12c60d",
    ("ruler_cwe", 1024): "b6649db680052067",
    ("ruler_cwe", 4096): "f90c412a9d5eed01",
    ("ruler_fwe", 1024): "99dad2bf8b03d393",
    ("ruler_fwe", 4096): "cc83ed49d86c5253",
}
ESSAYS = [f"Town {n} sells ware {n * 7 % 101}. Nobody there was ever in doubt about it." for n in range(200)]
QUESTIONS = [
    Question(f"What does town {n} sell?", (f"ware {n}",), (f"Town {n}\nTown {n} sells ware {n} and nothing else.",))
    for n in range(300)
]
PAIRS = [
    Question(q.query, q.answers, (*q.documents, f"Region {n}\nIt has town {n}.")) for n, q in enumerate(QUESTIONS)
]


def builder(name, length, **options):
    questions = PAIRS if name == "ruler_qa_hotpot" else QUESTIONS
    return RulerBuilder(TASKS[name], length, words, **{"essays": ESSAYS, "questions": questions, **options})


@pytest.mark.parametrize(("name", "length"), OFFICIAL)
def test_samples_equal_the_official_ones(name, length):
    rows = [[sample.text, sample.prefix, list(sample.answers)] for sample in builder(name, length).samples(4)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == OFFICIAL[name, length]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1000, 5000])
def test_every_task_gives_as_many_samples_as_asked_for_and_all_fit(name, length):
    few, more = (list(builder(name, length).samples(number)) for number in (2, 5))
    assert len(more) == 5 and more[:2] == few
    for sample in more:
        used = words(sample.text + sample.prefix) + TASKS[name].max_new_tokens
        assert length * 0.5 < used <= length, (used, length)
    if name not in ("ruler_vt", "ruler_cwe", "ruler_fwe"):  # what they ask for is not written out in the text
        assert all(answer in sample.text for sample in more for answer in sample.answers)


def test_variables_are_those_that_reach_the_value():
    for sample in builder("ruler_vt", 2048).samples(3):
        text = sample.text[sample.text.rindex("Memorize and track") :]
        value = text[text.rindex("value ") :].split()[1]
        pairs = [line.removeprefix("VAR ").split(" = ") for line in text.splitlines() if line.startswith("VAR ")]
        values = {}
        for name, source in pairs:
            source = source.strip(" .")
            values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR") else source
        assert {name for name, found in values.items() if found == value} == set(sample.answers)
        assert len(sample.answers) == HOPS + 1


@pytest.mark.parametrize("length", [1024, 4096])
def test_common_words_are_the_most_frequent(length):
    for sample in builder("ruler_cwe", length).samples(2):
        listed = sample.text[sample.text.rindex("Below is") :].split("\n")[1].split()[1::2]
        assert {word for word, _ in Counter(listed).most_common(10)} == set(sample.answers)


def test_frequent_words_are_the_most_frequent():
    for sample in builder("ruler_fwe", 4096).samples(2):
        coded = sample.text.split("coded words. ")[1].split("\n")[0].split()
        assert [word for word, _ in Counter(coded).most_common(4) if word != "..."] == list(sample.answers)


def test_essay_needles_lie_at_depths_drawn_uniformly():
    task = builder("niah_single_2", 1500)
    places = []
    for sample in task.samples(300):
        hay = sample.text.split("\n")[1]
        places.append(hay.index("One of the special magic numbers") / len(hay))
    expected = np.array(DEPTHS) / 100
    assert abs(np.mean(places) - expected.mean()) < 0.06 and abs(np.std(places) - expected.std()) < 0.05


def test_what_is_missing_or_too_short_is_named():
    with pytest.raises(ValueError, match=r"`essays` must be given for 'niah_single_2', got none. Set `haystack`"):
        builder("niah_single_2", 4096, essays=())
    with pytest.raises(ValueError, match="`questions` must be given for 'ruler_qa_squad', got none"):
        builder("ruler_qa_squad", 4096, questions=())
    for name in TASKS:
        with pytest.raises(ValueError, match=rf"`lengths` must .*'{name}', got 90. Set a larger length"):
            list(builder(name, 90).samples(1))


def test_documents_come_again_where_there_are_too_few():
    task = builder("ruler_qa_squad", 2000, questions=QUESTIONS[:4])
    for sample, question in zip(task.samples(6), [*QUESTIONS[:4], *QUESTIONS[:2]], strict=True):
        assert question.query in sample.text and sample.text.count("Document ") > 20
        assert sample.text.count(question.documents[0]) == 1  # the evidence stands there once


def test_pairs_are_the_sorted_list_of_all():
    rng = random.Random(0)
    for _ in range(30):
        made = ["".join(rng.choices("ab-", k=rng.randint(1, 4))) for _ in range(24)]
        pairs = Pairs(made[:12], made[12:])
        assert list(pairs) == sorted({f"{one}-{two}" for one in made[:12] for two in made[12:]})
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_answers_are_scored_as_ruler_scores_them():
    assert string_match("x\x00Alpha and BETA", ["alpha", "beta", "gamma", "delta"], every=True) == 0.5
    assert string_match("none", ["alpha", "beta"], every=False) == 0.0
