import hashlib
import json
import re

import pytest

from hf_longalign.synthesis.prompts import (
    CONTEXT_FORMAT,
    Facts,
    Outline,
    ReplyError,
    answer_prompt,
    check_template,
    context_prompt,
    facts_prompt,
    judge_prompt,
    messages_of,
    outline_prompt,
    read_context,
    read_facts,
    read_outline,
    read_pair,
    read_verdict,
    section_prompt,
)
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import TASKS, find_task, prompt_parts


SEED = Seed("s1", "narrativeqa", "What does {Nina} do?", "She dances {ballet}.")
TASK = TASKS["narrativeqa"]
FACTS = Facts("Swans", ("Nina dances.",), ("Lily sings.",))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_asks_for_evidence_distraction_and_one_text(task):
    content = context_prompt(SEED, task, 2000)
    for part in (SEED.instruction, SEED.answer, task.genre, "evidence", "distract", "coherent", "about 2000 words"):
        assert part in content
    assert content.endswith(CONTEXT_FORMAT)


def test_braces_of_a_seed_are_text_not_fields():
    for content in (
        context_prompt(SEED, TASK, 100, facts=FACTS),
        facts_prompt(SEED, TASK),
        outline_prompt(SEED, TASK, 900, 3, FACTS),
        section_prompt(SEED, TASK, 300, Outline("T", ("A | {a}", "B | b")), 2, "the {end}"),
        judge_prompt(SEED, "a {text}")[0][1],
    ):
        assert "{Nina}" in content and "{ballet}" in content


def test_facts_reach_the_context_prompt_and_the_outline_prompt():
    for content in (context_prompt(SEED, TASK, 100, facts=FACTS), outline_prompt(SEED, TASK, 900, 3, FACTS)):
        assert "Evidence:\n- Nina dances.\nDistraction:\n- Lily sings." in content


def test_a_section_knows_the_plan_its_number_and_the_text_before_it():
    content = section_prompt(SEED, TASK, 300, Outline("T", ("A | a", "B | b")), 2, "the end of A")
    assert "Section 1: A | a\nSection 2: B | b" in content
    assert "Write section 2 only, about 300 words" in content and "ends with:\nthe end of A" in content
    assert "this is where it begins" in section_prompt(SEED, TASK, 300, Outline("T", ("A | a",)), 1, "")


def test_a_retry_opens_with_the_reason():
    (system, _), (user, content) = messages_of("Write a text.", "too short")
    assert (system, user) == ("system", "user")
    assert re.fullmatch(r"An earlier reply was rejected: too short\. .*\n\nWrite a text\.", content)
    assert messages_of("Write a text.")[1] == ("user", "Write a text.")


def test_closed_book_has_no_context_and_open_book_is_the_task_prompt():
    assert "Story:" not in answer_prompt(SEED, TASK)[0][1]
    assert "Story: Once\n\nNow, answer" in answer_prompt(SEED, TASK, "Once")[0][1]


def test_a_custom_template_replaces_the_prompt():
    template = check_template("Write {{{words}}} words for {instruction} / {answer} ({task}).", "mine.txt")
    content = context_prompt(SEED, TASK, 50, template=template)
    assert content == (
        "Write {50} words for What does {Nina} do? / She dances {ballet}. (narrativeqa).\n\n" + CONTEXT_FORMAT
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("{instruction} {answer} {length}", r"no field \{length\} \(mine.txt\)\. Use instruction, answer"),
        ("{instruction}", r"must hold \{answer\}, got none in mine.txt"),
        ("{instruction} {answer} {", r"must double its literal braces, got .* in mine.txt"),
        ("{instruction} {answer} {}", r"no field \{\}"),
    ],
)
def test_a_bad_template_is_refused_by_field_and_file(template, message):
    with pytest.raises(ValueError, match=message):
        check_template(template, "mine.txt")


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
        ("<seed:think>Context: no</seed:think>Context: One.", None, "One."),
        ("◁think▷Context: no◁/think▷Context: One.", None, "One."),
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


# blake2b of LongBench's own templates (config/dataset2prompt.json at commit 8ae23fd4), taken from the published file.
EIGHT = ("narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news")


@pytest.mark.parametrize("name", EIGHT)
def test_head_contexts_and_tail_give_the_template_back(name):
    task = TASKS[name]
    head, tail = prompt_parts(task, "Who {did} it?")
    assert f"{head}CONTEXT\n\n{tail}" == task.template.replace("{context}", "CONTEXT").replace(
        "{input}", "Who {did} it?"
    )


def test_templates_are_the_published_ones():
    templates = json.dumps([TASKS[name].template for name in EIGHT])
    assert hashlib.blake2b(templates.encode(), digest_size=8).hexdigest() == "f8e5e20adb6fca39"


def test_a_reference_names_the_context():
    assert prompt_parts(TASKS["multi_news"], "ignored", 'the news "Flood"')[1].startswith(
        'Now, write a one-page summary of the news "Flood".'
    )
    assert 'Question: (On the story "Ash") Who?' in prompt_parts(TASKS["narrativeqa"], "Who?", 'the story "Ash"')[1]


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`task` must be one of .*2wikiqa.*narrativeqa.*, got 'squad'"):
        find_task("squad")


def test_braces_in_a_title_or_a_context_are_text():
    tail = prompt_parts(TASKS["narrativeqa"], "Who?", 'the story "{input}"')[1]
    assert 'Question: (On the story "{input}") Who?' in tail
    seed = Seed("a", "narrativeqa", "Who {context}?", "Ada")
    ((_, content),) = answer_prompt(seed, TASKS["narrativeqa"], "a {input} text")
    assert "a {input} text" in content and "Question: Who {context}?" in content
