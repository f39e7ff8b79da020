import logging
from types import SimpleNamespace

import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from loopback_hub import TOKEN, Hub
from test_trainer import make_trainer
from transformers import PretrainedConfig, TrainerState, TrainingArguments

from hf_longalign import provenance
from hf_longalign.cards.adapter import adapter_card
from hf_longalign.cards.facts import adapter_facts
from hf_longalign.commands import sft
from hf_longalign.commands.training_options import DataOptions


COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


def test_a_run_tells_its_length_batch_and_time(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.data_source = {"name": "org/rows", "revision": COMMIT}
    trainer.train()
    record = trainer.training_record()
    assert record["run"]["steps"] == trainer.state.global_step > 0
    assert record["run"]["batch_size"] == trainer.args.per_device_train_batch_size
    assert record["run"]["seconds"] > 0 and record["run"]["schedule"] == "linear"
    assert record["hardware"] == "1 x CPU" and record["versions"]["torch"] == torch.__version__
    assert record["data"] == {"name": "org/rows", "revision": COMMIT} and "base" not in record
    text = adapter_card(adapter_facts(record))
    assert "| hardware | 1 x CPU |" in text and f"org/rows) (revision `{COMMIT}`)" in text
    assert str(tmp_path) not in text


def test_the_time_of_a_resumed_run_is_not_known():
    args = TrainingArguments(use_cpu=True, report_to="none", bf16=False)
    state = TrainerState(global_step=3, epoch=0.5, log_history=[{"loss": 1.0}, {"train_runtime": 12.5}, {"loss": 2.0}])
    assert provenance.run_facts(args, state, resumed=False)["seconds"] == 12.5
    found = provenance.run_facts(args, state, resumed=True)
    assert "seconds" not in found and "precision" not in found and found["epochs"] == 0.5


def test_a_base_is_named_only_where_the_cache_knows_its_commit(tmp_path, monkeypatch):
    file = tmp_path / "snapshots" / COMMIT / "config.json"
    monkeypatch.setattr(provenance, "try_to_load_from_cache", lambda name, file_name, revision: str(file))
    config = PretrainedConfig(name_or_path="org/model")
    assert provenance.base_source(config) == {"name": "org/model", "revision": COMMIT}
    assert provenance.base_source(PretrainedConfig(name_or_path=str(tmp_path))) is None
    assert provenance.base_source(PretrainedConfig()) is None
    monkeypatch.undo()
    assert provenance.base_source(config) is None
    assert provenance.base_source(PretrainedConfig(name_or_path="out/run/last")) is None


def test_the_commit_loaded_is_not_one_pushed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as hub:
        api = HfApi(hub.url, token=TOKEN)
        api.create_repo("user/adapter")
        first = api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="user/adapter").oid
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        hf_hub_download("user/adapter", "adapter_config.json", endpoint=hub.url, cache_dir=tmp_path)
        api.upload_file(path_or_fileobj=b"{1}", path_in_repo="adapter_config.json", repo_id="user/adapter")
        assert api.repo_info("user/adapter").sha != first
        assert provenance.loaded_commit("user/adapter", "adapter_config.json") == first
        assert provenance.loaded_commit("user/other", "adapter_config.json") is None


def test_the_recipe_names_data_of_the_hub_alone(tmp_path):
    args = DataOptions(dataset_name="org/rows", dataset_config="chat", dataset_revision="v2")
    found = {"name": "org/rows", "config": "chat", "split": "train"}
    assert sft.data_source(args, SimpleNamespace()) == {**found, "revision": "v2"}
    rows = make_rows(tmp_path / "org___rows" / "chat" / "0.0.0" / COMMIT)
    assert sft.data_source(args, rows) == {**found, "revision": COMMIT}
    args.dataset_name = str(tmp_path)
    assert sft.data_source(args, rows) is None


def make_rows(folder):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
    logging.getLogger("datasets").setLevel(logging.WARNING)
    return Dataset.load_from_disk(folder)
