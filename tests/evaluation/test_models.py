"""Only what may be compared is loaded: the right base, revision, RoPE and tokenizer; identities tell models apart."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_longalign.adapter import weights_sample
from hf_longalign.evaluation import evaluator
from hf_longalign.evaluation.models import Examined, examinees, load_config, load_model, shared_tokenizer
from hf_longalign.evaluation.options import ModelOptions
from hf_longalign.evaluation.runner import Examinee, ResultStore
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import rope_record, scale_rope
from hf_longalign.run_record import load_record, save_record


@pytest.fixture
def trained(tmp_path):
    """A base of range 64 and an adapter trained on it at range 256, with its record and tokenizer."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(max_position_embeddings=64).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, config=scale_rope(plain.config, 256))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    rope = rope_record(model.get_base_model().config)
    save_record(adapter, TrainingRecord(rope, base_weights=weights_sample(plain)))
    return base, adapter


def options(base, **given):
    return ModelOptions(str(base), **{name: value and str(value) for name, value in given.items()})


def test_base_and_adapter_differ_in_the_adapter_alone(trained):
    base, adapter = trained
    model = load_model(options(base, adapter=adapter))
    assert isinstance(model, PeftModel) and model.config.max_position_embeddings == 256
    one, other = examinees(model, lambda: None, {})
    assert (one.label, other.label) == ("base", "adapter") and one.identity != other.identity
    ids = torch.arange(3, 40)[None]
    scaled = AutoModelForCausalLM.from_pretrained(base, config=scale_rope(model.config, 256)).eval()
    with torch.no_grad():
        with other.active():
            adapted = model(input_ids=ids).logits
        with one.active():
            torch.testing.assert_close(model(input_ids=ids).logits, scaled(input_ids=ids).logits, rtol=0, atol=0)
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=0, atol=0)
    assert (adapted - scaled(input_ids=ids).logits).abs().max() > 1e-3


def test_where_rope_is_scaled_the_base_as_published_is_asked_too(trained):
    base, adapter = trained
    model = load_model(options(base, adapter=adapter))
    published = AutoConfig.from_pretrained(base)
    plain, scaled, trained_one = examinees(model, lambda: None, {}, published)
    assert [who.label for who in (plain, scaled, trained_one)] == ["base", "base, scaled RoPE", "adapter"]
    assert len({who.identity for who in (plain, scaled, trained_one)}) == 3 and "not scaled" in plain.what
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        before = model(input_ids=ids).logits
        with plain.active():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        with scaled.active():
            assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert len(examinees(model, lambda: None, {}, model.config)) == 2  # nothing is scaled: two say all


def test_prompts_within_a_scaled_range_are_no_news(trained, caplog):
    for folder in trained:
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(folder)
    examined = Examined.load(options(trained[0], adapter=trained[1]))
    assert examined.reach == 256 and len(examined.tokenizer("Ardel sold salt. " * 40).input_ids) > 64
    assert "longer than the specified maximum" not in caplog.text


def test_identities_follow_weights_and_settings(trained):
    base, adapter = trained

    def identities(settings):
        model = load_model(options(base, adapter=adapter))
        return [who.identity for who in examinees(model, lambda: None, settings)]

    first = identities({"chat": True})
    assert identities({"chat": True}) == first
    assert not set(identities({"chat": False})) & set(first)
    model = load_model(options(base, adapter=adapter))
    model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").data += 1
    model.save_pretrained(adapter)
    again = identities({"chat": True})
    assert again[0] == first[0] and again[1] != first[1]
    tiny_llama(seed=0, max_position_embeddings=64).save_pretrained(base)  # the same name, written again
    assert identities({"chat": True})[0] != first[0]


def test_another_tokenizer_is_asked_again(trained, tmp_path):
    """Answers are stored by the prompt's text, which another template would put to the model in another way."""
    base, _ = trained
    other = tiny_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(tmp_path / "other")
    asked = [options(base), options(base, tokenizer=base), options(base, tokenizer=tmp_path / "other")]
    one, same, another = (Examined.load(given).who[0].identity for given in asked)
    assert one == same != another
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2, 3]}')
    assert Examined.load(options(base)).who[0].identity != one, "answers end elsewhere"


