"""What of an output folder is published, and under which name of the base model."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from loopback_hub import TOKEN
from safetensors.numpy import save_file

from hf_longalign.cards import write_adapter_card
from hf_longalign.cli import main
from hf_longalign.hub import publish, publish_adapter
from hf_longalign.records.base import dumps
from hf_longalign.records.report import EvaluatedModel, Report, Score, SuiteResult, TaskResult
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.run_record import save_record
from hub.conftest import held


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
        save_record(folder, TrainingRecord(RopeRecord("llama")))
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


def test_an_empty_name_is_no_local_folder(hub, publish_model, write_adapter):
    folder = write_adapter("a")
    (folder / "tokenizer_config.json").write_text('{"name_or_path": ""}')
    publish_model(folder)
    assert hub.files("user/adapter", "models")["tokenizer_config.json"] == b'{"name_or_path": ""}'


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


def test_a_study_stands_once_on_the_card_as_it_was_told_last(hub, publish_model, write_adapter):
    folder = write_adapter("a", card="")
    for told in ("Nobody leads.", "Skips lead."):
        (folder / "study.md").write_text(f"## The study\n\n{told}\n")
        publish_model(folder)
        card = hub.files("user/adapter", "models")["README.md"].decode()
        assert card.count("## The study") == 1 and f"{told}\n\n## Citation" in card
        repo = hub.repo("user/adapter", "models")
        edited = {"README.md": f"{card.rstrip()}\n\nMine.\n".encode()}
        repo.branches["main"] = repo.add({**repo.files(), **edited})
    assert card.count("Mine.") == 1  # what people wrote beside it stays


@pytest.mark.parametrize("card", ["---\nmine: 1\n---\n\n# Mine\n", ""])
def test_a_push_tells_license_and_languages_and_leaves_the_folder_as_it_is(
    publish_model, write_adapter, tmp_path, monkeypatch, card
):
    folder, look = write_adapter("a", card=card), tmp_path / "look"
    before = held(folder)
    words = ["--hub_model_id", "user/adapter", "--license", "mit", "--languages", "en", "de", "--push_dry_run"]
    assert main(["push", str(folder), *words, str(look)]) == 0
    assert held(folder) == before
    text = (look / "README.md").read_text()
    assert "license: mit" in text and "language:\n- en\n- de" in text
    assert not card or ("mine: 1" in text and "# Mine" in text)
    monkeypatch.setattr(publish, "push", lambda files, to, owned, resume_command: resume_command)
    again = publish_model(folder, license="mit", languages=["en", "de"])
    assert again.endswith(f"push {folder} --hub_model_id user/adapter --license mit --languages en de")


def test_pictures_that_a_person_put_there_stay(hub, publish_model, write_adapter):
    first, second = write_adapter("a"), write_adapter("b", values=(3.0,))
    drawn = ("needle_single.png", "ruler_heatmap.png", "puzzles_latest.png", "assets/distances.png")
    (first / "assets").mkdir()
    for name in drawn:
        (first / name).write_bytes(b"drawn")
    publish_model(first)
    assert set(drawn) <= hub.files("user/adapter", "models").keys()
    repo = hub.repo("user/adapter", "models")
    repo.branches["main"] = repo.add({**repo.files(), "mine.png": b"photo", "assets/mine.png": b"photo"})
    publish_model(second)
    files = hub.files("user/adapter", "models")
    assert files["mine.png"] == files["assets/mine.png"] == b"photo" and not set(drawn) & files.keys()


def test_nothing_of_an_earlier_report_goes_with_a_later_one(hub, publish_model, write_adapter):
    """As where an adapter of the Hub is evaluated again: its folder is what was pushed after the first time."""
    folder = write_adapter("a", card="")
    task = TaskResult("single", "exact_match", 4, {"adapter": Score(0.5)})
    report = Report([EvaluatedModel("adapter", "a")], [SuiteResult("needle", [task])], images=["needle_accuracy.png"])
    (folder / "report.json").write_text(dumps(report))
    earlier = ("needle_heatmap.png", "perplexity.png", ".eval_results/longbench.yaml")
    (folder / ".eval_results").mkdir()
    for name in ("needle_accuracy.png", "mine.png", *earlier):
        (folder / name).write_bytes(b"0")
    publish_model(folder)
    files = hub.files("user/adapter", "models")
    assert {"needle_accuracy.png", "mine.png"} <= files.keys() and not set(earlier) & files.keys()
    card = files["README.md"].decode()
    assert "(needle_accuracy.png)" in card and "needle_heatmap" not in card and "perplexity.png" not in card


@pytest.mark.parametrize(
    "card", [None, f"{ModelCard.from_template(ModelCardData())}\n### Framework versions\n\n- PEFT 0.21.2"]
)
def test_a_folder_without_a_card_of_its_own_gets_one(hub, publish_model, write_adapter, tmp_path, card):
    (tmp_path / "base").mkdir()
    folder = write_adapter("a", base=tmp_path / "base", card=card or "")
    if card is None:
        (folder / "README.md").unlink()
    before = held(folder)
    publish_model(folder, base_model="org/base")
    text = hub.files("user/adapter", "models")["README.md"].decode()
    assert "base_model: org/base" in text and 'load_adapter("user/adapter"' in text and "More Inf" not in text
    assert held(folder) == before
    publish_model(folder, "named-short", base_model="org/base")
    assert 'load_adapter("user/named-short"' in hub.files("user/named-short", "models")["README.md"].decode()
    (folder / "longalign_config.json").unlink()
    with pytest.raises(ValueError, match=r"must hold longalign_config\.json .* Write README\.md into it"):
        publish_model(folder, base_model="org/base")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"with license and languages in its front matter, and give neither here"):
        publish_model(folder, base_model="org/base", license="mit")
    publish_model(folder, base_model="org/base")
    assert b"license: mit" in hub.files("user/adapter", "models")["README.md"]


def test_a_card_of_ours_gets_the_base_it_lacks_and_keeps_its_licence(hub, publish_model, write_adapter, tmp_path):
    (tmp_path / "base").mkdir()
    folder = write_adapter("a", base=tmp_path / "base", card="")
    write_adapter_card(folder, license="mit")
    assert "base_model" not in (folder / "README.md").read_text()
    publish_model(folder, base_model="org/base")
    text = hub.files("user/adapter", "models")["README.md"].decode()
    assert "base_model: org/base\n" in text and "license: mit\n" in text


def test_a_relative_base_folder_is_no_hub_id_in_the_card(write_adapter, tmp_path, monkeypatch):
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = write_adapter_card(write_adapter("a", base="models/base", card=""))
    assert "models/base" not in path.read_text()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_named(publish_model, write_adapter, missing):
    folder = write_adapter("a")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"`folder` must hold weights as safetensors and their .*config.json, got"):
        publish_model(folder)
