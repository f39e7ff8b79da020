"""The code in the cards runs: on tiny models and data of this machine in place of the Hub's."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_chat import make_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longalign.cards.adapter import adapter_card
from hf_longalign.cards.dataset import DatasetFacts, dataset_card
from hf_longalign.cards.edits import name_repository
from hf_longalign.cards.facts import AdapterFacts
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import rope_record, scale_rope
from hf_longalign.run_record import load_record, save_record


def code_of(card, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


@pytest.fixture
def adapter(tmp_path):
    base = make_tiny_chat(tmp_path / "base", positions=64)
    config = scale_rope(AutoModelForCausalLM.from_pretrained(base).config, 256)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, config=config),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    save_record(tmp_path / "adapter", TrainingRecord(rope_record(model.get_base_model().config)))
    return base, tmp_path / "adapter", model


def test_both_ways_to_load_an_adapter_give_the_trained_model(adapter):
    base, folder, trained = adapter
    facts = AdapterFacts(load_record(folder).to_json(), base_model=str(base), base_revision="main")
    codes = code_of(name_repository(adapter_card(facts), str(folder)))
    ids = torch.arange(3, 9)[None]
    far = torch.tensor([[0, 1, 2, 100, 101, 250]])

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=far).logits

    assert len(codes) == 2
    for code in codes:
        names = {}
        exec(code, names)
        torch.testing.assert_close(logits(names["model"]), logits(trained), rtol=0, atol=0)


def test_a_whole_model_loads_as_its_card_says(tmp_path):
    base = make_tiny_chat(tmp_path / "base", positions=64)
    facts = AdapterFacts({"rope": {}}, whole=True)
    (code,) = code_of(name_repository(adapter_card(facts), str(base)))
    names = {}
    exec(code, names)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in names["model"].state_dict().items())


def test_the_data_set_loads_as_its_card_says(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]}]
    (tmp_path / "rows" / "chat").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "chat" / "train-00000-of-00001.parquet")
    card = dataset_card(DatasetFacts("given", {"chat": {"train": 1}}, {"qasper": 1}, lengths=[100]))
    (tmp_path / "rows" / "README.md").write_text(card)
    load, train = code_of(name_repository(card, str(tmp_path / "rows")))
    names = {"__name__": "card"}
    exec(load, names)
    assert capsys.readouterr().out == "Ada\n" and names["chat"].to_list() == rows
    # All of it but the training of a model of gigabytes, and TRL's default of bfloat16, which wants a GPU.
    made = {}
    train = train.replace("LongAlignSFTTrainer(", "dict(model=").replace("packing=", "bf16=False, packing=")
    exec(train.replace("trainer.train()", ""), made)
    assert made["trainer"]["train_dataset"].num_rows == 1
    assert made["trainer"]["args"].max_length == 1024 and made["trainer"]["args"].skip_target_length == 32768


@pytest.mark.parametrize(
    ("longest", "unit", "recipe", "length"),
    [
        (900, "tokens", "qwen2.5-0.5b", 1024),
        (17_000, "words", "llama-3.1-8b", 65536),
        (32_769, "tokens", "llama", 65536),
        (131_072, "tokens", "qwen3-4b", 131072),
    ],
)
def test_the_recipe_covers_the_longest_row(longest, unit, recipe, length):
    facts = DatasetFacts("given", {"chat": {"train": 2}}, {"qasper": 2}, lengths=[5, longest], unit=unit)
    (command,) = code_of(dataset_card(facts), "bash")
    assert f"recipes/{recipe}" in command and f"--max_length {length} --eval_strategy no" in command


def test_what_no_recipe_reaches_gets_no_command():
    facts = DatasetFacts("given", {"chat": {"train": 2}}, {"qasper": 2}, lengths=[131_073])
    assert len(code_of(dataset_card(facts))) == 1 and not code_of(dataset_card(facts), "bash")
