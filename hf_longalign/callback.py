"""`SkipPositionCallback`: new positions every epoch and a preflight before the first step, in any `Trainer`."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longalign.collator import SkipPositionDataCollator
from hf_longalign.loss import zero_without_targets
from hf_longalign.preflight import run_preflight
from hf_longalign.probe import LogProbs


logger = logging.getLogger(__name__)


def check_parallelism(*, whole_rows: bool, n_gpu: int = 1) -> None:
    """Refuse, before the first step, to cut rows over devices where training would not be exact.

    Args:
        whole_rows: whether rows are packed, skip positions or weigh as wholes.
        n_gpu: GPUs that this one process trains on, as `TrainingArguments.n_gpu` counts them: 1 where a
            `device_map` lays the layers on several. TRL's trainers refuse more themselves.

    Raises:
        ValueError: names the setting of accelerate.
    """
    if n_gpu > 1 and whole_rows:
        # `DataParallel` cuts every tensor of a batch into as many parts, `cu_seq_lens_q` too: flash attention would
        # take the first half of the boundaries for all of them, without a word.
        raise ValueError(
            f"`n_gpu` must be 1 with packed rows, skipped positions or loss_weighting='sequence', got {n_gpu}: "
            "several GPUs in one process share out the document boundaries like rows. Start one process per GPU, "
            f"`accelerate launch --num_processes {n_gpu} …`, or set CUDA_VISIBLE_DEVICES=0."
        )
    # Not `args.parallelism_config`, which stays None where accelerate's own YAML asks for it.
    parallelism = AcceleratorState().parallelism_config
    if parallelism is None:
        return
    if parallelism.sp_enabled:
        # The loss is right, the gradients are not; in TRL's own trainer too.
        raise ValueError(
            f"`sp_size` must be 1, got {parallelism.sp_size}: sequence parallelism makes gradients as many times too "
            "large, in every version tried (up to transformers 5.24, accelerate 1.15 and DeepSpeed 0.19). Take it out "
            "of the parallelism config; FSDP2 and DeepSpeed ZeRO share memory exactly."
        )
    if parallelism.cp_enabled and whole_rows:
        raise ValueError(
            "`cp_size` must be 1 with packed rows, skipped positions or loss_weighting='sequence', got "
            f"{parallelism.cp_size}: context parallelism drops the mask and cuts the rows. Take it out of the "
            "parallelism config (a skipped row is short), or set packing=False, skip_strategy='none' and "
            "loss_weighting='token'."
        )


def check_adapter(model: Any) -> None:
    """Refuse, before the first step, an adapter on layers that tensor parallelism cuts by rows.

    PEFT cuts their input a second time: not where nothing is learned, as in the preflight, but in the first step.

    Raises:
        ValueError: names the layers.
    """
    plans: dict[str | None, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            plans[getattr(module.get_base_layer(), "_hf_tp_plan", None)].add(name.rpartition(".")[2])
    if plans["rowwise"]:
        raise ValueError(
            "`target_modules` of the adapter must leave out what tensor parallelism cuts by rows, got "
            f"{sorted(plans['rowwise'])}. Set them to {sorted(plans['colwise']) or ['q_proj', 'k_proj', 'v_proj']}, "
            "or share memory by FSDP2 or ZeRO-3."
        )


@dataclass(eq=False)
class SkipPositionCallback(TrainerCallback):
    """Sets the epoch on a collator and proves the attention right before training begins.

    Args:
        collator: the collator of the training data, the very object handed to the trainer.
        preflight: whether to run [`~hf_longalign.preflight.run_preflight`] before the first step.
        log_probs: how training computes its loss, where that is not by the model's own logits; see `run_preflight`.

    Example:

    ```python
    collator = SkipPositionDataCollator(tokenizer, target_length=32768)
    callback = SkipPositionCallback(collator)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=dataset, callbacks=[callback])
    ```
    """

    collator: SkipPositionDataCollator
    preflight: bool = True
    log_probs: LogProbs | None = None
    _epoch: int = field(default=0, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the preflight, on every process, and find out at which epoch a resumed run goes on."""
        # 1.5 after a resume in the middle of the second epoch, 2.0 after one at its end.
        self._epoch = int(state.epoch or 0)
        check_parallelism(whole_rows=self.collator.strategy != "none" or self.collator.padding_free, n_gpu=args.n_gpu)
        check_adapter(kwargs["model"])
        if self.preflight:
            pads = args.per_device_train_batch_size > 1 or bool(self.collator.pad_to_multiple_of)
            pads = pads or (args.eval_strategy != "no" and args.per_device_eval_batch_size > 1)
            run_preflight(kwargs["model"], self.collator, args.device, log_probs=self.log_probs, pads=pads)
        base = kwargs["model"].get_base_model() if is_peft_model(kwargs["model"]) else kwargs["model"]
        # An earlier `train` may have wrapped it already.
        if self.log_probs is None and not hasattr(base.loss_function, "__wrapped__"):
            # One step of nothing but rows without a target would make every weight NaN.
            base.loss_function = zero_without_targets(base.loss_function)

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Draw new positions; the trainer opens the epoch's dataloader after this."""
        # Counted, for `state.epoch` stays below 1 in every pass over a data set of unknown length.
        self.collator.set_epoch(self._epoch)
        self._epoch += 1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Say how many rows trained nothing."""
        if self.collator.idle_rows:
            logger.warning("%d rows of the run had no target and trained nothing.", self.collator.idle_rows)


class StreamCount(TrainerCallback):
    """Says of a streamed data set at the end of training what of one at hand is said before it.

    It is called with the flags of each row that is read and returns the last: whether the row stays.

    Args:
        messages: what to say of the rows without a flag, one for each.
    """

    def __init__(self, messages: Iterable[str]) -> None:
        self._messages = tuple(messages)
        # Rows read, then those without each flag; in shared memory, for the workers of a dataloader read the stream.
        self._counts = torch.zeros(1 + len(self._messages), dtype=torch.int64).share_memory_()

    def __call__(self, *flags: bool) -> bool:
        """Count a row."""
        missing = torch.tensor([not flag for flag in flags])
        for told, new, message in zip(self._counts[1:], missing, self._messages, strict=True):
            if new and not told:
                logger.warning("Rows of a streamed dataset %s", message)
        self._counts[0] += 1
        self._counts[1:] += missing
        return flags[-1]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew: libraries read the first row to know the columns."""
        self._counts.zero_()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how many rows were read, and how many of them were not as they should be."""
        total, *counts = self._counts.tolist()
        for count, message in zip(counts, self._messages, strict=True):
            if count:
                logger.warning("%d of %d rows read of streamed datasets %s", count, total, message)
