"""The cards of realistic facts, character for character.

To renew the files after a change of the cards: LONGALIGN_GOLDEN=1 pytest tests/cards/test_golden.py, then read them.
"""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_longalign.cards.adapter import adapter_card
from hf_longalign.cards.dataset import dataset_card
from hf_longalign.cards.edits import REPOSITORY, merge_card, name_repository
from hf_longalign.cards.facts import AdapterFacts, adapter_facts

from .examples import ADAPTER_CONFIG, EXAMPLES, RECORD, REPORT


GOLDEN = Path(__file__).parent / "golden"


def card_of(name):
    facts = EXAMPLES[name]
    return adapter_card(facts) if isinstance(facts, AdapterFacts) else dataset_card(facts)


@pytest.mark.parametrize("name", EXAMPLES)
def test_cards_are_the_golden_ones(name):
    path = GOLDEN / f"{name}.md"
    if os.environ.get("LONGALIGN_GOLDEN"):
        path.write_text(card_of(name), encoding="utf-8")
    assert card_of(name) == path.read_text(encoding="utf-8")


def test_every_golden_file_is_one_of_them():
    assert {path.stem for path in GOLDEN.glob("*.md")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_hub_reads_the_metadata_whole(name):
    text = card_of(name)
    raw = yaml.safe_load(text.split("---\n")[1])
    card = (ModelCard if name.startswith("adapter") else DatasetCard)(text)
    found = card.data.to_dict()
    if "model-index" in raw:
        assert len(card.data.eval_results) == 9
        assert eval_results_to_model_index(card.data.model_name, card.data.eval_results) == raw["model-index"]
    assert {key: found[key] for key in raw if key != "model-index"} == {
        key: value for key, value in raw.items() if key != "model-index"
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_unknown_and_no_path_of_a_machine_stands_there(name):
    text = card_of(name)
    assert not re.search(r"\bNone\b|\bnull\b|\bnan\b|/home/|More Information", text.replace("null: not measured", ""))
    assert not re.search(r"outputs/qwen2.5-0.5b", text) or name == "dataset_given" or "recipes/sft.py" in text
    assert merge_card(text, None) == text and merge_card(text, text) == text


def test_what_is_not_known_leaves_no_section():
    text = card_of("adapter_record_alone")
    assert "## Evaluation" not in text and "model-index" not in text and "huggingface.co/Qwen" not in text
    assert REPOSITORY in text and REPOSITORY not in name_repository(text, "user/a")
    bare = adapter_card(AdapterFacts({}))
    assert "## Positions" not in bare and "## Training" not in bare and "load_adapter" in bare


def test_modules_of_all_layers_are_named_once():
    layers = [f"model.layers.{number}.self_attn.{name}" for number in range(24) for name in ("q_proj", "v_proj")]
    facts = AdapterFacts(RECORD, {**ADAPTER_CONFIG, "target_modules": layers})
    assert "on `q_proj` and `v_proj` (48 modules) |" in adapter_card(facts)


def test_what_was_not_trained_here_is_not_said_to_be():
    card = adapter_card(AdapterFacts({}, ADAPTER_CONFIG, base_model="org/base"))
    assert "A LoRA adapter of [org/base](https://huggingface.co/org/base). Made" in card and "# base\n" in card


def test_facts_leave_out_what_only_this_machine_knows():
    facts = adapter_facts(
        {**RECORD, "base": {"name": "/models/q", "revision": None}, "data": {"name": "/data/rows", "revision": None}},
        {**ADAPTER_CONFIG, "base_model_name_or_path": "/models/q"},
    )
    assert facts.base_model is None and facts.data is None
    facts = adapter_facts(RECORD, ADAPTER_CONFIG, REPORT, base_model="org/other", dataset="org/rows")
    assert (facts.base_model, facts.base_revision) == ("org/other", None)
    assert facts.data.name == "org/rows" and facts.data.revision is None
    assert facts.images["needle_heatmap"] == "needle_heatmap.png"


def test_a_change_is_bold_only_where_it_is_larger_than_chance():
    text = card_of("adapter_complete")
    assert "**+6.3 (+1.8 to +10.8)**" in text and "| −0.2 (−1.1 to +0.7) |" in text


def test_rejected_counts_and_sizes_are_told():
    one = dataset_card(dataclasses.replace(EXAMPLES["dataset_given"], rejected={"support": 1}))
    assert "1 seed was rejected" in one
    assert "No seed was rejected." in card_of("dataset_given")
    assert "46 seeds were rejected" in card_of("dataset_context")
