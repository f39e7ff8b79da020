import unicodedata

import pytest

from hf_longalign.evaluation.needle_scoring import score_needle
from hf_longalign.evaluation.prompt import Prompt


ONE, TWO, FOUR = ("1234567",), ("1234567", "7654321"), ("1111111", "2222222", "3333333", "4444444")


@pytest.mark.parametrize(
    "answers, text, exact, recall",
    [
        (ONE, "1234567", 1, 1),
        (ONE, "The special magic number for tall-oboe is 1234567.", 1, 1),
        (ONE, "**1234567**, as note 3 of 2024 says", 1, 1),
        (ONE, "", 0, 0),
        (ONE, " \n", 0, 0),
        (ONE, "I do not know.", 0, 0),
        (ONE, "12345678", 0, 0),
        (ONE, "01234567", 0, 0),
        (ONE, "123456 7", 0, 0),
        (ONE, "1234567 or 7654321", 0, 1),
        (ONE, "1234567 1234567", 1, 1),
        (ONE, "1,234,567", 1, 1),
        (ONE, "1.234.567 / 1'234'567 / 1_234_567", 1, 1),
        (ONE, "1 234 567", 1, 1),
        (ONE, "1\u202f234\u202f567", 1, 1),
        (ONE, "1,234,567,890", 0, 0),
        (ONE, "１２３４５６７", 1, 1),
        (ONE, "答案是1234567。", 1, 1),
        (ONE, "No1234567x", 1, 1),
        (TWO, "7654321 and 1234567", 1, 1),
        (TWO, "7654321,1234567", 1, 1),
        (TWO, "7654321", 0, 0.5),
        (FOUR, "1111111, 2222222, 3333333 and 4444445", 0, 0.75),
        (FOUR, "1111111\n2222222\n3333333\n4444444", 1, 1),
        (FOUR, "1111111 2222222 3333333 4444444 5555555", 0, 1),
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
