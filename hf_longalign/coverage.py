"""Which relative distances between the tokens of a document a run has trained: counted, logged, saved.

Distances are read off the batches, on all processes and over resumes.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from numpy.typing import ArrayLike
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longalign.records.training import CoverageRecord, Histogram


logger = logging.getLogger(__name__)

# Runs of contiguous positions up to which their pairs, 2,016, are looked at one by one.
MAX_RUNS = 64
BINS = 64
# Batches whose positions may stay on their device until the next log, where the host waits for it anyway.
MAX_PENDING = 64
FILE_NAME = "longalign_coverage.npz"


def summary(window: np.ndarray, run: np.ndarray) -> dict[str, Any]:
    """Say what the spans of a window are, and which distances the run has met.

    A span is the number of positions from the first of a document to its last.

    Args:
        window, run: as [`DistanceCoverage.counts`] returns them.
    """
    documents, skipped, spans = window[-3:].tolist()
    new, met = (np.flatnonzero(counts[:-3]) for counts in (window, run))
    return {
        "skip_share": skipped / max(documents, 1),
        "skip_span_mean": spans / max(documents, 1),
        # Of the largest span the largest distance is that between its ends.
        "skip_span_max": int(new[-1]) + 1 if new.size else 0,
        "skip_distance_max": int(met[-1]) if met.size else 0,
        "skip_distance_coverage": met.size / (run.size - 3),
    }


class DistanceCoverage:
    """Counts the pairs of tokens of a document at each relative distance below `target_length`, exactly.

    >>> coverage = DistanceCoverage(8)
    >>> coverage.add([0, 1, 6])
    >>> coverage.pairs.tolist()
    [3, 1, 0, 0, 0, 1, 1, 0]
    >>> coverage.metrics()["skip_distance_coverage"]
    0.5
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length
        # Second differences of the pair counts by distance; what lies past the last distance is dropped into the end.
        self._corners = np.zeros(target_length + 1, dtype=np.int64)
        self._counts = np.zeros(target_length, dtype=np.int64)
        # Twice the length, so that the autocorrelation does not wrap around.
        self._fft_size = 1 << (2 * target_length - 1).bit_length()
        self._power: np.ndarray | None = None
        # Documents, those that skip, and the sum of their spans.
        self._documents = np.zeros(3, dtype=np.int64)
        self._told = self.counts()

    def add(self, positions: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Count documents by their positions, which increase strictly within each.

        Args:
            positions: int `(tokens,)`, of one document after the other.
            lengths: int `(documents,)`, tokens of each, at least 1; `None` for one document.

        Raises:
            ValueError: positions that do not increase, or lengths that are not theirs.
        """
        array = np.asarray(positions, dtype=np.int64)
        sizes = np.array([array.size]) if lengths is None else np.asarray(lengths, dtype=np.int64)
        if not sizes.size or (sizes < 1).any() or sizes.sum() != array.size:
            raise ValueError(
                f"`lengths` must be at least 1 and add up to all positions, got {sizes.tolist()} for {array.size}. "
                "Leave empty documents out."
            )
        ends = np.cumsum(sizes)
        steps = np.diff(array, append=0)
        steps[ends - 1] = 0  # a document ends here
        if (np.delete(steps, ends - 1) < 1).any():
            raise ValueError(
                f"`positions` must increase strictly within each document, got {positions!r}. Give its `lengths`."
            )
        # Runs of contiguous positions, by their first and last position.
        breaks = np.flatnonzero(steps != 1)
        last, first = array[breaks], array[np.append(0, breaks[:-1] + 1)]
        document = np.searchsorted(ends, breaks, side="right")
        runs, spans = np.bincount(document), array[ends - 1] - array[ends - sizes] + 1
        # m runs cost O(m^2): two runs give a trapezoid over the distances, kept as its four corners. In RandPos nearly
        # every token is a run; there one FFT over the target length (4 ms for 131,072) costs less.
        dense = (runs > MAX_RUNS) & (spans <= self.target_length)
        for index in np.flatnonzero(dense):
            occupied = np.zeros(self.target_length)
            places = array[ends[index] - sizes[index] : ends[index]]
            occupied[places - places[0]] = 1
            # Power spectra add up, so the way back is taken once, when the counts are asked for.
            spectrum = np.fft.rfft(occupied, self._fft_size)
            power = spectrum.real**2 + spectrum.imag**2
            self._power = power if self._power is None else self._power + power
        sparse = ~dense[document]
        self._add_runs(first[sparse], last[sparse], document[sparse])
        self._documents += (sizes.size, (runs > 1).sum(), spans.sum())

    def _add_runs(self, first: np.ndarray, last: np.ndarray, document: np.ndarray) -> None:
        """Count the pairs of tokens of each document by its runs, and by every two of them."""
        lengths = last - first + 1
        # Inside a run: as many pairs at distance 0 as tokens, one less with each step.
        self._corners[0] += lengths.sum()
        self._corners[1] -= (lengths + 1).sum()
        self._turn(lengths + 1, 1)
        for apart in range(1, len(document)):
            i = np.flatnonzero(document[apart:] == document[:-apart])
            if not i.size:
                break
            j = i + apart
            self._turn(np.concatenate((first[j] - last[i], last[j] - first[i] + 2)), 1)
            self._turn(np.concatenate((first[j] - first[i] + 1, last[j] - last[i] + 1)), -1)

    def _turn(self, distances: np.ndarray, by: int) -> None:
        np.add.at(self._corners, np.minimum(distances, self.target_length), by)

    @property
    def pairs(self) -> np.ndarray:
        """Pairs of tokens by relative distance, of the whole run: int64 `(target_length,)`."""
        if self._power is not None:
            # The autocorrelation of the occupied positions; the error of the FFT is far below the 0.5 that matters.
            counts = np.fft.irfft(self._power, self._fft_size)[: self.target_length]
            self._counts += np.rint(counts).astype(np.int64)
            self._power = None
        return np.cumsum(np.cumsum(self._corners))[:-1] + self._counts

    def counts(self) -> np.ndarray:
        """Return int64 `(target_length + 3,)`: pairs by distance; documents, skipped ones, sum of their spans."""
        return np.append(self.pairs, self._documents)

    def add_counts(self, counts: np.ndarray) -> None:
        """Add what another coverage of the same target length has counted, as its `counts` tells it."""
        self._counts += counts[:-3]
        self._documents += counts[-3:]

    def metrics(self) -> dict[str, float]:
        """Return what to log.

        `skip_share`, `skip_span_mean` and `skip_span_max` are of the documents since the last call, skipped or not;
        `skip_distance_max` and `skip_distance_coverage`, the share of the distances below `target_length` that were
        met at least once, of the whole run. Empty where no document was added since the last call.
        """
        counts = self.counts()
        new, self._told = counts - self._told, counts
        return summary(new, counts) if new[-3] else {}

    def record(self) -> CoverageRecord:
        """Return what the whole run has covered."""
        counts, pairs = self.counts(), self.pairs
        bins = min(BINS, self.target_length)
        edges = np.arange(bins + 1) * self.target_length // bins
        return CoverageRecord(
            target_length=self.target_length,
            documents=int(self._documents[0]),
            **summary(counts, counts),
            histogram=Histogram(
                edges=edges.tolist(),
                pairs=np.add.reduceat(pairs, edges[:-1]).tolist(),
                covered=(np.add.reduceat(pairs > 0, edges[:-1], dtype=np.int64) / np.diff(edges)).tolist(),
            ),
        )


class CoverageCallback(DistanceCoverage, TrainerCallback):
    """Counts the relative distances of the documents that a run trains on, which spreads them over `target_length`.

    Processes count for themselves and add up their counts wherever the trainer is about to log or to save.

    Args:
        target_length: number of positions the run spreads its samples over.
        copies: how many processes see the same batches, as those do that share one model by tensor parallelism.
    """

    def __init__(self, target_length: int, copies: int = 1) -> None:
        super().__init__(target_length)
        self.copies = copies
        self._local = DistanceCoverage(target_length)
        self._pending: list[dict[str, torch.Tensor]] = []

    def observe(self, inputs: dict[str, Any]) -> None:
        """Keep the positions of a collated batch: `position_ids`, `labels`, and `attention_mask` or `seq_idx`."""
        keys = ("position_ids", "labels", "attention_mask", "seq_idx")
        self._pending.append({key: inputs[key].detach().int() for key in keys if key in inputs})
        if len(self._pending) >= MAX_PENDING:
            self._read()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up the counts of all processes before a log or a checkpoint."""
        if control.should_log or control.should_save:
            self.gather()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Add up the counts of all processes, so that the record of a finished run is complete."""
        self.gather()

    def gather(self) -> None:
        """Add up what all processes have counted since the last call; every process must call it."""
        self._read()
        # A sum over processes on the device: NCCL has no other place for it.
        counts = torch.from_numpy(self._local.counts()).to(PartialState().device)
        # Processes that share one model have counted the same batches.
        self.add_counts(reduce(counts, "sum").cpu().numpy() // self.copies)
        self._local = DistanceCoverage(self.target_length)

    def save(self, directory: str | Path) -> None:
        """Write the counts that a resumed run goes on from."""
        np.savez_compressed(Path(directory) / FILE_NAME, counts=self.counts())

    def load(self, directory: str | Path) -> None:
        """Go on from the counts of a checkpoint, if it has any for this target length."""
        path = Path(directory) / FILE_NAME
        counts = np.load(path)["counts"] if path.is_file() else np.empty(0, dtype=np.int64)
        if counts.size != self.target_length + 3:
            logger.warning("%s holds no coverage of this target length; it is counted from this step on.", directory)
            return
        self.add_counts(counts - self.counts())
        self.metrics()  # what the next log reports begins here

    def _read(self) -> None:
        """Count the documents that have a target: the others, padding among them, train no distance."""
        for batch in self._pending:
            arrays = {key: values.cpu().numpy() for key, values in batch.items()}
            positions, targets = arrays["position_ids"], arrays["labels"] != -100
            if "seq_idx" in arrays:
                document, kept = arrays["seq_idx"], np.ones(positions.shape, dtype=bool)
            else:
                kept = arrays["attention_mask"].astype(bool)
                document = np.broadcast_to(np.arange(len(positions))[:, None], positions.shape)
            document, positions, targets = document[kept], positions[kept], targets[kept]
            starts = np.flatnonzero(np.diff(document, prepend=document[:1] - 1))
            targets[starts] = False  # nothing comes before a first token that could predict it
            lengths = np.diff(starts, append=document.size)
            trained = np.add.reduceat(targets, starts, dtype=np.int64) > 0 if starts.size else lengths > 0
            if trained.any():
                self._local.add(positions[np.repeat(trained, lengths)], lengths[trained])
        self._pending.clear()
