"""`SkipPositionCallback`: new positions every epoch and a preflight before the first step, in any `Trainer`."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longalign.collator import SkipPositionDataCollator
from hf_longalign.preflight import run_preflight


logger = logging.getLogger(__name__)


class SkipPositionCallback(TrainerCallback):
    """Sets the epoch on a collator and proves the attention right before training begins.

    Args:
        collator: the collator of the training data, the very object handed to the trainer.
        preflight: whether to run [`~hf_longalign.preflight.run_preflight`] before the first step.

    Example:

    ```python
    collator = SkipPositionDataCollator(tokenizer, target_length=32768)
    callback = SkipPositionCallback(collator)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=dataset, callbacks=[callback])
    ```
    """

    def __init__(self, collator: SkipPositionDataCollator, preflight: bool = True) -> None:
        self.collator = collator
        self.preflight = preflight
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the preflight, on every process, and find out at which epoch a resumed run goes on."""
        # 1.5 after a resume in the middle of the second epoch, 2.0 after one at its end.
        self._epoch = int(state.epoch or 0)
        if not self.preflight:
            return
        parallelism = getattr(args, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            logger.warning("No preflight: under context or sequence parallelism a process sees parts of a batch only.")
            return
        run_preflight(kwargs["model"], self.collator, args.device)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw new positions; the trainer opens the epoch's dataloader after this."""
        # Counted, for `state.epoch` stays below 1 in every pass over a data set of unknown length.
        self.collator.set_epoch(self._epoch)
        self._epoch += 1
