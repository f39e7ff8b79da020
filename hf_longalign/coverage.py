"""What the positions of a training run covered, read off its batches, on all processes and over resumes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longalign.distances import DistanceCoverage
from hf_longalign.records.training import CoverageRecord


logger = logging.getLogger(__name__)

# Batches whose positions may stay on their device until the next log, where the host waits for it anyway.
MAX_PENDING = 64
FILE_NAME = "longalign_coverage.npz"


class PositionObserver(TrainerCallback):
    """Counts the relative distances between the tokens of the documents that a run trains on.

    Processes count for themselves and add up their counts wherever the trainer is about to log or to save.

    Args:
        target_length: number of positions the run spreads its samples over.
    """

    def __init__(self, target_length: int) -> None:
        self.coverage = DistanceCoverage(target_length)
        self._local = DistanceCoverage(target_length)
        self._pending: list[dict[str, torch.Tensor]] = []

    def observe(self, inputs: dict[str, Any]) -> None:
        """Keep the positions of a collated batch: `position_ids` and `attention_mask` or `seq_idx`."""
        keys = ("position_ids", "attention_mask", "seq_idx")
        self._pending.append({key: inputs[key].detach().int() for key in keys if key in inputs})
        if len(self._pending) >= MAX_PENDING:
            self._read()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up the counts of all processes before a log or a checkpoint."""
        if control.should_log or control.should_save:
            self.gather()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up the counts of all processes, so that the record of a finished run is complete."""
        self.gather()

    def gather(self) -> None:
        """Add up what all processes have counted since the last call; every process must call it."""
        self._read()
        counts = torch.from_numpy(self._local.counts()).to(PartialState().device)
        self.coverage.add_counts(reduce(counts, "sum").cpu().numpy())
        self._local = DistanceCoverage(self.coverage.target_length)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of what was gathered since the last call; see [`DistanceCoverage.metrics`]."""
        return self.coverage.metrics()

    def state(self) -> CoverageRecord:
        """Return what the run has covered when it was last gathered."""
        return self.coverage.state()

    def save(self, directory: str | Path) -> None:
        """Write the counts that a resumed run goes on from."""
        np.savez_compressed(Path(directory) / FILE_NAME, counts=self.coverage.counts())

    def load(self, directory: str | Path) -> None:
        """Go on from the counts of a checkpoint, if it has any for this target length."""
        path = Path(directory) / FILE_NAME
        counts = np.load(path)["counts"] if path.is_file() else np.empty(0, dtype=np.int64)
        if counts.size != self.coverage.target_length + 3:
            logger.warning("%s holds no coverage of this target length; it is counted from this step on.", directory)
            return
        self.coverage = DistanceCoverage(self.coverage.target_length)
        self.coverage.add_counts(counts)
        self.coverage.metrics()  # what the next log reports begins here

    def _read(self) -> None:
        for batch in self._pending:
            for positions in _documents(batch):
                self._local.add(positions)
        self._pending.clear()


def _documents(batch: dict[str, torch.Tensor]) -> Iterator[np.ndarray]:
    positions = batch["position_ids"].cpu().numpy()
    if "seq_idx" in batch:
        starts = np.flatnonzero(np.diff(batch["seq_idx"].cpu().numpy()[0])) + 1
        yield from np.split(positions[0], starts)
    else:
        mask = batch["attention_mask"].cpu().numpy().astype(bool)
        yield from (row[kept] for row, kept in zip(positions, mask, strict=True))
