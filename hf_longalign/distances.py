"""Loss against distance: short rows whose blocks are moved apart until their relative distances reach a length.

A short forward pass asks what would cost a long one. Where the blocks go depends on the content of a row and on the
length alone: not on the strategy, the seed, the batch or the process, so that any two runs are asked the same.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longalign.attention import mark_boundaries
from hf_longalign.blocks import IGNORE, Blocks, blocks_from_column, blocks_to_column
from hf_longalign.collator import SkipPositionDataCollator, flatten_rows
from hf_longalign.loss import fused_log_probs
from hf_longalign.positions import document_rng
from hf_longalign.probe import eval_mode
from hf_longalign.publishing import PublishingSFTTrainer
from hf_longalign.records.training import DistancesRecord
from hf_longalign.rope import check_range


logger = logging.getLogger(__name__)

# Tokens that are to be copied: few, so that the distance is that between the copies.
COPIED = 48
# Share of the training time above which the user is told.
LARGEST_SHARE = 0.05


def stretched_positions(block_lengths: ArrayLike, length: int, rng: np.random.Generator) -> np.ndarray:
    """Move the blocks of a row apart, so that it begins at position 0 and ends at `length - 1`.

    The gaps are a uniform random split of the room between the blocks; from one length to another they grow in
    proportion. Inside a block there is none. A row of one block (plain text) is cut in the middle.

    Args:
        block_lengths: int `(blocks,)`, adding up to n tokens.
        length: number of positions, at least n.
        rng: see [`~hf_longalign.positions.document_rng`].

    Returns:
        int64 `(n,)`, strictly increasing.

    Example:

    >>> stretched_positions([3, 2], 16, np.random.default_rng(0))
    array([ 0,  1,  2, 14, 15])
    """
    lengths = np.asarray(block_lengths, dtype=np.int64)
    total = int(lengths.sum())
    if lengths.size == 1:
        lengths = np.array([total // 2, total - total // 2])
    room = length - total
    shifts = np.floor(np.sort(rng.random(lengths.size - 2)) * room).astype(np.int64)
    return np.arange(total) + np.repeat(np.concatenate(([0], shifts, [room])), lengths)


def first_documents(dataset: Any, count: int) -> list[dict[str, np.ndarray]]:
    """Return the first documents that have a target: `input_ids`, `labels` and `blocks`, where a row may be cut.

    A response and what it answers are one block: apart, a model would be asked to go on with nothing near, which no
    long text does, and fail at any distance. Without another boundary what the first block holds is cut in the middle.

    Args:
        dataset: tokenised rows, packed or not, as [`SkipPositionDataCollator`] takes them.
        count: how many at most.
    """
    found: list[dict[str, np.ndarray]] = []
    for row in dataset:
        if not len(row["input_ids"]):  # of rows that nobody has prepared
            continue
        flat: Any = flatten_rows([row], with_blocks=True)
        columns = (flat.input_ids, flat.labels, blocks_to_column(flat.blocks))
        documents = zip(*(np.split(column, np.cumsum(flat.seq_lengths)[:-1]) for column in columns), strict=True)
        for ids, labels, blocks in documents:
            if (labels[1:] != IGNORE).any():
                found.append({"input_ids": ids, "labels": labels, "blocks": _joined(blocks_from_column(blocks))})
            if len(found) == count:
                return found
    return found


def _joined(blocks: Blocks) -> np.ndarray:
    """One number per token, int `(n,)`, that changes where a row may be cut: at blocks, but before no response."""
    starts = (np.cumsum(blocks.lengths) - blocks.lengths)[~blocks.response]
    cuts = starts[starts > 0] if (starts > 0).any() else [max(1, blocks.lengths[0] // 2)]
    changes = np.zeros(blocks.lengths.sum(), dtype=int)
    changes[cuts] = 1
    return np.cumsum(changes) % 2


def copy_rows(rows: Sequence[dict[str, np.ndarray]], tokens: int = COPIED) -> list[dict[str, np.ndarray]]:
    """Return rows that can only be copied: some tokens of each row in random order, and then the same once more.

    Nothing but the first copy tells the second one, so its loss says whether a model finds what stands at a distance.
    The loss of text falls too where a model learns how answers look, or what they mostly say.

    Args:
        rows: as [`first_documents`] returns them.
        tokens: of a copy, at most.

    Example:

    >>> copy_rows([{"input_ids": np.array([5, 6, 7, 8])}], 3)[0]["input_ids"]
    array([5, 6, 8, 5, 6, 8])
    """
    found = []
    for row in rows:
        once = document_rng(row["input_ids"], seed=0, epoch=0).permutation(row["input_ids"])[:tokens]
        # The first token of the second copy is predicted from the last one of the first: from nothing near it.
        labels = np.concatenate([np.full(once.size + 1, IGNORE), once[1:]])
        found.append({"input_ids": np.tile(once, 2), "labels": labels, "blocks": np.repeat([0, 1], once.size)})
    return found


def check_distances(distances: Sequence[int], rows: Sequence[dict[str, np.ndarray]], config: PretrainedConfig) -> None:
    """Refuse distances that the rows or the model cannot be asked at.

    Raises:
        ValueError: no rows, a distance below the length of a row, or one past the range of the model.
    """
    if not rows:
        raise ValueError(
            "`eval_distances` needs evaluation rows with targets, got none. Give an `eval_dataset` (`test_size` or "
            "`dataset_test_split` of the command line), or leave `eval_distances` out."
        )
    longest = max(row["input_ids"].size for row in rows)
    if min(distances) < longest:
        raise ValueError(
            f"`eval_distances` must be at least the longest evaluation row, {longest} tokens, got {min(distances)}. "
            f"Leave it out, or lower `max_length`."
        )
    check_range(config, max(distances), "eval_distances")


@dataclasses.dataclass(eq=False)
class DistanceCallback(TrainerCallback):
    """Measures the loss at each distance before the first step, at every evaluation and after the last step.

    What it finds is logged as `eval_loss_at_4096` and so on, the mean over the targets of all rows, that of
    [`copy_rows`] as `eval_copy_loss_at_4096`, and the seconds it took as `eval_distances_runtime`.

    Args:
        distances: in positions.
        collator: of the evaluation batches; its strategy is replaced.
        rows: documents by data set, as [`first_documents`] returns them.
        trainer: reads the batches, and logs what is measured.
    """

    distances: list[int]
    collator: SkipPositionDataCollator
    rows: dict[str, list[dict[str, np.ndarray]]]
    trainer: "WatchingSFTTrainer"

    def __post_init__(self) -> None:
        self.distances = sorted(set(self.distances))
        self._seconds = self._start = 0.0

    def measure(self, prefix: str, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
        """Return the loss of rows at each distance under names that begin so; every process must call it."""
        start = time.perf_counter()
        copies = copy_rows(rows, min(COPIED, self.distances[0] // 2))
        found = {
            f"{prefix}_{name}_at_{distance}": self.loss(asked, distance)
            for name, asked in (("loss", rows), ("copy_loss", copies))
            for distance in self.distances
        }
        seconds = time.perf_counter() - start
        self._seconds += seconds
        return {**found, f"{prefix}_distances_runtime": round(seconds, 4)}

    @torch.no_grad()
    def loss(self, rows: Sequence[dict[str, np.ndarray]], distance: int | None) -> float:
        """Return the mean loss over the targets of all rows, stretched to a distance; `None`: as they are."""
        state, size = PartialState(), self.trainer.args.per_device_eval_batch_size
        collator = dataclasses.replace(
            self.collator,
            strategy="none" if distance is None else stretched_positions,
            target_length=distance,  # type: ignore[arg-type]
            skip_probability=1.0,
            seed=0,
        )
        total = torch.zeros(2, dtype=torch.float64)
        # Sharded models need every process in every forward: one without rows left repeats some and counts nothing.
        for begin in range(0, len(rows), size * state.num_processes):
            own = rows[begin + state.process_index * size :][:size]
            batch = collator(own or rows[:size])
            targets = batch["labels"][:, 1:] != IGNORE
            log_probs = self.trainer.target_log_probs(batch).double().cpu()[:, -targets.shape[1] :]
            total += torch.stack([-log_probs[targets].sum(), targets.sum().double()]) * bool(own)
        # Not every device has float64.
        total = reduce(total.to(state.device, torch.float32), "sum").cpu()
        return float(total[0] / total[1])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the base, unless the run goes on from a checkpoint, whose log holds it."""
        self._start, self._seconds = time.perf_counter(), 0.0
        if state.global_step == 0 and not args.eval_on_start:
            self._log()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the model as it is saved, unless the last evaluation has."""
        measured = self._logged(state)
        # The best checkpoint may have taken the place of the last.
        if not measured or measured[-1]["step"] != state.global_step or state.best_model_checkpoint is not None:
            self._log()
        share = self._seconds / max(time.perf_counter() - self._start, 1e-9)
        logger.log(
            logging.WARNING if share > LARGEST_SHARE else logging.INFO,
            "The losses at %d distances took %.1f %% of the training time. For less, name fewer of them or "
            "evaluate less often.",
            len(self.distances),
            100 * share,
        )

    def _log(self) -> None:
        with eval_mode(self.trainer.model):
            for name, rows in self.rows.items():
                self.trainer.log(self.measure("eval" if name == "eval" else f"eval_{name}", rows))

    def _names(self) -> list[str]:
        first = next(iter(self.rows))
        return [f"eval{'' if first == 'eval' else '_' + first}_loss_at_{distance}" for distance in self.distances]

    def _logged(self, state: TrainerState) -> list[dict[str, float]]:
        return [log for log in state.log_history if self._names()[0] in log]

    def record(self, state: TrainerState) -> DistancesRecord:
        """Return what is known of the first data set: the losses before the first step, and the last ones."""
        logs = self._logged(state)
        before = next((log for log in logs if log["step"] == 0), None)
        after = next((log for log in reversed(logs) if log["step"] > 0), None)
        return DistancesRecord(
            self.distances,
            len(next(iter(self.rows.values()))),
            *([round(log[name], 6) for name in self._names()] if log else None for log in (before, after)),
        )


class WatchingSFTTrainer(PublishingSFTTrainer):
    """`SFTTrainer` whose evaluations also give the losses at `eval_distances`."""

    # Of each evaluation data set so many rows, the first ones, are stretched.
    watched_rows = 16

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.distances: DistanceCallback | None = None
        self._distance_rows: dict[str, list[dict[str, np.ndarray]]] = {}
        super().__init__(*args, **kwargs)

    def _watch_distances(self, collator: SkipPositionDataCollator) -> None:
        distances = self.args.eval_distances or []
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in datasets.items():
            if name not in self._distance_rows:  # not prepared here
                self._distance_rows[name] = first_documents(dataset or (), self.watched_rows)
            check_distances(distances, self._distance_rows[name], self.model.config)
        self.distances = DistanceCallback(distances, collator, self._distance_rows, self)
        self.add_callback(self.distances)

    def target_log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities of a batch's targets, `(batch, length - 1)` or longer."""
        batch = self._prepare_inputs(batch)
        if self.args.compiled:
            mark_boundaries(batch)
        with self.compute_loss_context_manager():
            return fused_log_probs(self._wrap_model(self.model, training=False), batch)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, at `eval_distances` too; see [`trl.SFTTrainer.evaluate`]."""
        kept = dict(self._distance_rows)
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self._distance_rows.clear()  # other rows; they are found when they are prepared
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._distance_rows.clear()
            self._distance_rows.update(kept)

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict, and add the losses at `eval_distances` to what an evaluation logs."""
        output: Any = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self.distances is not None and description == "Evaluation":
            prefix = kwargs.get("metric_key_prefix", "eval")
            rows = self._distance_rows.get(prefix.removeprefix("eval_")) or self._distance_rows.get("eval")
            rows = rows or first_documents(dataloader.dataset, self.watched_rows)
            output.metrics.update(self.distances.measure(prefix, rows))
        return output
