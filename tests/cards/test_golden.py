"""The cards that the real trainer, evaluation and syntheses write, against golden files (`produce.py` writes them)."""

import re

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from cards.produce import GOLDEN, normalised, produce
from hf_longalign.cards import merge_card


NAMES = sorted(path.name for path in GOLDEN.iterdir())
CARDS = [name for name in NAMES if name.endswith(".md")]


@pytest.fixture(scope="module")
def produced(tmp_path_factory):
    return produce(tmp_path_factory.mktemp("cards"))


@pytest.mark.parametrize("name", NAMES)
def test_the_real_producers_write_the_golden_file(produced, name):
    assert normalised(produced[name]) == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CARDS)
def test_real_cards_are_read_by_the_hub_and_hold_no_gaps(produced, name):
    text = produced[name]
    data = (ModelCard if "adapter" in name or "model" in name else DatasetCard)(text).data
    assert data.tags and len(data.tags) == len(set(data.tags))
    page = re.sub(r"^```.*?^```", "CODE", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\bNone\b|\bnan\b|/tmp/|\{\{|\{%|, \.|\. \.|\n\n\n", page)
    assert merge_card(text, text) == text


@pytest.mark.parametrize("name", CARDS)
def test_every_table_is_one(produced, name):
    page = re.sub(r"^```.*?^```", "", produced[name], flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE)
    assert tables
    for table in tables:
        rows = [len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(rows)) == 1 and re.fullmatch(r"(\| -+:? )+\|", table.splitlines()[1])


def test_metrics_have_the_hubs_ids_and_words(produced):
    (index,) = yaml.safe_load(produced["adapter_evaluated.md"].split("---\n")[1])["model-index"]
    metrics = {(m["type"], m["name"]) for result in index["results"] for m in result["metrics"]}
    assert metrics == {("exact_match", "exact match (%)"), ("f1", "F1 (%)"), ("rouge", "ROUGE-L (%)")}
    lengths = [result["dataset"]["args"].get("length") for result in index["results"]]
    assert lengths == [512, 1024] * 4 + [None] * 2