def test_another_base_is_refused_by_its_weights_and_the_same_taken_under_any_name(trained, tmp_path):
    base, adapter = trained
    load_model(options(base.rename(tmp_path / "moved"), adapter=adapter))
    tiny_llama(seed=1, max_position_embeddings=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must have the weights its adapter was trained on"):
        load_model(options(tmp_path / "other", adapter=adapter))


def test_without_its_weights_another_name_is_refused(trained, tmp_path, caplog):
    base, adapter = trained
    save_record(adapter, replace(load_record(adapter), base_weights={}))
    with pytest.raises(ValueError, match="`model` must be the base of the adapter"):
        load_model(options(tmp_path / "moved", adapter=adapter))
    (adapter / "longalign_config.json").unlink()
    with caplog.at_level(logging.WARNING, "hf_longalign"):
        load_model(options(base, adapter=adapter))
    assert "has no record of its training" in caplog.text


def test_another_revision_is_refused(trained):
    base, adapter = trained
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"revision": null', '"revision": "v1"'))
    with pytest.raises(ValueError, match="`model_revision` must be the adapter's, 'v1', got 'v2'"):
        load_model(options(base, adapter=adapter, model_revision="v2"))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("given", "named", "expected"), [("v2", None, "v2"), (None, "v1", "v1"), (None, None, None)])
def test_the_revision_that_was_asked_for_is_the_one_loaded(trained, monkeypatch, recorded, given, named, expected):
    base, adapter = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": named}))
    if not recorded:
        (adapter / "longalign_config.json").unlink()
    asked = []
    original = PreTrainedModel.from_pretrained.__func__

    def load(cls, *args, revision=None, **kwargs):
        asked.append(revision)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    load_model(options(base, adapter=adapter, model_revision=given))
    assert asked == [expected]


def test_a_served_adapter_has_the_range_it_was_trained_for(trained):
    base, adapter = trained
    assert load_config(options(base)).max_position_embeddings == 64
    assert load_config(options(base, adapter=adapter)).max_position_embeddings == 256
    with pytest.raises(ValueError, match="`model_revision` must be the adapter's, 'v1'"):
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text().replace('"revision": null', '"revision": "v1"'))
        load_config(options(base, adapter=adapter, model_revision="v2"))


def test_another_chat_template_is_refused_until_one_is_chosen(trained):
    base, adapter = trained
    assert shared_tokenizer(options(base, adapter=adapter)).chat_template == tiny_tokenizer().chat_template
    other = tiny_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(adapter)
    with pytest.raises(ValueError, match="identical prompts, got another chat template"):
        shared_tokenizer(options(base, adapter=adapter))
    chosen = shared_tokenizer(options(base, adapter=adapter, tokenizer=adapter))
    assert chosen.chat_template == other.chat_template


def test_an_adapter_without_a_tokenizer_is_asked_with_the_base_s(trained, tmp_path):
    base, adapter = trained
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"a tokenizer that loads.*Expecting property name.*Set `tokenizer`"):
        shared_tokenizer(options(base, adapter=adapter))  # it may be another than the base's
    assert shared_tokenizer(options(base, adapter=adapter, tokenizer=str(base)))  # the remedy
    for path in (*adapter.glob("tokenizer*"), *adapter.glob("chat_template*")):
        path.unlink()
    assert shared_tokenizer(options(base, adapter=adapter)).chat_template


def test_a_server_is_checked_by_the_model_as_the_options_load_it(trained, tmp_path, monkeypatch):
    base, adapter = trained
    asked = []

    def load(found):
        asked.append(found)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator, "load_model", load)
    given = ModelOptions(
        str(base), str(adapter), endpoint="http://localhost", check_served="local", trust_remote_code=True
    )
    with ResultStore(tmp_path / "answers") as store, pytest.raises(KeyboardInterrupt):
        evaluator.check_served(Examined(given, None, None, None, []), Examinee("adapter", "id", None), store)
    assert asked == [given]  # code that comes with the model is run here as for every other use of it


def test_without_the_hub_a_served_base_is_not_compared_and_an_adapter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def settings(label, check):
        given = ModelOptions("org/base", "org/adapter", endpoint="http://localhost", check_served=check)
        examinee = Examinee(label, "id", None)
        with ResultStore(tmp_path / "answers") as store:
            return evaluator.check_served(Examined(given, None, None, None, []), examinee, store)

    assert "the Hub could not be asked" in settings("base", "stored")["answers as trained"]
    with pytest.raises(ConnectionError, match="hf download org/adapter"):
        settings("adapter", "stored")
    assert "the Hub could not be asked" in settings("adapter", "off")["answers as trained"]
