"""The code in the cards runs: on tiny models and data of this machine in place of the Hub's."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_chat import make_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longalign.cards import adapter_card, dataset_card
from hf_longalign.cards.dataset import DataRecord
from hf_longalign.records.training import HubSource, RopeRecord, TrainingRecord
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
    record = replace(load_record(folder), base=HubSource("org/base", "main"))
    card = adapter_card(record, {}, repo_id=str(folder)).replace("org/base", str(base))
    codes = code_of(card)
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
    (code,) = code_of(adapter_card(TrainingRecord(RopeRecord("llama")), repo_id=str(base)))
    names = {}
    exec(code, names)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in names["model"].state_dict().items())


def test_the_data_set_loads_as_its_card_says(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]}]
    (tmp_path / "rows" / "chat").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "chat" / "train-00000-of-00001.parquet")
    record = DataRecord("given", {"chat": {"train": 1}}, {"qasper": 1}, lengths=[100])
    card = dataset_card(record, repo_id=str(tmp_path / "rows"))
    (tmp_path / "rows" / "README.md").write_text(card)
    load, train = code_of(card)
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
    ("longest", "unit", "target", "length"),
    [(900, "tokens", 32768, 1024), (17_000, "words", 131072, 65536), (131_072, "tokens", 131072, 131072)],
)
def test_the_settings_cover_the_longest_row(longest, unit, target, length):
    record = DataRecord("given", {"chat": {"train": 2}}, {"qasper": 2}, lengths=[5, longest], unit=unit)
    code = code_of(dataset_card(record))[1]
    assert f"max_length={length},\n" in code and f"skip_target_length={target},\n" in code


def test_what_no_model_reaches_gets_no_settings():
    record = DataRecord("given", {"chat": {"train": 2}}, {"qasper": 2}, lengths=[131_073])
    assert len(code_of(dataset_card(record))) == 1


def test_a_server_is_told_the_rope():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    record = TrainingRecord(RopeRecord("llama", 256, rope), base=HubSource("org/base"))
    (command,) = code_of(adapter_card(record, {"peft_type": "LORA"}, repo_id="user/a"), "bash")
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert words[:3] == ["vllm", "serve", "org/base"] and words[words.index("--max-model-len") + 1] == "256"
    assert json.loads(words[words.index("--hf-overrides") + 1]) == {
        "rope_parameters": rope,
        "max_position_embeddings": 256,
    }
    assert words[words.index("--lora-modules") + 1] == "user/a=user/a"
    plain = TrainingRecord(RopeRecord("llama", 64, {"rope_type": "default", "rope_theta": 1e4}), base=HubSource("o/b"))
    assert not code_of(adapter_card(plain, {}), "bash")
