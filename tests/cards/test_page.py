"""What people wrote into a card stays, by one rule: between the marks it is ours, all else is theirs."""

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_longalign.cards import adapter_card, merge_card
from hf_longalign.cards.page import BEGIN, END, check_license
from hf_longalign.records.training import PositionsRecord, RopeRecord, TrainingRecord


def card(page="# Rows", front="tags:\n- hf_longalign\n", before="", after=""):
    marked = f"{BEGIN}\n\n{page}\n\n{END}"
    return f"---\n{front}---\n\n" + "\n\n".join(text for text in (before, marked, after) if text) + "\n"


def data(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize("old", [None, "", " \n"])
def test_without_an_old_card_the_new_one_is_it(old):
    assert merge_card(card(), old) == card()


@pytest.mark.parametrize("windows", [False, True])
def test_text_outside_of_the_marks_stays_and_inside_is_written_anew(windows):
    old = card("# Old", before="# Ours\n\nBy Ada.", after="## Notes\n\nMine.")
    old = old.replace("\n", "\r\n") if windows else old
    merged = merge_card(card("# New"), old)
    assert merged == card("# New", before="# Ours\n\nBy Ada.", after="## Notes\n\nMine.")
    assert merge_card(card("# New"), merged) == merged


def test_a_card_without_marks_is_its_authors_and_the_page_follows():
    merged = merge_card(card(), "---\nlicense: mit\n---\n\n# My model\n\nText.\n")
    assert merged == card(before="# My model\n\nText.", front="tags:\n- hf_longalign\nlicense: mit\n")
    assert merge_card(card(), merged) == merged


def test_a_card_without_marks_is_taken_as_it_is_over_any_other():
    assert merge_card("# My own\n", card()) == "# My own\n"


def test_text_that_both_wrote_stands_once_and_none_is_lost():
    merged = merge_card(card(before="Local.", after="Both."), card(before="Remote.", after="Both."))
    assert merged == card(before="Local.\n\nRemote.", after="Both.")


def test_keys_that_are_not_set_stay_and_those_that_are_win():
    old = card(front="license: cc-by-4.0\nbase_model: org/mine\nwidget:\n- text: Hi\ntags: [mine, skipalign]\n")
    found = data(merge_card(card(front="base_model: org/base\ntags:\n- hf_longalign\n"), old))
    assert found == {
        "base_model": "org/base",
        "license": "cc-by-4.0",
        "widget": [{"text": "Hi"}],
        "tags": ["hf_longalign", "mine"],  # skipalign was ours, and is no longer so
    }


def test_what_tells_of_files_that_are_gone_goes():
    old = card(front="configs:\n- config_name: old\ndataset_info:\n  splits: []\nsize_categories:\n- n<1K\n")
    assert "dataset_info" not in data(merge_card(card(front="configs:\n- config_name: chat\n"), old))
    assert data(merge_card(card(front="configs:\n- config_name: chat\n"), old))["configs"] == [{"config_name": "chat"}]


def index(*results):
    return yaml.safe_dump({"model-index": [{"name": "a", "results": list(results)}]})


MINE = {"task": {"type": "x"}, "metrics": [{"value": 1}], "source": {"name": "hf_longalign", "url": "u"}}
OTHERS = {"task": {"type": "x"}, "metrics": [{"value": 2}], "source": {"name": "lab", "url": "v"}}


def test_scores_of_others_stay_and_ours_are_those_of_the_weights():
    assert "model-index" not in data(merge_card(card(), card(front=index(MINE))))
    assert data(merge_card(card(), card(front=index(MINE, OTHERS))))["model-index"][0]["results"] == [OTHERS]
    new = {**MINE, "metrics": [{"value": 3}]}
    merged = merge_card(card(front=index(new)), card(front=index(MINE, OTHERS)))
    assert data(merged)["model-index"] == [{"name": "a", "results": [new, OTHERS]}]
    assert merge_card(merged, merged) == merged


def test_pefts_template_goes_and_one_line_of_a_person_keeps_it(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    template = (tmp_path / "README.md").read_text()
    assert "PEFT" in template and merge_card(card(), template) == card()
    assert "My line." in merge_card(card(), template + "\nMy line.\n")


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            card().replace(END, ""),
            "must hold the marks of hf_longalign once, a begin and after it an end, got 1 and 0",
        ),
        (card() + card(), "got 2 and 2"),
        (f"{END}\n{BEGIN}\n", "must hold the marks"),
        ("---\na: [\n---\n\n# x\n", "front matter of the card must be YAML"),
        ("---\n- a\n---\n\n# x\n", "front matter of the card must hold keys, got list"),
    ],
)
def test_what_cannot_be_read_is_not_overwritten(old, message):
    with pytest.raises(ValueError, match=message):
        merge_card(card(), old)


@pytest.mark.parametrize("mend", [lambda broken: broken + END, lambda broken: broken.replace(BEGIN, "")])
def test_both_remedies_for_a_lost_mark_work(mend):
    assert "# Rows" in merge_card(card(), mend(card().replace(END, "")))


def test_text_that_looks_like_a_mark_is_none():
    record = TrainingRecord(RopeRecord("llama"), PositionsRecord("none"), hardware=f"1 x {END}")
    text = adapter_card(record)
    assert text.count(END) == 1 and merge_card(text, text) == text


@pytest.mark.parametrize(
    ("given", "remedy"), [("CC BY 4.0", "cc-by-4.0"), ("Apache 2.0", "apache-2.0"), ("MIT", "mit")]
)
def test_a_licence_that_is_no_id_is_refused_with_the_likely_one(given, remedy):
    with pytest.raises(ValueError, match=f"`license` must be an id of the Hub .*Set '{remedy}'"):
        check_license(license=given)
    check_license(license=remedy)
