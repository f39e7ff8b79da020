"""`LongAlignSFTTrainer` against the samples one by one, and in place of `SFTTrainer`."""

import copy
import inspect
from collections import Counter
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig
from test_turns import THINKING, chat_tokenizer
from tiny import chat_dataset, chats, tiny_llama, tiny_tokenizer
from transformers import (
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    DataCollatorForSeq2Seq,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer, SkipPositionDataCollator
from hf_longalign.preflight import PreflightError
from hf_longalign.records.training import PositionsRecord


def make_trainer(tmp_path, *, dataset=None, model=None, **options):
    names = ("eval_dataset", "peft_config", "data_collator", "processing_class", "formatting_func")
    kwargs = {"processing_class": tiny_tokenizer(), **{key: options.pop(key) for key in names if key in options}}
    args = LongAlignSFTConfig(
        **{
            "output_dir": str(tmp_path),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "gradient_checkpointing": False,
            "max_length": 256,
            "skip_target_length": 1024,
            "skip_probability": 1.0,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        }
    )
    return LongAlignSFTTrainer(
        model or tiny_llama(),
        args=args,
        train_dataset=chat_dataset() if dataset is None else dataset,
        **kwargs,
    )


def documents_of(batch):
    """(input_ids, labels, position_ids) of each document of a collated batch, padding left out."""
    ordinary = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    columns = [batch["input_ids"], batch["labels"], batch.get("position_ids", ordinary)]
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].tolist()
        return [[c[0, a:b] for c in columns] for a, b in pairwise(bounds)]
    return [[c[row][mask.bool()] for c in columns] for row, mask in enumerate(batch["attention_mask"])]


