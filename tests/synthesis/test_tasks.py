import hashlib
import json

import pytest

from hf_longalign.synthesis.prompts import answer_prompt
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import TASKS, find_task, prompt_parts


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
