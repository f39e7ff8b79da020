"""What of an output folder is published, and under which name of the base model."""

import json

import numpy as np
import pytest
from loopback_hub import TOKEN
from safetensors.numpy import save_file

from hf_longalign.publish.adapter import publish_adapter
from publish.conftest import held


KEPT = (
    "adapter_config.json",
    "longalign_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
LEFT = ("training_args.bin", "optimizer.pt", "journal.sqlite", "checkpoint-2/adapter_config.json", "run.log", ".env")


@pytest.fixture
def write_adapter(tmp_path):
    def write(name, base="org/base", values=(1.0, 2.0), card="---\nbase_model: org/base\n---\n# hf_longalign\n"):
        folder = tmp_path / name
        (folder / "checkpoint-2").mkdir(parents=True)
        (folder / "evaluation" / "answers").mkdir(parents=True)
        save_file({"w": np.array(values)}, folder / "adapter_model.safetensors")
        for file in (*KEPT, *LEFT):
            (folder / file).write_text("{}")
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(base)}))
        (folder / "README.md").write_text(card)
        (folder / "evaluation" / "report.json").write_text("{}")
        (folder / "evaluation" / "answers" / "results-0.jsonl").write_text("{}")
        return folder

    return write


@pytest.fixture
def publish_model(hub):
    def publish(folder, repo_id="user/adapter", **options):
        return publish_adapter(folder, repo_id, token=TOKEN, endpoint=hub.url, **options)

    return publish


def test_what_belongs_to_a_model_goes_and_the_rest_is_named(hub, publish_model, write_adapter, caplog):
    folder = write_adapter("a")
    with caplog.at_level("INFO", "hf_longalign"):
        assert publish_model(folder) == f"{hub.url}/user/adapter"
    kept = {"README.md", "adapter_model.safetensors", "evaluation/report.json", *KEPT}
    everything = held(folder)
    assert hub.files("user/adapter", "models") == {name: everything[name] for name in kept}
    assert (
        "Not published: .env, checkpoint-2/, journal.sqlite, optimizer.pt, run.log, training_args.bin." in caplog.text
    )


def test_a_later_push_leaves_no_weights_of_the_one_before(hub, publish_model, write_adapter):
    first, second = write_adapter("a"), write_adapter("b", values=(3.0,))
    (first / "adapter_model.safetensors").rename(first / "model-00001-of-00001.safetensors")
    (first / "config.json").write_text("{}")
    publish_model(first)
    repo = hub.repo("user/adapter", "models")
    repo.branches["main"] = repo.add({**repo.files(), "notes.md": b"mine"})
    publish_model(second)
    files = hub.files("user/adapter", "models")
    assert "model-00001-of-00001.safetensors" not in files and "config.json" not in files
    assert files["notes.md"] == b"mine"


@pytest.mark.parametrize("name", ["org/base", "my-base"])
def test_a_local_base_model_gets_the_name_it_is_given(hub, publish_model, write_adapter, tmp_path, name):
    (tmp_path / "models" / "base").mkdir(parents=True)
    card = f"---\nbase_model: {tmp_path}/models/base\n---\n# Adapter of {tmp_path}/models/base\n"
    folder = write_adapter("a", base=tmp_path / "models" / "base", card=card)
    before = held(folder)
    with pytest.raises(ValueError, match=r"`base_model` must be given .* got None and .*models/base"):
        publish_model(folder)
    assert hub.seen == []
    publish_model(folder, base_model=name)
    files = hub.files("user/adapter", "models")
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": name, "r": 8}
    assert json.loads(files["tokenizer_config.json"]) == {"name_or_path": name}
    assert files["README.md"].decode() == f"---\nbase_model: {name}\n---\n# Adapter of {name}\n"
    assert held(folder) == before


def test_a_relative_folder_is_local_too(publish_model, write_adapter, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`base_model` must be given .* 'base'"):
        publish_model(write_adapter("a", base="base"))
    with pytest.raises(ValueError, match=r"must be a Hub id or a neutral name, got the local 'base'"):
        publish_model(write_adapter("b"), base_model="base")


def test_a_path_in_the_record_stops_the_push(hub, publish_model, write_adapter):
    folder = write_adapter("a")
    (folder / "longalign_config.json").write_text(json.dumps({"data": {"file": "/mnt/jo/train.jsonl"}}))
    with pytest.raises(ValueError, match=r"an absolute path in longalign_config.json, key data.file: /mnt/jo"):
        publish_model(folder)
    assert hub.seen == []


def test_a_dry_run_writes_the_renamed_files(publish_model, write_adapter, tmp_path):
    folder = write_adapter("a", base="/models/base")
    look = publish_model(folder, base_model="org/base", dry_run=tmp_path / "look")
    config = json.loads((tmp_path / "look" / "adapter_config.json").read_text())
    assert look == str(tmp_path / "look") and config["base_model_name_or_path"] == "org/base"
    assert not set(held(tmp_path / "look")) & set(LEFT)


@pytest.mark.parametrize("missing", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_named(publish_model, write_adapter, missing):
    folder = write_adapter("a")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"`folder` must hold weights as safetensors, their .* and README.md, got"):
        publish_model(folder)
