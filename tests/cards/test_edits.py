import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM
from trl.trainer.utils import generate_model_card

from hf_longalign.cards.dataset import dataset_card
from hf_longalign.cards.edits import assemble, merge_card, name_repository
from hf_longalign.cards.templates import is_template

from .examples import EXAMPLES


NAMES = ("intro", "use", "evaluation", "citation")
FIRST = assemble(
    {"license": "mit", "tags": ["a"], "configs": [{"config_name": "chat"}]},
    {"intro": "# Rows", "use": "Load them.", "size": "2 rows"},
)
SECOND = assemble(
    {"license": "mit", "tags": ["a", "b"], "configs": [{"config_name": "chat", "default": True}]},
    {"intro": "# Rows", "use": "Load them.", "evaluation": "0.9", "size": "3 rows"},
)


def test_without_edits_the_new_card_is_taken_as_it_is():
    assert merge_card(FIRST, None) == FIRST and merge_card(FIRST, " \n") == FIRST
    assert merge_card(SECOND, FIRST) == SECOND
    assert merge_card(FIRST, SECOND) == FIRST
    assert merge_card(SECOND, FIRST.replace("\n", "\r\n")) == SECOND


def test_text_between_the_sections_stays_where_it_was():
    end = "<!-- hf_longalign:end intro -->"
    edited = FIRST.replace(end, f"{end}\n\nMy words.\n\n| a |\n").replace("---\n\n", "---\n\nAbove all.\n\n", 1)
    merged = merge_card(SECOND, edited)
    assert merged.index("Above all.") < merged.index("# Rows") < merged.index("My words.\n\n| a |")
    assert merged.index("| a |") < merged.index("Load them.") < merged.index("0.9") < merged.index("3 rows")
    assert merge_card(SECOND, merged) == merged


def test_an_edited_section_stays_and_an_emptied_one_is_filled(caplog):
    edited = FIRST.replace("2 rows", "2 rows, as I counted").replace("Load them.", "")
    merged = merge_card(SECOND, edited)
    assert "2 rows, as I counted" in merged and "3 rows" not in merged and "Load them." in merged
    assert "Section size of the card was edited by hand and stays" in caplog.text
    assert merge_card(SECOND, merged) == merged
    assert "2 rows, as I counted" in merge_card(FIRST, merged)


def test_a_deleted_section_stays_away_until_its_marks_are_put_back():
    begin, end = ("<!-- hf_longalign:begin use -->", "<!-- hf_longalign:end use -->")
    start, stop = FIRST.index(begin), FIRST.index(end) + len(end)
    merged = merge_card(SECOND, FIRST[:start] + FIRST[stop:])
    assert "Load them." not in merged and "0.9" in merged
    assert merge_card(SECOND, merged) == merged
    back = merged.replace("<!-- hf_longalign:begin size", f"{begin}\n{end}\n\n<!-- hf_longalign:begin size")
    assert "Load them." in merge_card(SECOND, back)


def test_metadata_of_people_survives_and_what_describes_the_files_does_not():
    edited = FIRST.replace("license: mit", "# ours\nlicense: cc-by-4.0  # since May\nannotations: {by: us}")
    edited = edited.replace("- a\n", "- a\n- mine\n").replace("- config_name: chat", "- config_name: old")
    merged = merge_card(SECOND, edited)
    assert "# ours\nlicense: cc-by-4.0  # since May\nannotations: {by: us}\n" in merged
    assert "tags:\n- a\n- mine\n- b\n" in merged
    assert "old" not in merged and "default: true" in merged
    assert merge_card(SECOND, merged) == merged


def test_deleted_metadata_stays_away_unless_the_files_need_it():
    edited = FIRST.replace("license: mit\n", "").replace("configs:\n- config_name: chat\n", "")
    merged = merge_card(SECOND, edited)
    assert "license: mit" not in merged and "config_name: chat" in merged
    assert merge_card(SECOND, merged) == merged


def test_scores_of_an_earlier_push_go_with_it():
    before = assemble({"model-index": [{"name": "x"}], "license": "mit"}, {"evaluation": "0.9"})
    merged = merge_card(assemble({"license": "mit"}, {"intro": "# New"}), before)
    assert "model-index" not in merged and "0.9" not in merged
    own = assemble({"license": "mit"}, {"intro": "# Old"}).replace("license:", "model-index: [{name: mine}]\nlicense:")
    assert "{name: mine}" in merge_card(assemble({"license": "mit"}, {"intro": "# New"}), own)


def test_the_features_of_other_files_go():
    before = "---\ndataset_info:\n  features: []\n---\n# Mine\n"
    merged = merge_card(SECOND, before)
    assert "dataset_info" not in merged and "# Mine" in merged


def test_a_card_of_ones_own_is_kept_whole_in_front():
    own = "---\nlicense: other\ntags: [x]\n---\n\n# My model\n\nWords.\n"
    merged = merge_card(SECOND, own)
    assert merged.index("# My model\n\nWords.") < merged.index("# Rows") < merged.index("3 rows")
    assert "license: other" in merged and "- x\n- a\n- b\n" in merged
    assert merge_card(SECOND, merged) == merged
    assert "Just text" in merge_card(SECOND, "Just text")


@pytest.mark.parametrize("changed", [False, True])
def test_trls_own_card_makes_room_unless_somebody_wrote_into_it(changed):
    card = str(
        generate_model_card(
            base_model="org/model",
            model_name="sft",
            hub_model_id="user/sft",
            dataset_name="org/rows",
            tags=["trl"],
            wandb_url="https://wandb.ai/run",
            trackio_url=None,
            trainer_name="SFT",
            trainer_citation="@article{x,\n    title = {{A}},\n    year = 2024\n}",
            paper_title="SkipAlign",
            paper_id="2405.03939",
        )
    )
    card = card.replace("## Training procedure", "Mind the licence.\n\n## Training procedure") if changed else card
    merged = merge_card(SECOND, card)
    assert ("It has been trained using" in merged) == changed and "3 rows" in merged
    assert "- trl" in merged and "base_model: org/model" in merged


