import json
import random

import pytest

from hf_longalign.rows import BadRowError
from hf_longalign.synthesis import selection
from hf_longalign.synthesis.selection import Contamination, Duplicates


WORDS = [f"w{number}" for number in range(40)]
TEXT = " ".join(WORDS)


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    known = Contamination([[{"context": TEXT}]])
    assert len(known) == 40 - 13 + 1
    assert known.overlap("start " + " ".join(WORDS[5:18]) + " end") == (" ".join(WORDS[5:18]), "seeds:1")
    assert known.overlap("start " + " ".join(WORDS[5:17]) + " end") is None
    assert known.overlap(" ".join([*WORDS[5:11], "x", *WORDS[11:20]])) is None


def test_the_n_can_be_chosen():
    assert Contamination([[{"context": TEXT}]], ngram=5).overlap("a w7 w8 w9 w10 w11 b")


def test_a_short_question_counts_as_a_whole_and_very_short_strings_do_not():
    known = Contamination([[{"input": "When did the film Swans open in Paris?", "answers": ["in 1976", "yes"]}]])
    assert known.overlap("Tell me: when did the film 'Swans' open, in Paris?")
    assert known.overlap("When did the film Swans open in London?") is None
    assert known.overlap("It opened in 1976, yes.") is None


def test_files_are_named_with_the_line(tmp_path):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(json.dumps({"input": "x"}) + "\n" + json.dumps({"meta": {"all": [TEXT]}}) + "\n")
    assert Contamination([str(path)]).overlap(TEXT)[1] == "hotpotqa.jsonl:2"
    path.write_text("{")
    with pytest.raises(BadRowError, match="line 1: broken JSON"):
        Contamination([str(path)])


def test_characters_count_half_where_words_are_not_divided():
    known = Contamination([[{"input": "谁在一九一二年完成了桑威克村下面的水坝并且看着山谷被淹没？"}]])
    assert known.overlap("请问：谁在一九一二年完成了桑威克村下面的水坝，并且看着山谷被淹没")
    assert known.overlap("谁在一九一二年完成了那座城市里面的水坝") is None
    assert Contamination([[{"input": "水坝建于何时？"}]]).overlap("水坝建于何时") is None  # three words


STORY = (
    "The dam below the village of Thornwick was finished in the autumn of 1912, two years after the first stone. "
    "Ada Lovell, who had drawn the plans, stood on the crest and watched the valley fill with water. "
)
GERMAN = "Der Staudamm unterhalb des Dorfes wurde im Herbst 1912 fertig, zwei Jahre nach dem ersten Stein. "


def test_near_duplicates_are_found_and_the_first_is_kept():
    texts = [STORY * 3, GERMAN * 3, STORY * 3 + "So it was.", STORY.replace("Ada", "Eve") * 3, "Another text."]
    assert Duplicates().find(texts) == {2: 0}
    assert Duplicates().find(["a", "a", "a"]) == {1: 0, 2: 0} and Duplicates().find([]) == {}


def _random_texts(count, seed):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(rng.randrange(80, 200))) for _ in range(count)]


def _similarity(one, two):
    grams = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), two.split())]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_pairs_well_above_the_threshold_are_found_and_those_well_below_are_not():
    texts, rng = _random_texts(300, seed=1), random.Random(2)
    changed = []
    for text in texts:
        words = text.split()
        for _ in range(rng.randrange(4)):
            words[rng.randrange(len(words))] = "other"
        changed.append(" ".join(words))
    found = Duplicates().find([*texts, *changed])
    similar = [_similarity(*pair) for pair in zip(texts, changed, strict=True)]
    high = [number for number, share in enumerate(similar) if share > 0.92]
    low = [number for number, share in enumerate(similar) if share < 0.68]
    assert len(high) > 100 and len(low) > 3
    assert all(found.get(300 + number) == number for number in high)
    assert not any(300 + number in found for number in low)


def test_processes_find_the_same_and_a_text_is_sketched_once(monkeypatch):
    texts = [*_random_texts(30, seed=3), *_random_texts(5, seed=3)]
    monkeypatch.setattr(selection, "_CHUNK", 10)
    repeated = {30 + n: n for n in range(5)}
    with monkeypatch.context() as many:
        many.setattr(selection, "_PARALLEL_FROM", 1)
        assert Duplicates().find(texts) == repeated
    sketched, sketch = [], selection.sketch
    monkeypatch.setattr(selection, "sketch", lambda chunk: sketched.extend(chunk) or sketch(chunk))
    finder = Duplicates()
    assert finder.find(texts) == repeated
    assert finder.find([*texts[:30], "a new text"]) == {}
    assert sketched == [*texts[:30], "a new text"]
