import unicodedata

import pytest

from hf_longalign.evaluation.needles import (
    ONE,
    TASKS,
    NeedleTask,
    Pools,
    Wording,
    draw_needles,
    score_needle,
)
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.puzzles.puzzle import seeded_rng


@pytest.mark.parametrize(
    "name, asked, others, queries",
    [("single", 1, 0, 1), ("multi_key", 1, 3, 1), ("multi_value", 4, 0, 1), ("multi_query", 4, 0, 4)],
)
def test_the_four_tasks(name, asked, others, queries):
    for seed in range(20):
        needles = draw_needles(TASKS[name], ONE, Pools(), seeded_rng(seed))
        assert (len(needles.asked), len(needles.others), len(needles.answers)) == (asked, others, asked)
        sentences = [*needles.asked, *needles.others]
        keys = [sentence.split("numbers for ")[1].split(" is: ")[0] for sentence in sentences]
        values = [sentence.split(" is: ")[1].rstrip(".") for sentence in sentences]
        assert len(set(values)) == len(values) and all(len(value) == 7 for value in map(str, map(int, values)))
        assert tuple(values[:asked]) == needles.answers
        assert len(set(keys[:asked])) == queries and len(set(keys)) == queries + others
        assert needles.keys == ONE.join(list(dict.fromkeys(keys[:asked])))


def test_needles_depend_on_the_seed_alone():
    one, again, other = (draw_needles(TASKS["multi_key"], ONE, Pools(), seeded_rng(seed, "x")) for seed in (0, 0, 1))
    assert one == again != other


def test_own_words_in_any_language():
    wording = Wording(
        "Merke dir!", "Der Code für {key} lautet {value}.", "Code für {keys}?", "Er lautet {keys}", " und "
    )
    pools = Pools(keys=["Köln", "Łódź", "北京"], values=["Grün", "青", "ñandú"])
    needles = draw_needles(NeedleTask("own", queries=3), wording, pools, seeded_rng(0))
    assert sorted(needles.answers) == sorted(pools.values)
    assert needles.keys.count(" und ") == 1 and all(key in needles.keys for key in pools.keys)
    assert needles.asked[0].startswith("Der Code für ") and needles.answers[0] in needles.asked[0]


def drawn(name: str, pools: Pools):
    return draw_needles(TASKS[name], ONE, pools, seeded_rng(0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Wording("", "No value for {key}.", "{keys}?", "{keys}"), r"`needle` must hold \{key\} and \{value\}"),
        (lambda: Wording("", "{key} {value}", "Which?", "{keys}"), r"`question` must hold \{keys\}"),
        (lambda: Wording("", "{key} {value} {", "{keys}", "{keys}"), r"`needle` must hold"),
        (lambda: Wording("", "{key} {value}", "{keys}", "{keys} {}"), r"`answer` must hold"),
        (lambda: Pools(keys=["a", "b", "a"]), r"`keys` must differ, got 'a' twice"),
        (lambda: Pools(values=["1234567", "1234567"]), r"got '1234567' in '1234567'"),
        (lambda: Pools(values=["Red", "dark red"]), r"got 'Red' in 'dark red'"),
        (lambda: Pools(values=[" "]), r"`values` must be texts, got ' '"),
        (lambda: Pools(values=[1234567]), r"`values` must be texts, got 1234567"),
        (lambda: NeedleTask("none", queries=0), r"`queries` must be a whole number of at least 1, got 0"),
        (lambda: NeedleTask("less", distractors=-1), r"`distractors` must be a whole number of at least 0"),
        (lambda: drawn("multi_key", Pools(keys=["a"])), r"`keys` must be at least 4"),
        (lambda: drawn("multi_value", Pools(values=["a"])), r"`values` must be at least 4"),
    ],
)
def test_what_cannot_be_asked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ONE_VALUE, TWO_VALUES, FOUR_VALUES = ("1234567",), ("1234567", "7654321"), ("1111111", "2222222", "3333333", "4444444")


@pytest.mark.parametrize(
    "answers, text, exact, recall",
    [
        (ONE_VALUE, "1234567", 1, 1),
        (ONE_VALUE, "The special magic number for tall-oboe is 1234567.", 1, 1),
        (ONE_VALUE, "**1234567**, as note 3 of 2024 says", 1, 1),
        (ONE_VALUE, "", 0, 0),
        (ONE_VALUE, " \n", 0, 0),
        (ONE_VALUE, "I do not know.", 0, 0),
        (ONE_VALUE, "12345678", 0, 0),
        (ONE_VALUE, "01234567", 0, 0),
        (ONE_VALUE, "123456 7", 0, 0),
        (ONE_VALUE, "1234567 or 7654321", 0, 1),
        (ONE_VALUE, "1234567 1234567", 1, 1),
        (ONE_VALUE, "1,234,567", 1, 1),
        (ONE_VALUE, "1.234.567 / 1'234'567 / 1_234_567", 1, 1),
        (ONE_VALUE, "1 234 567", 1, 1),
        (ONE_VALUE, "1\u202f234\u202f567", 1, 1),
        (ONE_VALUE, "1,234,567,890", 0, 0),
        (ONE_VALUE, "１２３４５６７", 1, 1),
        (ONE_VALUE, "答案是1234567。", 1, 1),
        (ONE_VALUE, "No1234567x", 1, 1),
        (TWO_VALUES, "7654321 and 1234567", 1, 1),
        (TWO_VALUES, "7654321,1234567", 1, 1),
        (TWO_VALUES, "7654321", 0, 0.5),
        (FOUR_VALUES, "1111111, 2222222, 3333333 and 4444445", 0, 0.75),
        (FOUR_VALUES, "1111111\n2222222\n3333333\n4444444", 1, 1),
        (FOUR_VALUES, "1111111 2222222 3333333 4444444 5555555", 0, 1),
        (("123", "456"), "123 456 789", 0, 1),
        (("123", "456"), "123 456", 1, 1),
        (("123456",), "123 456", 1, 1),
        (("Zürich",), "it is ZÜRICH!", 1, 1),
        (("Zürich",), unicodedata.normalize("NFD", "Zürich"), 1, 1),
        ((unicodedata.normalize("NFD", "Zürich"),), "Zürich", 1, 1),
        (("Zürich",), "Zürichs", 0, 0),
        (("Straße",), "STRASSE", 1, 1),
        (("北京",), "答案是北京。", 1, 1),
        (("北京",), "Beijing北京city", 1, 1),
        (("서울",), "답은 서울입니다", 1, 1),
        (("Москва",), "москва", 1, 1),
        (("art",), "party, artist; state of the art", 1, 1),
        (("art",), "artist", 0, 0),
        (("कि",), "की", 0, 0),
        (("क",), "कि", 0, 0),
        (("a-b", "c d"), "A-B; c d", 1, 1),
        (("🍎",), "🍎🍎", 1, 1),
        (("1234567", "blue"), "1234567 blue", 1, 1),
        (("1234567", "blue"), "1234567 7654321 blue", 0, 1),
    ],
)
def test_hand_made_cases(answers, text, exact, recall):
    scores = score_needle(Prompt("needle", "any", 0, "", answers, 8), text)
    assert scores == {"exact_match": exact, "recall": recall}
    assert list(scores) == ["exact_match", "recall"]  # a report shows the first one
