import pytest

from hf_longalign.synthesis.prompts import (
    Facts,
    Outline,
    ReplyError,
    read_context,
    read_facts,
    read_outline,
    read_pair,
    read_verdict,
)


@pytest.mark.parametrize(
    "reply, title, context",
    [
        ("Context: One.\n\nTwo: three.", None, "One.\n\nTwo: three."),
        ("Title: The Dam\nContext:\nOne.", "The Dam", "One."),
        ('**Title:** "The Dam"\n\n**Context:**\nOne.', "The Dam", "One."),
        ("## Context:\nOne.\nContext: again.", None, "One.\nContext: again."),
        ("<think>Context: no</think>\n\ncontext: One.", None, "One."),
        ("I could write\nContext: no\n</think>\n\nTitle: Dam\nContext: One.", "Dam", "One."),
        ("<think>a</think><think>Context: no</think>Context: One.", None, "One."),
        ("[THINK]Context: no[/THINK]Context: One.", None, "One."),
        ("<thinking>\nContext: no\n</thinking>\nContext: One.", None, "One."),
        ("Context: He <think>s so.", None, "He <think>s so."),
    ],
)
def test_a_context_is_read(reply, title, context):
    assert read_context(reply) == (title, context)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", '"Context:" was missing'),
        ("The dam was built in 1912.", '"Context:" was missing'),
        ("Sure! Here it is.\nContext: One.", 'must open with the title and "Context:", but opened with \'Sure!'),
        ("Title: The Dam\nContext:  \n", 'nothing followed "Context:"'),
        ("<think>Context: a draft of the dam", "it ended inside its thoughts"),
    ],
)
def test_a_reply_that_does_not_parse_is_an_error_with_a_reason(reply, reason):
    with pytest.raises(ReplyError, match=reason.replace("(", r"\(")):
        read_context(reply)


def test_facts():
    reply = "Title: Dams\nEvidence:\n- Built in 1912.\n2. By Ada.\n\nDistraction:\n* Another was built in 1913.\n"
    assert read_facts(reply) == Facts("Dams", ("Built in 1912.", "By Ada."), ("Another was built in 1913.",))
    with pytest.raises(ReplyError, match='no fact was listed below "Distraction:"'):
        read_facts("Evidence:\n- a\nDistraction:\n")


def test_outline():
    reply = "Title: Dams\nSection 1: Start | how it began\n**Section 2:** End | how it ended"
    assert read_outline(reply, 2) == Outline("Dams", ("Start | how it began", "End | how it ended"))
    for bad in ("Section 1: Start", "Section 2: a\nSection 1: b", "Section 1: a\nSection 2: b\nSection 3: c", ""):
        with pytest.raises(ReplyError, match="must have 2 lines"):
            read_outline(bad, 2)


def test_pair():
    assert read_pair("Question: Who?\nAnswer: Ada\nand Bob") == ("Who?", "Ada\nand Bob")
    for bad in ("Question: Who?", "Answer: Ada", "Question:\nAnswer: Ada", "Question: Who?\nAnswer:"):
        with pytest.raises(ReplyError):
            read_pair(bad)


def test_verdict():
    assert read_verdict('"supported"') == (True, "")
    assert read_verdict("**Not supported**: no year") == (False, "no year")
    assert read_verdict("yes: 1912") == (True, "1912")
    assert read_verdict("No.") == (False, "")
    for bad in ("", "The text supports it.", "notable", "nothing"):
        with pytest.raises(ReplyError, match="no verdict"):
            read_verdict(bad)
