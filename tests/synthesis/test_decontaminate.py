import json

import pytest

from hf_longalign.synthesis.decontaminate import Contamination
from hf_longalign.synthesis.rows import BadRowError


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
    with pytest.raises(ValueError, match="`decontaminate_ngram` must be at least 1, got 0"):
        Contamination([], ngram=0)


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
