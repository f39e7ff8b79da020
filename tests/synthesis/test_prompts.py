import pytest

from hf_longalign.synthesis.prompts import (
    CONTEXT_FORMAT,
    Facts,
    Outline,
    answer_prompt,
    check_template,
    context_prompt,
    facts_prompt,
    judge_prompt,
    outline_prompt,
    pair_prompt,
    section_prompt,
)
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import TASKS


SEED = Seed("s1", "narrativeqa", "What does {Nina} do?", "She dances {ballet}.")
TASK = TASKS["narrativeqa"]
FACTS = Facts("Swans", ("Nina dances.",), ("Lily sings.",))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_asks_for_evidence_distraction_and_one_text(task):
    (system, _), (user, content) = context_prompt(SEED, task, 2000)
    assert (system, user) == ("system", "user")
    for part in (SEED.instruction, SEED.answer, task.genre, "evidence", "distract", "coherent", "about 2000 words"):
        assert part in content
    assert content.endswith(CONTEXT_FORMAT)


def test_braces_of_a_seed_are_text_not_fields():
    for messages in (
        context_prompt(SEED, TASK, 100, facts=FACTS),
        facts_prompt(SEED, TASK),
        outline_prompt(SEED, TASK, 900, 3, facts=FACTS),
        section_prompt(SEED, TASK, 300, Outline("T", ("A | {a}", "B | b")), 2, "the {end}"),
        judge_prompt(SEED, "a {text}"),
    ):
        assert "{Nina}" in messages[-1][1] and "{ballet}" in messages[-1][1]


def test_facts_reach_the_context_prompt_and_the_outline_prompt():
    for messages in (context_prompt(SEED, TASK, 100, facts=FACTS), outline_prompt(SEED, TASK, 900, 3, facts=FACTS)):
        assert "Evidence:\n- Nina dances.\nDistraction:\n- Lily sings." in messages[1][1]


def test_a_section_knows_the_plan_its_number_and_the_text_before_it():
    content = section_prompt(SEED, TASK, 300, Outline("T", ("A | a", "B | b")), 2, "the end of A")[1][1]
    assert "Section 1: A | a\nSection 2: B | b" in content
    assert "Write section 2 only, about 300 words" in content and "ends with:\nthe end of A" in content
    assert "this is where it begins" in section_prompt(SEED, TASK, 300, Outline("T", ("A | a",)), 1, "")[1][1]


def test_a_retry_opens_with_the_reason():
    for messages in (
        context_prompt(SEED, TASK, 100, reason="too short"),
        facts_prompt(SEED, TASK, reason="too short"),
        outline_prompt(SEED, TASK, 900, 3, reason="too short"),
        section_prompt(SEED, TASK, 300, Outline("T", ("A | a",)), 1, "", reason="too short"),
        pair_prompt("text", reason="too short"),
    ):
        assert messages[1][1].startswith("An earlier reply was rejected: too short. ")


def test_closed_book_has_no_context_and_open_book_is_the_task_prompt():
    assert "Story:" not in answer_prompt(SEED, TASK)[0][1]
    assert "Story: Once\n\nNow, answer" in answer_prompt(SEED, TASK, "Once")[0][1]


def test_a_custom_template_replaces_the_prompt():
    template = check_template("Write {{{words}}} words for {instruction} / {answer} ({task}).", "mine.txt")
    content = context_prompt(SEED, TASK, 50, template=template, reason="too short")[1][1]
    assert content.endswith(
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
