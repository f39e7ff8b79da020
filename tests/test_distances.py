"""The loss of stretched rows is that of each row alone at its positions, and every run is asked the same."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainer import make_trainer
from tiny import chat_dataset, chats, tiny_llama, tiny_tokenizer
from trl import TrlParser

from hf_longalign import LongAlignSFTConfig
from hf_longalign.cli import main
from hf_longalign.distances import copy_rows, first_documents, stretched_positions
from hf_longalign.positions import document_rng
from hf_longalign.rope import doubles
from hf_longalign.run_record import load_record


DISTANCES = [256, 1024]
WATCHED = {"eval_distances": DISTANCES}


def naive_positions(blocks, length, ids):
    """The blocks one after the other, each begun later by its gap: cuts of the room at sorted uniform numbers."""
    rng = document_rng(ids, seed=0, epoch=0)
    rng.random()  # whether it is skipped at all
    room = length - sum(blocks)
    cuts = [0, *(int(cut * room) for cut in sorted(rng.random(len(blocks) - 2))), room]
    positions, begin = [], 0
    for index, tokens in enumerate(blocks):
        positions += range(begin + cuts[index], begin + cuts[index] + tokens)
        begin += tokens
    return np.array(positions)


def naive_loss(trainer, distance, rows=None):
    """Each row by itself, with its positions and a mask of ones, eager attention, all targets weighed alike."""
    model = tiny_llama()
    model.load_state_dict(trainer.model.state_dict())
    model.set_attn_implementation("eager")
    total = targets = 0
    for row in trainer.distances.rows["eval"] if rows is None else rows:
        ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
        runs = np.split(row["blocks"], np.flatnonzero(np.diff(row["blocks"])) + 1)
        places = torch.from_numpy(naive_positions([run.size for run in runs], distance, row["input_ids"]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        targets += (labels[0, 1:] != -100).sum().item()
    return total / targets


@pytest.mark.parametrize("blocks", [[3, 2], [4, 1, 5, 2], [1] * 12])
def test_rows_reach_the_length_and_blocks_stay_whole(blocks):
    places = stretched_positions(blocks, 100, np.random.default_rng(3))
    assert places[0] == 0
    assert places[-1] == 99
    inside = np.ones(sum(blocks) - 1, dtype=bool)
    inside[np.cumsum(blocks)[:-1] - 1] = False
    assert (np.diff(places)[inside] == 1).all()
    assert (np.diff(places) >= 1).all()


def test_plain_text_is_cut_in_the_middle_and_gaps_grow_in_proportion():
    assert stretched_positions([4], 10, np.random.default_rng(0)).tolist() == [0, 1, 8, 9]
    near, far = (stretched_positions([2] * 5, length, np.random.default_rng(1)) for length in (110, 1010))
    shifts = np.stack([near, far]) - np.arange(10)
    assert (np.abs(shifts[1] - 10 * shifts[0]) <= 10).all()


@pytest.mark.parametrize(
    ("columns", "cuts"),
    [
        ({"labels": [-100] * 6 + [7, 8]}, [3]),
        ({"labels": [-100, -100, 1, -100, -100, 2, 3, 4]}, [3]),
        ({"labels": [-100] * 6 + [7, 8], "blocks": [0, 0, 1, 1, 0, 0, 3, 3]}, [2, 4]),
        ({"labels": [-100] * 6 + [7, 8], "block_lengths": [1, 5, 2]}, [1]),
        ({}, [4]),
    ],
)
def test_a_response_stays_behind_what_it_answers(columns, cuts):
    (row,) = first_documents([{"input_ids": list(range(8)), **columns}], 4)
    assert (np.flatnonzero(np.diff(row["blocks"])) + 1).tolist() == cuts


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_each_row_alone(tmp_path, packing):
    model = tiny_llama(initializer_range=0.3)
    trainer = make_trainer(tmp_path, model=model, eval_dataset=chat_dataset(8), packing=packing, **WATCHED)
    metrics = trainer.evaluate()
    expected = [naive_loss(trainer, distance) for distance in DISTANCES]
    assert abs(expected[0] - expected[1]) > 1e-3
    for distance, loss in zip(DISTANCES, expected, strict=True):
        assert metrics[f"eval_loss_at_{distance}"] == pytest.approx(loss, abs=1e-4)
        copied = naive_loss(trainer, distance, copy_rows(trainer.distances.rows["eval"]))
        assert metrics[f"eval_copy_loss_at_{distance}"] == pytest.approx(copied, abs=1e-4)


def test_what_is_copied_is_told_by_nothing_else():
    rows = [{"input_ids": np.arange(first, first + 90)} for first in (0, 500)]
    for row, given in zip(copy_rows(rows), rows, strict=True):
        once, again = np.split(row["input_ids"], 2)
        assert np.array_equal(once, again) and once.size == 48
        assert len({*once} & {*given["input_ids"]}) == 48 and (np.diff(once) != 1).sum() > 40
        assert np.array_equal(np.flatnonzero(row["labels"] != -100), np.arange(49, 96))
        assert np.array_equal(row["labels"][49:], again[1:])
        assert np.array_equal(row["blocks"], [0] * 48 + [1] * 48)


def test_every_run_is_asked_the_same(tmp_path):
    """Whatever the strategy, the seed, the batch and the packing: the same model has the same losses."""
    runs = [
        {},
        {"skip_strategy": "none"},
        {"skip_strategy": "pose", "seed": 7, "skip_target_length": 512},
        {"per_device_eval_batch_size": 1, "packing": True, "shuffle_dataset": True},
    ]
    found = []
    for options in runs:
        model = tiny_llama(initializer_range=0.3)
        trainer = make_trainer(tmp_path, model=model, eval_dataset=chat_dataset(8), **WATCHED, **options)
        found.append([trainer.evaluate()[f"eval_loss_at_{distance}"] for distance in DISTANCES])
    np.testing.assert_allclose(found, [found[0]] * len(runs), atol=1e-5)


def test_other_rows_are_measured_where_they_are_given(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"a": chat_dataset(4), "b": chat_dataset(4, turns=1)}, **WATCHED)
    both = trainer.evaluate()
    assert {"eval_a_loss_at_256", "eval_b_loss_at_1024"} <= set(both)
    other = trainer.evaluate(chat_dataset(4, turns=1))
    assert other["eval_loss_at_256"] == pytest.approx(both["eval_b_loss_at_256"], abs=1e-6)
    losses = {name: loss for name, loss in both.items() if "loss" in name}
    again = trainer.evaluate()
    assert {name: again[name] for name in losses} == pytest.approx(losses)  # no row is forgotten
    assert list(trainer.distances.rows) == ["a", "b"]  # nor kept, to be taken for those of a run
    assert trainer.evaluate("a")["eval_loss_at_256"] == pytest.approx(both["eval_a_loss_at_256"])
    assert "test_loss_at_256" not in trainer.predict(trainer.eval_dataset["a"]).metrics


def test_the_best_checkpoint_the_log_the_record_and_the_card(tmp_path):
    best = {"metric_for_best_model": "eval_loss_at_1024", "load_best_model_at_end": True, "save_strategy": "steps"}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    # It learns, and is then torn apart: the best is in the middle.
    rates = {"lr_scheduler_type": "constant", "learning_rate": 0.05}
    rows = chat_dataset(8)
    trainer = make_trainer(tmp_path, eval_dataset=rows, peft_config=lora, **WATCHED, **best, **steps, **rates)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss_at_1024" in log]
    assert [log["step"] for log in logs] == [0, 1, 2, 3, 3]
    losses = [log["eval_loss_at_1024"] for log in logs]
    assert trainer.state.best_metric == min(losses[1:4])
    assert losses[4] == pytest.approx(min(losses[1:4]), abs=1e-5)
    trainer.save_model(str(tmp_path))
    record = load_record(tmp_path).distances
    assert (record.lengths, record.rows) == (DISTANCES, 8)
    assert record.before == pytest.approx([logs[0][f"eval_loss_at_{distance}"] for distance in DISTANCES], abs=1e-5)
    assert record.after == pytest.approx([logs[4][f"eval_loss_at_{distance}"] for distance in DISTANCES], abs=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert f"| before training | {record.before[0]:.3f} | {record.before[1]:.3f} |" in card
    assert "![Loss by distance](assets/distances.png)" in card
    assert (tmp_path / "assets" / "distances.png").is_file()


@pytest.mark.parametrize(("largest", "level"), [(0.0, "WARNING"), (1.0, "INFO")])
def test_their_share_of_the_training_time_is_told(tmp_path, monkeypatch, caplog, largest, level):
    monkeypatch.setattr("hf_longalign.distances.LARGEST_SHARE", largest)
    trainer = make_trainer(tmp_path, eval_dataset=chat_dataset(4), max_steps=1, **WATCHED)
    with caplog.at_level("INFO", logger="hf_longalign.distances"):
        trainer.train()
    (told,) = [record for record in caplog.records if "of the training time" in record.message]
    assert told.levelname == level and f"The losses at {len(DISTANCES)} distances took" in told.message


def test_a_resumed_run_knows_its_base(tmp_path):
    options = {"eval_dataset": chat_dataset(4), "save_strategy": "steps", "save_steps": 1, **WATCHED}
    first = make_trainer(tmp_path, **options)
    first.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.training_record().distances == first.training_record().distances


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_distances": [16]}, "`eval_distances` must be at least the longest evaluation row, "),
        ({"eval_distances": [2048]}, "`eval_distances` must be at most 1024, the range of this"),
        ({"eval_distances": [256], "eval_dataset": None}, "`eval_distances` needs evaluation rows"),
        ({"eval_distances": [0]}, "`eval_distances` must be at least"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{"eval_dataset": chat_dataset(4), **options})


def test_distances_past_the_range_are_asked_of_a_scaled_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    scaled = {"rope_type": "yarn", "skip_target_length": 2048, "eval_distances": [2048]}
    trainer = make_trainer(tmp_path, model=str(tmp_path / "base"), eval_dataset=chat_dataset(4), **scaled)
    assert trainer.evaluate()["eval_loss_at_2048"] > 0


def test_documents_are_found_in_any_rows():
    rows = [
        {"input_ids": [1, 2], "labels": [1, -100]},
        {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3], "block_lengths": [1, 1, 1, 2]},
        {"input_ids": [6, 7, 8], "attention_mask": [0, 1, 1]},
    ]
    found = [{name: values.tolist() for name, values in row.items()} for row in first_documents(rows, 9)]
    assert found == [
        {"input_ids": [1, 2], "labels": [1, 2], "blocks": [0, 1]},
        {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "blocks": [0, 1, 1]},
        {"input_ids": [7, 8], "labels": [7, 8], "blocks": [0, 1]},
    ]
    assert len(first_documents(rows, 1)) == 1


def test_block_lengths_count_no_padding():
    """As the collator reads them: what the mask hides is taken out before anything else."""
    row = {"input_ids": [9, 1, 2, 3], "attention_mask": [0, 1, 1, 1], "block_lengths": [2, 1]}
    (found,) = first_documents([row], 1)
    assert found["input_ids"].tolist() == [1, 2, 3] and np.diff(found["blocks"]).tolist() == [1, 0]


def test_the_command_line_takes_a_list():
    words = ["--output_dir", "out", "--eval_distances", "4096", "16384", "--bf16", "false"]
    (config,) = TrlParser(LongAlignSFTConfig).parse_args_and_config(words)
    assert config.eval_distances == [4096, 16384]


def test_reach_draws_the_curve_without_training(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats(6)))
    common = ["reach", str(tmp_path / "model"), "--dataset", str(data), "--output_dir", str(out), "--rows", "4"]
    assert main([*common, "--max_length", "256", "--dtype", "float32"]) == 0
    found = json.loads((out / "reach.json").read_text())
    assert (found["rows"], found["lengths"]) == (4, [256, 512, 1024])
    told = capsys.readouterr().out
    assert f"{found['losses'][2]:.4f}" in told and f"copying {found['copy_losses'][2]:7.4f}" in told
    assert (out / "reach.png").is_file()
    for seconds, rows in ((60.0, 6), (0.0, 4)):  # as many as a minute allows, of the six that there are
        monkeypatch.setattr("hf_longalign.commands.reach.SECONDS", seconds)
        assert main([*common[:-2], "--distances", "256", "--dtype", "float32"]) == 0
        assert json.loads((out / "reach.json").read_text())["rows"] == rows
    capsys.readouterr()
    assert main([*common, "--distances", "4096"]) == 1
    refusal = capsys.readouterr().err
    assert "`distances` must be at most 1024" in refusal and "Set `--rope_type yarn`, or lower" in refusal
    assert main([*common, "--distances", "256", "4096", "--rope_type", "yarn", "--dtype", "float32"]) == 0
    assert json.loads((out / "reach.json").read_text())["lengths"] == [256, 4096]
    with pytest.raises(SystemExit):
        main([*common, "--rope_type", "yarn"])
    assert main([*common, "--split", "tset"]) == 1
    assert "`split` must be one of ['train'], got 'tset'" in capsys.readouterr().err
    (tmp_path / "rows").mkdir()
    data.rename(tmp_path / "rows" / "test.jsonl")  # a data set without a train split
    common[3] = str(tmp_path / "rows")
    assert main([*common, "--distances", "256", "--dtype", "float32"]) == 0
    assert doubles(300, 5000) == [512, 1024, 2048, 4096]


def test_reach_takes_whole_models_alone(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats(2)))
    adapter = tmp_path / "my adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for model, refusal in (
        (tmp_path / "gone", "`model` must be a folder or a Hub id, got"),
        (adapter, f"got '{adapter}', which is an adapter. Run `hf-longalign merge '{adapter}' merged`"),
        (tmp_path, "which has no config.json. Give"),
    ):
        assert main(["reach", str(model), "--dataset", str(rows)]) == 1
        assert refusal in capsys.readouterr().err


def test_plain_text_is_stretched_too(tmp_path):
    rows = Dataset.from_list([{"text": "Ardel sold salt. " * 4}] * 4)
    trainer = make_trainer(tmp_path, dataset=rows, eval_dataset=rows, skip_strategy="pose", **WATCHED)
    assert trainer.evaluate()["eval_loss_at_1024"] > 0
