import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import forked
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from loopback_hub import TOKEN, Hub
from test_trainer import make_trainer
from transformers import PretrainedConfig, TrainerState, TrainingArguments

from hf_longalign import load_adapter, run_record
from hf_longalign.evaluation.models import record_of
from hf_longalign.records.training import HubSource


COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


def test_a_run_tells_its_length_batch_and_time(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    record = trainer.training_record()
    assert record.run.steps == trainer.state.global_step > 0
    assert record.run.batch_size == trainer.args.per_device_train_batch_size
    assert record.run.seconds > 0 and record.run.schedule == "linear"
    assert record.hardware == "1 x CPU" and record.versions["torch"] == version("torch")
    assert record.data is None and record.base is None


def test_the_time_of_a_resumed_run_is_not_known():
    args = TrainingArguments(use_cpu=True, report_to="none", bf16=False)
    state = TrainerState(global_step=3, epoch=0.5, log_history=[{"loss": 1.0}, {"train_runtime": 12.5}, {"loss": 2.0}])
    assert run_record.run_facts(args, state, resumed=False).seconds == 12.5
    found = run_record.run_facts(args, state, resumed=True)
    assert found.seconds is None and found.precision is None and found.epochs == 0.5


def test_a_base_is_named_only_where_the_cache_knows_its_commit(tmp_path, monkeypatch):
    file = tmp_path / "snapshots" / COMMIT / "config.json"
    monkeypatch.setattr(run_record, "try_to_load_from_cache", lambda name, file_name, revision: str(file))
    config = PretrainedConfig(name_or_path="org/model")
    assert run_record.base_source(config) == HubSource("org/model", COMMIT)
    assert run_record.base_source(PretrainedConfig(name_or_path=str(tmp_path))) is None
    assert run_record.base_source(PretrainedConfig()) is None
    monkeypatch.undo()
    assert run_record.base_source(config) is None
    assert run_record.base_source(PretrainedConfig(name_or_path="out/run/last")) is None


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
        assert run_record.loaded_commit("user/adapter", "adapter_config.json") == first
        assert run_record.loaded_commit("user/other", "adapter_config.json") is None


def test_a_record_out_of_reach_is_not_taken_for_none(tmp_path, monkeypatch):
    """Without a connection an adapter would be loaded without the RoPE that its record tells."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with Hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(run_record, "hf_hub_download", partial(hf_hub_download, endpoint=hub.url))
        api = HfApi(hub.url, token=TOKEN)
        for name in ("user/ours", "user/theirs"):
            api.create_repo(name)
            api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id=name)
            assert run_record.model_file(name, "adapter_config.json")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=run_record.RECORD_NAME, repo_id="user/ours")
        assert run_record.model_file("user/theirs", run_record.RECORD_NAME) is None
        with pytest.raises(ValueError, match="`user/typo` must be a folder, or on the Hub and open to you, got Repo"):
            run_record.model_file("user/typo", run_record.RECORD_NAME)
        whole = snapshot_download("user/ours", endpoint=hub.url, local_dir=tmp_path / "whole")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for read in (run_record.load_record, partial(load_adapter, base_model=None), record_of):
        with pytest.raises(ConnectionError, match=r"cannot be asked .*hf download user/ours --local-dir"):
            read("user/ours")
    # The cache remembers what the Hub said of the other.
    assert run_record.model_file("user/theirs", run_record.RECORD_NAME) is None
    assert run_record.model_file(whole, run_record.RECORD_NAME)  # the remedy


def test_a_data_set_tells_its_source(tmp_path, monkeypatch):
    """Each way of `datasets` to hold rows of the Hub; its folder spells `MyRows` as `my_rows`."""
    process = forked.run([sys.executable, Path(__file__).with_name("data_client.py"), tmp_path])
    found = json.loads(process.stdout)
    commit = found.pop("commit")
    source = {"name": "user/MyRows", "revision": commit, "config": "chat", "split": "train"}
    for way in ("loaded", "mapped", "split", "streamed", "streamed and mapped"):
        assert found.pop(way) == source, way
    assert found == dict.fromkeys(("joined", "joined with memory", "joined versions", "memory", "file", "no cache"))
