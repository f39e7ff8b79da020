import pytest

from hf_longalign.synthesis.duplicates import find_duplicates
from hf_longalign.synthesis.language import identify_language, majority_language
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.verify import CHECKS, DEFAULT_CHECKS, FAILED, Check, Rules, failures, verify_context


STORY = (
    "The dam below the village of Thornwick was finished in the autumn of 1912, two years after the first stone. "
    "Ada Lovell, who had drawn the plans, stood on the crest and watched the valley fill with water. "
)
GERMAN = "Der Staudamm unterhalb des Dorfes wurde im Herbst 1912 fertig, zwei Jahre nach dem ersten Stein. "


def seed(answer="1912", instruction="When was the dam below Thornwick finished?"):
    return Seed("a", "narrativeqa", instruction, answer)


def run(name, context=STORY, pair=None, written=True, finish_reason="stop", **rules):
    (check,) = verify_context(
        context, pair or seed(), Rules((name,), **rules), written=written, finish_reason=finish_reason
    )
    assert check.name == name
    return check.outcome, check.detail


@pytest.mark.parametrize(
    "name, context, outcome, detail",
    [
        ("complete", STORY, "passed", ""),
        ("complete", STORY + "And then the", "failed", "it breaks off with"),
        ("refusal", "I'm sorry, but I cannot write this.", "failed", 'it refuses: "I\'m sorry, but I"'),
        ("refusal", "As an AI language model, I have no dams.", "failed", "it refuses: 'As an AI'"),
        ("refusal", STORY + '"I am sorry," said Ada, "I cannot stay."', "passed", ""),
        ("meta", STORY + "\n\nNote: the facts lead to the answer.", "failed", "it speaks of the task: 'Note:'"),
        ("meta", STORY + "This text provides what is needed.", "failed", "'This text provides'"),
        ("meta", STORY + "[continue with more detail]", "failed", "[continue with more detail]"),
        ("meta", STORY + '"No note," she said, "was left."', "passed", ""),
        ("leak", STORY + "When was the dam below Thornwick finished?", "failed", "word for word"),
        ("leak", STORY, "passed", ""),
    ],
)
def test_one_check(name, context, outcome, detail):
    found, why = run(name, context)
    assert found == outcome and detail in why


def test_cut_off_and_length():
    assert run("complete", finish_reason="length")[0] == "failed"
    words = len(STORY.split())
    assert run("length", min_words=words)[0] == "passed"
    assert run("length", min_words=words + 1) == ("failed", f"it has {words} words, at least {words + 1} are needed")
    assert run("length", max_words=words - 1) == ("failed", f"it has {words} words, at most {words - 1} are allowed")


@pytest.mark.parametrize(
    "answer, outcome, detail",
    [
        ("1912", "passed", "string"),
        ("The Autumn of 1912!", "passed", "normalised"),
        ("1913", "failed", "does not hold what the answer '1913' says"),
        ("Ada Lovell drew all the plans", "failed", "does not hold"),
        ("Ada Lovell had the plans drawn", "passed", "1.00 of the answer's words"),
        ("yes", "open", "'yes' can only be judged"),
        ("Unanswerable.", "open", "'unanswerable'"),
    ],
)
def test_support(answer, outcome, detail):
    found, why = run("support", pair=seed(answer))
    assert found == outcome and detail in why


def test_a_summary_needs_a_part_of_its_words():
    summary = "Thornwick's dam was finished in 1912 after two years; Ada Lovell, its designer, saw the valley flood."
    assert run("support", pair=seed(summary))[0] == "passed"
    other = "The Senate passed a bill on corporate taxes on Friday, and economists disagree over who will gain by it."
    assert run("support", pair=seed(other))[0] == "failed"


def test_language():
    assert run("language", STORY, language="en") == ("passed", "en")
    assert run("language", GERMAN, language="en") == ("failed", "it is written in 'de', not in 'en'")
    assert run("language", "Ja.", language="en")[0] == "open"
    assert run("language", STORY)[0] == "open"
    assert majority_language([STORY] * 30 + [GERMAN] * 2) == "en"
    assert majority_language(["Ja."]) is None and identify_language("12 34") is None


def test_a_short_instruction_cannot_leak():
    assert run("leak", "Who is Ada?", pair=seed(instruction="Who is Ada?"))[0] == "open"


def test_a_given_text_is_not_tested_for_what_only_models_do():
    checks = verify_context("As an AI", seed(), Rules(DEFAULT_CHECKS), written=False)
    assert [check.name for check in checks] == ["length", "support", "leak", "language"]


def test_every_check_can_be_left_out_and_failures_are_the_reason():
    assert verify_context("", seed(), Rules(()), written=True) == []
    assert set(DEFAULT_CHECKS) == set(CHECKS) - {"judge"}
    checks = [Check("length", FAILED, "it is short"), Check("leak", "passed"), Check("meta", FAILED, "it talks")]
    assert failures(checks) == "length: it is short; meta: it talks"
    assert failures(checks[1:2]) == ""


def test_near_duplicates_are_found_and_the_first_is_kept():
    texts = [STORY * 3, GERMAN * 3, STORY * 3 + "So it was.", STORY.replace("Ada", "Eve") * 3, "Another text."]
    assert find_duplicates(texts) == {2: 0}
    assert find_duplicates(texts, threshold=0.6) == {2: 0, 3: 0}
    assert find_duplicates(texts, threshold=0.95) == {}
    assert find_duplicates(["a", "a", "a"]) == {1: 0, 2: 0}
