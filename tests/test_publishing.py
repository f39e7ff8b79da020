"""The trainer's own card and push: one card everywhere, nothing swallowed, nothing private."""

import logging

import pytest
from loopback_hub import as_default
from peft import LoraConfig
from test_trainer import make_trainer

from hf_longalign.hub import PublishError


LORA = LoraConfig(target_modules=["q_proj", "v_proj"])


@pytest.fixture
def hub(monkeypatch):
    with as_default(monkeypatch) as hub:
        yield hub


def make(folder, **options):
    return make_trainer(folder, peft_config=LORA, base_name="org/base", **options)


def without_run(text):
    """A card without what differs between a checkpoint and the end: how long it ran, and how far."""
    kept = ("| length |", "| time |", "| samples seen", "| relative distances", "| largest", "| mean span")
    return [line for line in text.splitlines() if not line.startswith(kept)]


def test_checkpoints_and_output_folder_hold_one_card(tmp_path):
    trainer = make(tmp_path, max_steps=2, save_steps=1, save_strategy="steps", license="mit", languages=["en"])
    trainer.train()
    trainer.save_model()
    cards = [tmp_path / name / "README.md" for name in ("checkpoint-1", "checkpoint-2", ".")]
    texts = [path.read_text() for path in cards]
    assert without_run(texts[0]) == without_run(texts[1]) == without_run(texts[2])
    assert "license: mit" in texts[0] and "language:\n- en" in texts[0] and "base_model: org/base" in texts[0]
    assert "load_adapter(" in texts[0] and "(assets/coverage.png)" in texts[0]
    assert (tmp_path / "checkpoint-1" / "assets" / "coverage.png").is_file()
    assert "Model Card for" not in texts[0] and "More Information" not in texts[0] and str(tmp_path) not in texts[0]


def test_what_a_person_wrote_into_the_card_stays_through_saving(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    trainer = make(tmp_path, max_steps=1)
    trainer.create_model_card(model_name="x", dataset_name="org/rows", tags="extra")
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "license: mit" in text and "# Mine\n" in text and "- extra\n" in text
    trainer.create_model_card(dataset_name="org/rows")
    assert "datasets/org/rows" in (tmp_path / "README.md").read_text()


def test_a_card_that_cannot_be_read_ends_no_training(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with caplog.at_level(logging.WARNING, "hf_longalign"):
        make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert "stays as it is: The front matter of the card must be YAML" in caplog.text
    assert (tmp_path / "README.md").read_text() == "---\na: [\n---\n"


@pytest.mark.parametrize(
    ("strategy", "said", "unsaid"),
    [
        ("skip_all", ["- skipalign\n", "wu2024long", "for long contexts"], ["pose"]),
        ("pose", ["- pose\n", "zhu2023pose", "for long contexts"], ["skipalign", "SkipAlign", "wu2024long"]),
        ("none", ["Positions are ordinary."], ["skipalign", "SkipAlign", "wu2024long", "long-context\n", "jump"]),
    ],
)
def test_tags_words_and_citations_follow_the_strategy(tmp_path, strategy, said, unsaid):
    trainer = make(tmp_path, skip_strategy=strategy, max_steps=1)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert all(word in text for word in said) and not any(word in text for word in unsaid)
    assert "skipalign" not in trainer.model.model_tags


def test_a_push_is_one_commit_and_the_same_again_is_none(tmp_path, hub):
    trainer = make(tmp_path, max_steps=1, hub_model_id="user/adapter")
    trainer.train()
    assert trainer.push_to_hub(tag="v1", tags=["mine"], dataset_name="org/rows") == f"{hub.url}/user/adapter"
    repo = hub.repo("user/adapter", "models")
    assert hub.seen.count("commit") == 1 and repo.tags["v1"] == repo.branches["main"]
    card = repo.files()["README.md"].decode()
    assert 'load_adapter("user/adapter"' in card and "- mine\n" in card and "datasets/org/rows" in card
    assert not [name for name in repo.files() if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
    trainer.push_to_hub(tags=["mine"], dataset_name="org/rows")
    assert hub.seen.count("commit") == 1


def test_a_dry_run_and_a_branch(tmp_path, hub):
    trainer = make(tmp_path / "out", max_steps=1, hub_model_id="user/adapter", hub_revision="next")
    assert trainer.push_to_hub(dry_run=str(tmp_path / "look")) == str(tmp_path / "look")
    assert (tmp_path / "look" / "README.md").is_file() and "commit" not in hub.seen
    assert trainer.push_to_hub() == f"{hub.url}/user/adapter/tree/next"


def test_every_save_publishes_each_checkpoint_whole(tmp_path, hub):
    saves = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "push_to_hub": True}
    trainer = make(tmp_path, max_steps=2, hub_model_id="user/adapter", **saves)
    assert hub.repos == {}  # nothing is made before there is something to hold
    trainer.train()
    repo = hub.repo("user/adapter", "models")
    assert hub.seen.count("commit") == 2
    assert (
        repo.files()["adapter_model.safetensors"]
        == (tmp_path / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    )


def test_a_checkpoint_that_is_not_published_is_said_and_the_end_pushes_again(tmp_path, hub, caplog):
    saves = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "push_to_hub": True}
    trainer = make(tmp_path, max_steps=1, hub_model_id="user/adapter", **saves)
    hub.faults["commit"] = ["403"] * 1000
    trainer.train()
    assert "checkpoint-1 was not published, and the training goes on" in caplog.text
    with pytest.raises(PublishError, match=r"no right to write.*To go on, run: hf-longalign push"):
        trainer.save_model()
    hub.faults = {}
    trainer.save_model()
    assert "README.md" in hub.repo("user/adapter", "models").files()


def test_by_default_nothing_is_pushed_before_the_end(tmp_path, hub):
    trainer = make(
        tmp_path, max_steps=1, hub_model_id="user/adapter", push_to_hub=True, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert hub.repos == {}


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_publish_pickles_are_refused_before_training(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"`hub_strategy` must be 'end' or 'every_save', got '{strategy}'"):
        make(tmp_path, push_to_hub=True, hub_strategy=strategy)


def test_a_local_base_without_a_name_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LORA)
    trainer.model.get_base_model().config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="`base_name` must be given to publish"):
        trainer.push_to_hub()


def test_a_licence_that_is_none_of_the_hubs_is_refused_with_the_options(tmp_path):
    with pytest.raises(ValueError, match=r"`license` must be an id of the Hub .* Set 'apache-2.0'"):
        make(tmp_path, license="Apache 2.0")