@pytest.fixture(scope="module")
def peft_saves(tmp_path_factory):
    """Save an adapter of a local base model into a folder, README.md and all."""
    base = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))

    def save(folder):
        model.save_pretrained(folder)
        card = (folder / "README.md").read_text()
        assert str(base) in card and "- PEFT " in card
        return card, str(base)

    return save


def test_pefts_own_card_makes_room_with_the_paths_in_it(peft_saves, tmp_path):
    card, base = peft_saves(tmp_path)
    assert "[More Information Needed]" in card and is_template(card.split("---\n", 2)[2])
    merged = merge_card(SECOND, card)
    assert "More Information" not in merged and base not in merged and "3 rows" in merged
    assert "- lora" in merged and "library_name: peft" in merged
    written = merge_card(SECOND, card.replace("## Uses", "## Uses\n\nFor cooking."))
    assert "For cooking." in written and base not in written


def test_what_peft_adds_to_a_card_does_not_stay(peft_saves, tmp_path):
    (tmp_path / "README.md").write_text(f"{FIRST}\nMine.\n")
    card, base = peft_saves(tmp_path)
    merged = merge_card(SECOND, card)
    assert base not in merged and "Mine." in merged and "3 rows" in merged and "license: mit" in merged


def test_licence_and_languages_stay_until_others_come():
    first = assemble({"license": "mit", "language": ["en"]}, {"intro": "# A"})
    second = merge_card(assemble({}, {"intro": "# B"}), first)
    assert "license: mit" in second and "- en" in second and "# B" in second
    third = merge_card(assemble({"license": "apache-2.0"}, {"intro": "# C"}), second)
    assert "license: apache-2.0" in third and "mit" not in third


@pytest.mark.parametrize(
    ("remote", "message"),
    [
        (FIRST.replace("<!-- hf_longalign:end use -->", ""), "out of place"),
        (FIRST.replace("<!-- hf_longalign:begin use -->", ""), "out of place"),
        (FIRST.replace("begin use", "begin us"), "out of place"),
        (FIRST.replace("begin use -->", "begin use ->"), "out of place"),
        (FIRST.replace("Load them.", FIRST.split("---\n")[2]), "out of place|one ledger"),
        (FIRST.split("<!-- hf_longalign:ledger")[0], "lost its ledger"),
        (FIRST + FIRST[FIRST.index("<!-- hf_longalign:ledger") :], "one ledger"),
        ("---\nlicense: mit\n", "must end with a line"),
        ("---\n: x\n---\n", "one key per line"),
        ("---\nlicense: mit\n\tb: c\n---\n", "one key per line"),
        ("---\nlicense: mit\nlicense: mit\n---\n", "got it twice"),
        ("---\ntags: {a: b}\n---\n", "a list of words"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(remote, message):
    with pytest.raises(ValueError, match=message):
        merge_card(SECOND, remote)


def test_a_generated_card_without_sections_keeps_what_people_wrote():
    assert "Mine." in merge_card(assemble({}, {}), assemble({}, {"intro": "# Rows"}) + "\nMine.\n")


def test_a_person_s_own_new_card_is_taken_as_it_is():
    assert merge_card("# Mine\n", FIRST) == "# Mine\n"


def test_an_edit_before_the_first_push_stays_an_edit():
    local = dataset_card(EXAMPLES["dataset_given"]).replace("## Seeds", "## Where it comes from")
    named = name_repository(local, "user/rows")
    assert "## Where it comes from" in named and 'load_dataset("user/rows", "chat"' in named
    fresh = name_repository(dataset_card(EXAMPLES["dataset_given"]), "user/rows")
    assert "## Where it comes from" in merge_card(fresh, named)
    assert merge_card(named, fresh) == named


words = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40).filter(
    lambda text: "hf_longalign" not in text and "---" not in text
)
texts = st.dictionaries(st.sampled_from(NAMES), words, max_size=4).map(
    lambda sections: {name: sections[name] for name in NAMES if name in sections}
)
metadata = st.fixed_dictionaries({}, optional={"license": words, "pretty_name": words, "tags": st.lists(words)})


@given(metadata, texts, metadata, texts, st.lists(words, max_size=3))
def test_merging_again_changes_nothing_and_no_text_of_a_person_is_lost(first, old, second, new, notes):
    remote = assemble(first, old)
    marks = [f"<!-- hf_longalign:end {name} -->" for name in old]
    for mark, note in zip(marks, notes, strict=False):
        remote = remote.replace(f"{mark}\n", f"{mark}\n\n{note}\n", 1)
    card = assemble(second, new)
    merged = merge_card(card, remote)
    assert merge_card(card, merged) == merged
    for mark, note in zip(marks, notes, strict=False):
        assert mark not in remote or note.strip() in merged
    assert merge_card(card, assemble(first, old)) == merge_card(merge_card(card, assemble(first, old)), None)


@given(metadata, texts, metadata, texts)
def test_an_unedited_card_holds_exactly_what_is_new(first, old, second, new):
    lasting = {key: first[key] for key in ("license",) if key in first}
    merged, card = merge_card(assemble(second, new), assemble(first, old)), assemble({**lasting, **second}, new)
    assert sorted(merged.splitlines()) == sorted(card.splitlines())
