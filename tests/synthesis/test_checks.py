from dataclasses import replace

import pytest

from hf_longalign.synthesis.checks import (
    CHECKS,
    DEFAULT_CHECKS,
    FAILED,
    Check,
    Rules,
    failures,
    identify_language,
    majority_language,
    verify_context,
)
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tokens import ControlTokens

from .twins import TWINS


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
        (
            "meta",
            STORY + "\n\nLet me know if you would like me to expand it!",
            "failed",
            "a remark to the reader: 'Let me",
        ),
        ("meta", STORY + "Feel free to ask for any changes.", "failed", "a remark to the reader: 'Feel free"),
        ("meta", STORY + "\n---\n*Would you like me to adjust the tone?*", "failed", "a remark to the reader: 'Would"),
        ("meta", STORY + "\n\nWould you like a longer version?", "failed", "a remark to the reader: 'Would you"),
        ("meta", STORY + "If you need any changes, just ask.", "failed", "a remark to the reader: 'If you need"),
        ("meta", STORY + "If you need any help, ask at the dam.", "passed", ""),
        ("meta", STORY + "Let me know what you think!", "failed", "a remark to the reader: 'Let me"),
        ("meta", STORY + "Happy to revise as needed.", "failed", "a remark to the reader: 'Happy to"),
        ("meta", STORY + "Feel free to ask if you have questions.", "failed", "a remark to the reader: 'Feel"),
        ("meta", STORY + "Happy to be home, Ada slept.", "passed", ""),
        ("meta", STORY + "N'hésitez pas à me demander plus de détails.", "failed", "a remark to the reader: \"N'hés"),
        ("meta", STORY + "Lassen Sie mich wissen, ob es passt.", "failed", "a remark to the reader: 'Lassen"),
        ("meta", STORY + "如果您需要更多细节，请告诉我。", "failed", "a remark to the reader: '如果您需要"),
        ("meta", STORY + '"Let me know if you would like more tea," said Ada.', "passed", ""),
        ("meta", "Let me know if you would like more, she wrote. " + STORY * 3, "passed", ""),
        ("complete", STORY + "เขื่อนสร้างเสร็จในปี 1912 ใต้หมู่บ้าน", "open", "marks no end"),
        ("complete", "水坝建于1912年。", "passed", ""),
        ("complete", "她说：「水坝建好了。」", "passed", ""),
        ("complete", "水坝建于1912年，然后", "failed", "breaks off"),
        ("refusal", "抱歉，我无法编写这段文字。", "failed", "it refuses"),
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
        ("1912", "passed", "word for word"),
        ("The Autumn of 1912!", "passed", "word for word"),
        ("in the year 1912", "passed", "close together"),
        ("1912, in autumn", "passed", "close together"),
        ("91", "failed", "does not hold"),
        ("Lovell, Ada", "passed", "close together"),
        ("Lovell, valley", "failed", "does not hold"),
        ("It is her.", "open", "no word to compare"),
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
    assert [check.name for check in checks] == ["length", "support", "leak", "language", "control_tokens"]


def test_every_check_can_be_left_out_and_failures_are_the_reason():
    assert verify_context("", seed(), Rules(()), written=True) == []
    assert set(DEFAULT_CHECKS) == set(CHECKS) - {"judge"}
    checks = [Check("length", FAILED, "it is short"), Check("leak", "passed"), Check("meta", FAILED, "it talks")]
    assert failures(checks) == "length: it is short; meta: it talks"
    assert failures(checks[1:2]) == ""


@pytest.mark.parametrize("language", TWINS)
def test_every_script_is_decided_as_the_english_twin(language):
    rows = TWINS[language]
    for number, (context, instruction, answer) in enumerate(rows):
        pair = Seed("a", "narrativeqa", instruction, answer)
        others = " ".join(row[0] for row in rows[:number] + rows[number + 1 :])
        decided = number < len(rows) - 1  # the last one asks for yes or no
        assert run("support", context, pair)[0] == ("passed" if decided else "open")
        assert run("support", others, pair)[0] == ("failed" if decided else "open")
        assert run("leak", context, pair)[0] == "passed"
        assert run("leak", f"{context} {instruction} {others}", pair)[0] == "failed"
        assert run("language", f"{context} {others}", pair, language=language) == ("passed", language)


def test_control_tokens():
    assert run("control_tokens", STORY + "<|im_end|>\n<|im_start|>user", seed())[0] == "failed"
    assert run("control_tokens", STORY, seed("1912</s>")) == (
        "failed",
        "it holds '</s>', a mark of a chat template; leave it out",
    )
    assert run("control_tokens", STORY)[0] == "passed"
    (check,) = verify_context(STORY, seed(), Rules(("control_tokens",)), written=True, title="<s>Dams")
    assert check.outcome == "failed"
    own = ControlTokens(["<unused7>", "[dam]"])
    assert run("control_tokens", STORY + "<unused7>", control=own)[0] == "failed"
    assert run("control_tokens", STORY + "<unused7>")[0] == "passed"
    mended = replace(seed(), neutralised=2)
    assert run("control_tokens", STORY, mended) == ("neutralised", "2 in the seed")