def naive_losses(model, batches):
    """Per document: (sum of the token losses, number of targets), each document alone with its positions, eager."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    found = []
    for batch in batches:
        for input_ids, labels, positions in documents_of(batch):
            with torch.no_grad():
                logits = model(
                    input_ids=input_ids[None],
                    position_ids=positions[None],
                    attention_mask=torch.ones_like(input_ids)[None],
                    use_cache=False,
                ).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
            ).item()
            found.append((loss, int((labels[1:] != -100).sum())))
    return [(loss, count) for loss, count in found if count]


def naive_loss(model, batches, weighting):
    losses = naive_losses(model, batches)
    if weighting == "token":
        return sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    return sum(loss / count for loss, count in losses) / len(losses)


def first_step_batches(trainer):
    iterator = iter(trainer.get_train_dataloader())
    return [next(iterator) for _ in range(trainer.args.gradient_accumulation_steps)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_is_that_of_the_samples_one_by_one(tmp_path, packing, weighting, accumulation):
    trainer = make_trainer(
        tmp_path,
        packing=packing,
        loss_weighting=weighting,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=1 if packing else 2,
        assistant_only_loss=True,
        max_steps=1,
    )
    torch.manual_seed(trainer.args.seed)
    batches = first_step_batches(trainer)
    expected = naive_loss(trainer.model, batches, weighting)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-4)


def test_positions_are_skipped_and_logged(tmp_path):
    trainer = make_trainer(tmp_path, packing=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["skip_share"] == 1.0
    assert 0 < log["skip_span_mean"] <= log["skip_span_max"] <= 1024


def test_epochs_bring_new_positions_and_workers_the_same(tmp_path):
    def run(workers):
        trainer = make_trainer(
            tmp_path,
            dataset=chat_dataset(4),
            num_train_epochs=3,
            max_steps=-1,
            per_device_train_batch_size=4,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            learning_rate=0.0,
        )
        seen = []
        trainer.coverage.observe = lambda inputs: seen.append(inputs["position_ids"].max().item())
        trainer.train()
        return seen

    spans = run(0)
    assert len(set(spans)) == 3
    assert run(2) == spans


def test_evaluation_keeps_ordinary_positions(tmp_path):
    # Blocks from the labels: evaluation rows carry no marks.
    trainer = make_trainer(tmp_path, packing=True, eval_dataset=chat_dataset(4), assistant_only_loss=True)
    for batch in trainer.get_eval_dataloader():
        for _, _, positions in documents_of(batch):
            assert positions.tolist() == list(range(len(positions)))
    expected = naive_loss(trainer.model, trainer.get_eval_dataloader(), "token")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_evaluation_may_be_packed_apart(tmp_path, packing):
    trainer = make_trainer(tmp_path, packing=packing, eval_packing=not packing, eval_dataset=chat_dataset(6))
    assert ("seq_lengths" in trainer.eval_dataset.column_names) is not packing
    padded = make_trainer(tmp_path, eval_dataset=chat_dataset(6))
    expected = naive_loss(padded.model, padded.get_eval_dataloader(), "token")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=2e-4)
    assert trainer.evaluate(chat_dataset(6))["eval_loss"] == pytest.approx(expected, abs=2e-4)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(expected, abs=2e-4)


def test_samples_that_train_nothing_are_left_out(tmp_path, caplog):
    texts = ["", "Ardel sold salt.", "", "Bemo sold wool."]
    rows, full = (Dataset.from_list([{"text": text} for text in kept]) for kept in (texts, texts[1::2]))
    trainer = make_trainer(tmp_path, dataset=rows, eval_dataset=rows)
    assert len(trainer.train_dataset) == 2
    assert "2 of 4 rows of the train dataset have no target" in caplog.text
    # Those of evaluation are TRL's, and add nothing.
    other = make_trainer(tmp_path, dataset=full, eval_dataset=full)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "padding-free"])
def test_rows_that_train_nothing_contribute_nothing(tmp_path, packing, weighting, caplog):
    nothing = {"input_ids": [2], "labels": [2]}
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [9, 10]}]
    data = Dataset.from_list([rows[0], nothing, nothing, nothing, rows[1], nothing])
    options = {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
        "skip_strategy": "pose",
        "padding_free": packing,
        "loss_weighting": weighting,
        "max_length": None if packing else 256,
        "max_steps": 3,
        "learning_rate": 0.0,
    }
    trainer = make_trainer(tmp_path, dataset=data, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batches = list(trainer.get_train_dataloader())
    expected = [naive_loss(trainer.model, [batches[index]], weighting) for index in (0, 2)]
    assert losses == pytest.approx([expected[0], 0.0, expected[1]], abs=2e-4)
    assert caplog.text.count("has no target after its first token") == 1
    predicted = trainer.predict(Dataset.from_list([nothing, nothing]))
    assert predicted.metrics["test_loss"] == 0


def test_without_skips_no_rotary_positions_are_needed(tmp_path):
    config = BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)
    trainer = make_trainer(tmp_path, model=BloomForCausalLM(config), skip_strategy="none", skip_target_length=None)
    trainer.train()
    assert trainer.coverage is None
    assert trainer.training_record().positions == PositionsRecord("none")


def test_sequence_weighted_evaluation(tmp_path):
    trainer = make_trainer(
        tmp_path,
        loss_weighting="sequence",
        assistant_only_loss=True,
        eval_dataset=chat_dataset(4),
        per_device_eval_batch_size=4,
    )
    expected = naive_loss(trainer.model, trainer.get_eval_dataloader(), "sequence")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=2e-4)


def test_blocks_reach_the_collator_through_packing(tmp_path):
    # Every token is a target: only the marks tell the turns.
    trainer = make_trainer(tmp_path, packing=True, skip_strategy="skip_outer")
    jumps = set()
    for batch in trainer.get_train_dataloader():
        for input_ids, labels, positions in documents_of(batch):
            assert (labels[1:] >= 0).all()
            for place in (positions.diff() > 1).nonzero().flatten().tolist():
                jumps.add(trainer.processing_class.decode(input_ids[place + 1 : place + 4]))
    assert jumps == {"<|start|>us"}  # three tokens


def prompt_completion_dataset():
    rows = [{"prompt": m[0]["content"] + " ", "completion": m[1]["content"]} for m in chats(16)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        pytest.param(prompt_completion_dataset(), {"packing": True}, id="prompt-completion packed"),
        pytest.param(prompt_completion_dataset(), {"completion_only_loss": False}, id="prompt-completion whole"),
        pytest.param(
            Dataset.from_list([{"prompt": m[:3], "completion": m[3:]} for m in chats(16)]),
            {"padding_free": True, "max_length": None},
            id="conversational prompt-completion padding-free",
        ),
        pytest.param(
            Dataset.from_list([{"text": m[0]["content"]} for m in chats(16)]), {"skip_strategy": "pose"}, id="text"
        ),
        pytest.param(
            Dataset.from_list([{"input_ids": list(range(5, 25)), "labels": [-100] * 10 + list(range(15, 25))}] * 8),
            {"packing": True},
            id="tokenised",
        ),
        pytest.param(
            IterableDataset.from_generator(lambda: ({"messages": m} for m in chats(16))),
            {"packing": True, "assistant_only_loss": True},
            id="iterable",
        ),
        pytest.param(chat_dataset(), {"pad_to_multiple_of": 16, "skip_strategy": "randpos"}, id="randpos"),
        pytest.param(chat_dataset(), {"gradient_checkpointing": True, "packing": True}, id="checkpointing"),
        pytest.param(chat_dataset(), {"use_liger_kernel": False, "skip_strategy": "none"}, id="no skips"),
        pytest.param(chat_dataset(), {"max_length": 40, "assistant_only_loss": True}, id="truncated"),
        pytest.param(chat_dataset(), {"max_length": 60}, id="truncated, all targets"),
    ],
)
def test_trains_every_kind_of_data_set(tmp_path, dataset, options):
    trainer = make_trainer(tmp_path, dataset=dataset, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    assert np.isfinite(log["loss"]) and log["loss"] > 0
    assert log.get("skip_share") == (None if options.get("skip_strategy") == "none" else 1.0)


def test_peft_keeps_the_base_and_trains_the_adapter(tmp_path):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = make_trainer(tmp_path, model=model, packing=True, peft_config=LoraConfig(target_modules="all-linear"))
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if "lora_B" in name:
            assert value.abs().sum() > 0
        elif "lora_" not in name:
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_quantised_base_trains_its_adapter(tmp_path, packing):
    pytest.importorskip("bitsandbytes", reason="needs the extra [quant]")
    tiny_llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "model")
    args = make_trainer(tmp_path, packing=packing, gradient_checkpointing=packing).args
    trainer = LongAlignSFTTrainer(
        str(tmp_path / "model"),
        args=args,
        train_dataset=chat_dataset(),
        processing_class=tiny_tokenizer(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    assert trainer.model.is_loaded_in_4bit
    assert all(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_virtual_tokens_have_no_weight(tmp_path):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    options = {"peft_config": peft_config, "loss_weighting": "sequence", "assistant_only_loss": True, "max_steps": 1}
    trainer = make_trainer(tmp_path, skip_strategy="none", **options)
    losses = []
    for input_ids, labels, _ in documents_of(first_step_batches(trainer)[0]):
        with torch.no_grad():
            logits = trainer.model(input_ids=input_ids[None], use_cache=False).logits[0, 3:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100).item())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(losses), abs=2e-4)
    # PEFT drops position ids here: the preflight sees it.
    with pytest.raises(PreflightError):
        make_trainer(tmp_path, **options).train()


def test_coverage_is_of_the_whole_run_after_a_resume(tmp_path):
    options = {"packing": True, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3, "max_steps": -1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    half = make_trainer(tmp_path / "half", **options)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert half.training_record().coverage == whole.training_record().coverage
    assert half.state.log_history[2:] and whole.training_record().coverage.documents == 48
    for ours, theirs in zip(half.state.log_history, whole.state.log_history, strict=True):
        assert {k: v for k, v in ours.items() if "skip" in k} == {k: v for k, v in theirs.items() if "skip" in k}


def test_compute_metrics_sees_the_logits(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, eval_dataset=chat_dataset(4))
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions.shape) or {"ok": 1.0}
    assert trainer.evaluate()["eval_ok"] == 1.0
    assert seen[0][-1] == 384


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_moves_to_exact_attention_and_says_so(tmp_path, attention, caplog):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    trainer = make_trainer(tmp_path, model=model, packing=True)
    assert trainer.model.config._attn_implementation == "longalign_varlen"
    assert f"Attention '{attention}' would not be exact" in caplog.text
    kept = make_trainer(tmp_path, model=tiny_llama(), packing=False)
    assert kept.model.config._attn_implementation == "sdpa"


def test_plain_arguments_are_taken(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    for args in (TrainingArguments(**options), SFTConfig(**options, max_length=99)):
        trainer = LongAlignSFTTrainer(
            tiny_llama(), args=args, train_dataset=chat_dataset(), processing_class=tiny_tokenizer()
        )
        assert isinstance(trainer.args, LongAlignSFTConfig)
        assert trainer.data_collator.target_length == 1024  # the model's range


def test_own_collator_replaces_the_options(tmp_path):
    collator = SkipPositionDataCollator(0, target_length=512, strategy="pose", skip_probability=1.0)
    trainer = make_trainer(tmp_path, data_collator=collator)
    trainer.train()
    assert trainer.data_collator is collator
    assert trainer.state.log_history[0]["skip_share"] == 1.0


def test_own_collator_packs_as_it_is_told(tmp_path):
    collator = SkipPositionDataCollator(0, target_length=512, strategy="pose", skip_probability=1.0, padding_free=True)
    trainer = make_trainer(tmp_path, packing=True, data_collator=collator)
    trainer.train()
    assert trainer.data_collator is collator
    with pytest.raises(ValueError, match="`padding_free` of the collator must be True with packed rows, got False"):
        make_trainer(tmp_path, packing=True, data_collator=SkipPositionDataCollator(0, target_length=512))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_keep_the_blocks_of_their_parts_when_they_are_given_again(tmp_path, packing):
    part = {"message": 0, "start": 3, "end": 6}
    data = Dataset.from_list([{"messages": messages, "parts": [part]} for messages in chats(4)])
    first = make_trainer(tmp_path, dataset=data)
    rows = first.train_dataset.select_columns(["input_ids", "labels", "blocks"])
    again = make_trainer(tmp_path, dataset=rows, packing=packing)
    without = make_trainer(tmp_path, dataset=rows.remove_columns("blocks"), packing=packing)
    told, kept, lost = (Counter(chain(*trainer.train_dataset["blocks"][:])) for trainer in (first, again, without))
    assert kept == told != lost


def test_a_column_of_text_that_is_called_blocks_is_not_taken_for_a_preparation(tmp_path):
    data = Dataset.from_list([{"text": "salt and wool", "blocks": "mine"}] * 4)
    rows = make_trainer(tmp_path, dataset=data).train_dataset
    assert all(set(row) == {2} for row in rows["blocks"])
    named = make_trainer(tmp_path, dataset=data.remove_columns("text"), dataset_text_field="blocks").train_dataset
    assert all(set(row) == {2} for row in named["blocks"])
    formatted = make_trainer(tmp_path, dataset=data, formatting_func=lambda row: row["blocks"]).train_dataset
    assert formatted["input_ids"][:] == named["input_ids"][:]


def test_packed_rows_keep_their_documents_when_they_are_given_again(tmp_path):
    first = make_trainer(tmp_path, packing=True, eval_dataset=chat_dataset(6))
    again = make_trainer(tmp_path, packing=True, dataset=first.train_dataset)
    assert again.train_dataset["seq_lengths"][:] == first.train_dataset["seq_lengths"][:]
    # Both `SFTTrainer.evaluate` and the call it makes for each set prepare what they are given.
    alone = first.evaluate(chat_dataset(6))["eval_loss"]
    assert first.evaluate({"a": chat_dataset(6)})["eval_a_loss"] == pytest.approx(alone, abs=1e-6)


def test_a_config_of_ones_own_is_completed(tmp_path):
    @dataclass
    class Own(SFTConfig):
        mine: int = 1

    args = Own(output_dir=str(tmp_path), bf16=False, use_cpu=True, max_length=77, mine=3)
    assert LongAlignSFTConfig.of(args, tiny_llama()).max_length == 77


def test_rows_that_leave_nothing_to_train_on_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="`max_length` must leave a target in some row of the train dataset, got none"
    ):
        make_trainer(tmp_path, max_length=2, assistant_only_loss=True)
    tokenised = [{"input_ids": [1, 2, 3], "parts": [{"message": 0, "start": 0, "end": 1}]}]
    with pytest.raises(ValueError, match="`parts` need the text they count in, got a row without `text`"):
        make_trainer(tmp_path, dataset=Dataset.from_list(tokenised))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_strategy": "skip-all"}, "`skip_strategy` must be one of .*skip_all.* got 'skip-all'"),
        ({"skip_target_length": 0}, "`skip_target_length` must be at least .* got 0"),
        ({"skip_target_length": 4096.0}, "`skip_target_length` must be a whole number, got 4096.0"),
        ({"skip_probability": 50}, "`skip_probability` must be a number from 0 to 1, got 50"),
        ({"skip_probability": "0.5"}, "`skip_probability` must be a number from 0 to 1, got '0.5'"),
        ({"skip_probability": float("nan")}, "`skip_probability` must be a number from 0 to 1, got nan"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` must be .* got 'wrapped'"),
        ({"loss_weighting": "sample"}, "`loss_weighting` must be one of token, sequence, got 'sample'"),
        ({"loss_weighting": "sequence", "loss_type": "dft"}, "weighs the negative log-likelihood"),
        ({"loss_weighting": "sequence", "average_tokens_across_devices": False}, "Set it to True"),
    ],
)
def test_bad_options_are_named_by_the_config(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LongAlignSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_target_length": 16}, "`skip_target_length` must be at least the longest sample"),
        ({"data_collator": lambda rows: rows}, "`data_collator` must be None or a SkipPositionDataCollator"),
        ({"packing": True, "max_length": None}, "`max_length` must be the length of a packed row, got None"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize("as_name", [False, True], ids=["model", "name"])
def test_a_target_past_the_range_is_refused_before_the_data_is_prepared(tmp_path, monkeypatch, as_name):
    monkeypatch.setattr(LongAlignSFTTrainer, "_prepare_dataset", lambda *args: pytest.fail("prepared"))
    model = tiny_llama()
    if as_name:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    message = (
        "`skip_target_length` must be at most 1024, the range of this 'llama' model, got 4096. "
        "Set `rope_type='yarn'` and give the model by its name"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model, skip_target_length=4096)
    if as_name:  # the remedy
        monkeypatch.undo()
        trainer = make_trainer(tmp_path, model=model, skip_target_length=4096, rope_type="yarn")
        assert trainer.data_collator.target_length == 4096
    collator = SkipPositionDataCollator(0, target_length=4096)
    with pytest.raises(ValueError, match="`target_length` must be at most 1024"):
        make_trainer(tmp_path, model=model, data_collator=collator)


def test_the_signature_is_trls_in_full():
    own, theirs = (inspect.signature(trainer.__init__).parameters for trainer in (LongAlignSFTTrainer, SFTTrainer))
    assert [(each.name, each.kind, each.default) for each in own.values()] == [
        (each.name, each.kind, each.default) for each in theirs.values()
    ]


def test_positional_arguments_are_taken(tmp_path):
    args = make_trainer(tmp_path).args
    trainer = LongAlignSFTTrainer(tiny_llama(), args, None, chat_dataset(), chat_dataset(4), tiny_tokenizer())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_collator_inside_trl_and_transformers(tmp_path):
    options = {"output_dir": str(tmp_path), "max_steps": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1}
    collator = SkipPositionDataCollator(tiny_tokenizer(), target_length=1024, skip_probability=1.0)
    trainer = SFTTrainer(
        tiny_llama(),
        args=SFTConfig(**options, bf16=False, assistant_only_loss=True),
        data_collator=collator,
        train_dataset=chat_dataset(),
        processing_class=tiny_tokenizer(),
    )
    assert next(iter(trainer.get_train_dataloader()))["position_ids"].max() > 200
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_packed_rows_without_a_target_are_left_out_and_named(tmp_path, caplog):
    rows = chat_dataset(4, turns=1).to_list()
    long = [{"messages": [{"role": "user", "content": "salt " * 200}, {"role": "assistant", "content": "tin"}]}]
    data = Dataset.from_list(rows + long)
    with caplog.at_level("WARNING", "hf_longalign"):
        trainer = make_trainer(tmp_path, dataset=data, packing=True, max_length=100, assistant_only_loss=True)
    assert "1 of 5 rows of the train dataset have no target within `max_length`" in caplog.text
    assert sum(len(lengths) for lengths in trainer.train_dataset["seq_lengths"]) == 4


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_labels_are_labels(tmp_path, packing):
    trainer = make_trainer(tmp_path, packing=packing, assistant_only_loss=True)
    tokenizer = trainer.processing_class
    for row in trainer.train_dataset:
        labels = np.array(row["labels"])
        targets = labels != -100
        assert (labels[targets] == np.array(row["input_ids"])[targets]).all()
        assert " sold " in tokenizer.decode(labels[targets])
        assert len(row["blocks"]) == len(labels)


@pytest.mark.parametrize(
    ("options", "collator"),
    [
        ({}, DataCollatorForLanguageModeling(pad_token_id=0)),
        ({}, DataCollatorForSeq2Seq(tiny_tokenizer())),
        ({"packing": True}, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)),
        ({"loss_weighting": "sequence"}, DataCollatorForLanguageModeling(pad_token_id=0)),
        ({}, SkipPositionDataCollator(0, target_length=512, strategy="pose", skip_probability=1.0)),
    ],
    ids=["TRL's", "transformers'", "TRL's packed", "sequence", "another of ours"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
def test_another_collator_may_take_the_place_of_ours(tmp_path, options, collator, streamed):
    data = chat_dataset().to_iterable_dataset() if streamed else chat_dataset()
    trainer = make_trainer(tmp_path, dataset=data, eval_dataset=chat_dataset(4), save_strategy="steps", **options)
    trainer.data_collator = collator
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss"] < 10
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}, {}])
def test_without_skips_the_losses_are_those_of_trl(tmp_path, options):
    ours = make_trainer(tmp_path, skip_strategy="none", max_steps=4, **options)
    ours.train()
    given = {name: getattr(ours.args, name) for name in ("learning_rate", "max_steps", "max_length", "logging_steps")}
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        **{"gradient_checkpointing": False, "per_device_train_batch_size": 2, **given, **options},
    )
    model = tiny_llama(attn_implementation="eager")
    theirs = SFTTrainer(model, args, train_dataset=chat_dataset(), processing_class=tiny_tokenizer())
    theirs.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def unmarked_tokenizer():
    tokenizer = tiny_tokenizer()
    for mark in ("{% generation %}", "{% endgeneration %}"):
        tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    return tokenizer


@pytest.mark.parametrize("strategy", ["skip_all", "none", "pose"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_answers_are_found_without_the_templates_marks(tmp_path, strategy, packing, caplog):
    options = {"assistant_only_loss": True, "packing": packing, "skip_strategy": strategy, "max_length": 128}
    data = {"dataset": chat_dataset(), "eval_dataset": chat_dataset(4)}
    marked = make_trainer(tmp_path, **data, **options)
    assert "marks no answers" not in caplog.text
    # As in the README: the model by its name, and no tokenizer.
    tiny_llama().save_pretrained(tmp_path / "model")
    unmarked_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, model=str(tmp_path / "model"), processing_class=None, **data, **options)
    assert "marks no answers with `{% generation %}`" in caplog.text
    assert trainer.args.assistant_only_loss
    for name in ("train_dataset", "eval_dataset"):
        assert getattr(trainer, name)["labels"][:] == getattr(marked, name)["labels"][:]
    trainer.train()
    assert trainer.evaluate(chat_dataset(4))["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


def test_data_without_conversations_is_refused_as_trl_refuses_it(tmp_path):
    data = Dataset.from_list([{"text": "Ardel sold salt."}])
    with pytest.raises(ValueError, match="the dataset is not conversational"):
        make_trainer(tmp_path, dataset=data, assistant_only_loss=True, processing_class=unmarked_tokenizer())


def test_reasoning_chats_are_skipped_at_their_turns(tmp_path):
    thought = "<think>a rather long thought</think>"
    rows = [[{**m, "content": thought * (m["role"] == "assistant") + m["content"]} for m in row] for row in chats(8)]
    data = Dataset.from_list([{"messages": messages} for messages in rows])
    tokenizer = chat_tokenizer(THINKING)  # drops the first thought
    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = make_trainer(tmp_path, model=model, dataset=data, processing_class=tokenizer, skip_strategy="skip_all")
    seen = set()
    for batch in trainer.get_train_dataloader():
        for input_ids, _, positions in documents_of(batch):
            for place in (positions.diff() > 1).nonzero().flatten().tolist():
                before = tokenizer.decode(input_ids[: place + 1])
                seen.add((before.count("<|start|>"), before.endswith(("assistant\n", "<|end|>\n"))))
    assert seen == {(2, True), (4, True)}


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_padding_of_packed_rows_is_not_in_the_routers_loss(tmp_path, weighting):
    def run(**options):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            sliding_window=None,
            max_position_embeddings=1024,
            output_router_logits=True,
            router_aux_loss_coef=1.0,
        )
        trainer = make_trainer(
            tmp_path,
            model=MixtralForCausalLM(config),
            packing=True,
            max_length=120,
            loss_weighting=weighting,
            eval_dataset=chat_dataset(4),
            **options,
        )
        before = trainer.evaluate()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [before["eval_aux_loss"], *(log["aux_loss"] for log in logs), *(log["loss"] for log in logs)]

    batch = next(
        iter(make_trainer(tmp_path, packing=True, max_length=120, pad_to_multiple_of=256).get_train_dataloader())
    )
    assert (batch["input_ids"] == 0).sum() > 50
    assert run(pad_to_multiple_of=256) == pytest.approx(run(), abs=1e-4)
