"""The callback in a real `Trainer`: new positions every epoch, the same ones after a resume, a preflight first."""

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from tiny import tiny_llama, tiny_tokenizer
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_longalign.callback import SkipPositionCallback, check_parallelism
from hf_longalign.collator import SkipPositionDataCollator
from hf_longalign.preflight import PreflightError


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (12,), generator=generator).tolist() for _ in range(8)]
    return [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids]


class Stream(IterableDataset):
    """The rows without a length."""

    def __iter__(self):
        return iter(rows())


class RecordingTrainer(Trainer):
    """Keeps the batches it trained on, as `(input ids, position ids)`."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append((inputs["input_ids"].tolist(), inputs["position_ids"].tolist()))
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(directory, dataset=None, target_length=1024, preflight=True, **overrides):
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "per_device_train_batch_size": 2,
            "num_train_epochs": 3,
            "save_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            **overrides,
        },
    )
    collator = SkipPositionDataCollator(tiny_tokenizer(), target_length=target_length, skip_probability=1.0)
    callback = SkipPositionCallback(collator, preflight=preflight)
    return RecordingTrainer(
        tiny_llama(),
        arguments,
        data_collator=collator,
        train_dataset=rows() if dataset is None else dataset,
        callbacks=[callback],
    )


def positions_of(batches):
    """Position ids by sample."""
    return {tuple(ids): tuple(places) for batch in batches for ids, places in zip(*batch, strict=True)}


def expected(epoch):
    collator = SkipPositionDataCollator(0, target_length=1024, skip_probability=1.0)
    collator.set_epoch(epoch)
    batch = collator(rows())
    return positions_of([(batch["input_ids"].tolist(), batch["position_ids"].tolist())])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run = trainer(directory)
    run.train()
    return run.batches, directory


def test_every_epoch_has_its_own_positions(whole):
    batches, _ = whole
    assert len(batches) == 12
    epochs = [positions_of(batches[start : start + 4]) for start in (0, 4, 8)]
    assert epochs == [expected(0), expected(1), expected(2)]
    for sample in epochs[0]:
        assert len({epoch[sample] for epoch in epochs}) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_persistent_workers_draw_the_same(whole, tmp_path, workers):
    run = trainer(tmp_path, dataloader_num_workers=workers, dataloader_persistent_workers=True, save_strategy="no")
    run.train()
    assert run.batches == whole[0]


@pytest.mark.parametrize("step", [3, 6, 9])
def test_resumed_runs_see_the_same_batches(whole, tmp_path, step):
    batches, directory = whole
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
    assert run.batches == batches[step:]


def test_resumed_at_the_end_of_an_epoch(tmp_path):
    first = trainer(tmp_path, save_steps=4)
    first.train()
    run = trainer(tmp_path, save_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert run.batches == first.batches[8:]


def test_a_second_call_begins_anew(tmp_path):
    run = trainer(tmp_path, save_strategy="no", num_train_epochs=1)
    run.train()
    run.train()
    assert positions_of(run.batches[4:]) == expected(0)


def test_a_data_set_of_unknown_length(tmp_path):
    run = trainer(tmp_path, dataset=Stream(), max_steps=12, save_strategy="no")
    run.train()
    assert [positions_of(run.batches[start : start + 4]) for start in (0, 4, 8)] == [expected(i) for i in range(3)]


def test_preflight_comes_before_the_first_step(tmp_path):
    run = trainer(tmp_path, target_length=4096)
    with pytest.raises(PreflightError, match="must be at most 1024"):
        run.train()
    assert not hasattr(run, "batches")


def test_preflight_can_be_left_out(tmp_path):
    run = trainer(tmp_path, target_length=4096, preflight=False, max_steps=1, save_strategy="no")
    run.train()
    assert len(run.batches) == 1


class CutRows(ParallelismConfig):
    """accelerate's parallelism as its YAML sets it, without the GPUs that it needs."""

    def __bool__(self):
        return False


@pytest.fixture
def cut_rows(monkeypatch):
    """Let the state of accelerate, not the arguments, hold a parallelism."""

    def cut(**sizes):
        held = property(lambda self: CutRows(**sizes), lambda self, value: None)
        monkeypatch.setattr(AcceleratorState, "parallelism_config", held, raising=False)

    return cut


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 4}])
def test_rows_cut_over_devices_are_refused_before_the_first_step(cut_rows, tmp_path, sizes):
    run = trainer(tmp_path)
    cut_rows(**sizes)
    with pytest.raises(ValueError, match=f"`{next(iter(sizes))}` must be 1.*got {next(iter(sizes.values()))}"):
        run.train()
    assert not hasattr(run, "batches")


def test_what_remains_exact_under_context_parallelism(cut_rows):
    cut_rows(cp_size=2)
    check_parallelism(whole_rows=False)
    cut_rows()
    check_parallelism(whole_rows=True)


def test_a_step_of_nothing_has_loss_0_and_leaves_the_weights(tmp_path, caplog):
    good, nothing = rows()[0], {"input_ids": [2], "labels": [2]}
    run = trainer(
        tmp_path,
        dataset=[nothing] * 2 + [good] * 2 + [good, nothing],
        max_steps=3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    run.eval_dataset = [nothing, good]
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == 0 and all(loss > 1 for loss in losses[1:])
    assert all(bool(weight.isfinite().all()) for weight in run.model.parameters())
    assert "3 rows of the run had no target and trained nothing" in caplog.text
    # The mean over what is there, not over rows.
    assert run.evaluate([nothing, good])["eval_loss"] == pytest.approx(run.evaluate([good])["eval_loss"], abs=1e-5)
    assert run.evaluate([nothing, nothing])["eval_loss"] == 0
