"""Three documents of a few tokens, and how a model's logits on them move when a token or a position changes.

    near      0 1 2 3      20 21 22 23              a skip inside every sliding window
    far       0 1 2                      … target   a skip up to the target length
    ordinary  0 1 2 3 4 5                           no skip: what a changed token is worth

A movement is the root mean square of the change of a token's logits.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from hf_longalign.collator import SkipPositionDataCollator


# From a model and a batch with labels to the log-probabilities of its targets, `(batch, length - 1)` or longer.
LogProbs = Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor]

LENGTHS = (8, 7, 6)
NEAR, FAR, ORDINARY = range(3)


class Leak(NamedTuple):
    """The largest movement of one document when another is changed."""

    movement: float
    changed: int
    document: int


class Changes(NamedTuple):
    """What moves when the tokens of one document are changed before its middle, its first token apart.

    Args:
        base: logits before, one tensor `(tokens, vocabulary)` per document.
        moved: for each document that is changed, the movements of all, `(tokens,)` each.
    """

    base: list[torch.Tensor]
    moved: list[list[torch.Tensor]]

    def behind(self, document: int) -> float:
        """Movement of a document's second half when its first one is changed: behind its skip, where it has one."""
        movement = self.moved[document][document]
        return movement[len(movement) // 2 :].max().item()

    @property
    def reach(self) -> float:
        """Movement that the change of a token is worth, measured where no position is skipped."""
        return self.behind(ORDINARY)

    @property
    def noise(self) -> float:
        """Movement of a token before any change: what kernels that depend on the whole batch add, 0 for most."""
        return max(movements[document][0].item() for document, movements in enumerate(self.moved))

    @property
    def leak(self) -> Leak:
        """The largest movement from document to document."""
        return max(
            Leak(movement.max().item(), changed, document)
            for changed, movements in enumerate(self.moved)
            for document, movement in enumerate(movements)
            if document != changed
        )


class Probe:
    """Runs a model on the three documents, in batches as the collator makes them.

    Args:
        model: the model, in evaluation mode.
        text_config: the config of its language model.
        collator: the collator of the training data.
        device: where batches go.
        window: the sliding window of some layer in positions; `None` without one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        text_config: PretrainedConfig,
        collator: SkipPositionDataCollator,
        device: torch.device,
        window: int | None,
    ) -> None:
        self.model = model
        self.collator = copy.copy(collator)  # it counts what it collates
        self.device = device
        # With ordinary positions there is no target length; twice the documents serve.
        target_length = 2 * max(LENGTHS) if collator.strategy == "none" else collator.target_length
        self.lengths = [min(length, target_length // 2) for length in LENGTHS]
        self.ids, self.others = token_ids(text_config, self.lengths)
        # Inside window and target length, and small: float32 rotates by large positions less exactly.
        room = target_length - self.lengths[NEAR]
        visible = room if window is None else min(room, window - 2)
        self.gap = max(1, min(16, visible // 4))
        self.stretched_gap = max(self.gap + 1, min(4 * self.gap, visible))
        self.shift = max(1, min(37, room - self.gap))
        self.far_gap = target_length - self.lengths[FAR]

    def ordinary(self) -> list[torch.Tensor]:
        """Positions without skips."""
        return [self._places(document, 0) for document in range(len(self.lengths))]

    def skipped(self) -> list[torch.Tensor]:
        """Positions with the near and the far skip."""
        return [self._places(NEAR, self.gap), self._places(FAR, self.far_gap), self._places(ORDINARY, 0)]

    def stretched(self) -> list[torch.Tensor]:
        """Those with a larger near skip."""
        return [self._places(NEAR, self.stretched_gap), *self.skipped()[1:]]

    def shifted(self) -> list[torch.Tensor]:
        """Those with two of the documents shifted as a whole; the far one has no room."""
        near, far, ordinary = self.skipped()
        return [near + self.shift, far, ordinary + self.shift]

    def _places(self, document: int, gap: int) -> torch.Tensor:
        places = torch.arange(self.lengths[document])
        places[len(places) // 2 :] += gap
        return places

    def changes(self, positions: list[torch.Tensor]) -> Changes:
        """Change each document in turn."""
        base = self.logits(self.ids, positions)
        moved = []
        for document, length in enumerate(self.lengths):
            changed = list(self.ids)
            changed[document] = self.ids[document].clone()
            # The first token stays: a model may lean on it as a sink, and its movement tells what noise there is.
            changed[document][1 : length // 2] = self.others[document][1 : length // 2]
            moved.append(movements(self.logits(changed, positions), base))
        return Changes(base, moved)

    def movements(self, positions: list[torch.Tensor], base: list[torch.Tensor]) -> list[torch.Tensor]:
        """Movements of the documents when they get other positions than in `base`."""
        return movements(self.logits(self.ids, positions), base)

    def logits(self, ids: list[torch.Tensor], positions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each document, float32 `(tokens, vocabulary)`."""
        batch, starts = self._batch(ids, positions)
        logits = self._own_logits(batch)
        lengths = zip(starts, self.lengths, strict=True)
        return [logits[line, start : start + length] for (line, start), length in lengths]

    def alone(self) -> list[torch.Tensor]:
        """Logits of each document by itself, as the model has it: without positions, mask and padding."""
        return [self._own_logits({"input_ids": ids[None].to(self.device)})[0] for ids in self.ids]

    def own_log_probs(self) -> tuple[torch.Tensor, bool]:
        """Log-probabilities of the targets by the model's own logits, `(targets,)`.

        The second is whether the logits were computed in half precision; wrappers hand them on as float32.
        """
        batch, _ = self._batch(self.ids, self.ordinary())
        targets = batch["labels"][:, 1:].cpu()
        logits = self._own_logits(batch)[:, :-1]
        own = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        # What went through half precision comes back unchanged from it.
        halves = (logits.to(dtype).float() for dtype in (torch.bfloat16, torch.float16))
        return own[targets != -100], any(torch.equal(half, logits) for half in halves)

    def log_probs(self, training: LogProbs) -> torch.Tensor:
        """The same as training computes them, `(targets,)`."""
        batch, _ = self._batch(self.ids, self.ordinary())
        targets = batch["labels"][:, 1:].cpu()
        return training(self.model, batch)[:, -targets.shape[1] :].float().cpu()[targets != -100]

    def _own_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.model(**inputs, use_cache=False).logits
        logits = logits[:, -batch["input_ids"].shape[1] :].float().cpu()  # prompt tuning puts tokens of its own first
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().cpu()
        if logits[kept].isnan().any():
            raise FloatingPointError(
                "The model's logits must be numbers, got NaN on a batch of a few tokens. Load it in another precision "
                "(`dtype`) or with another `attn_implementation`."
            )
        return logits

    def _batch(
        self, ids: list[torch.Tensor], positions: list[torch.Tensor]
    ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """The batch on its device, and the line and column where each document begins."""
        labels = [tokens.clone() for tokens in ids]
        for tokens in labels:
            tokens[: len(tokens) // 2] = -100
        if self.collator.padding_free:
            columns = np.cumsum([0, *self.lengths[:-1]]).tolist()
            starts = [(0, column) for column in columns]
            rows: list[Any] = [{"input_ids": torch.cat(ids), "labels": torch.cat(labels), "seq_lengths": self.lengths}]
        else:
            starts = [(line, 0) for line in range(len(ids))]
            rows = [{"input_ids": tokens, "labels": target} for tokens, target in zip(ids, labels, strict=True)]
        batch = self.collator(rows)
        if "position_ids" in batch:
            for (line, start), places in zip(starts, positions, strict=True):
                batch["position_ids"][line, start : start + len(places)] = places
        batch = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        return batch, starts


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards each of its modules back into the mode it was in.

    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    >>> with eval_mode(model):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_ids(text_config: PretrainedConfig, lengths: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids of the documents, and another one for each: the same in every process, special tokens left out."""
    size = text_config.vocab_size
    special = {value for key, value in text_config.to_dict().items() if key.endswith("_token_id")}
    # From the middle of the vocabulary: the first quarter holds bytes and control tokens, the last often padding rows.
    usual = np.array([token for token in range(size // 4, size - size // 4) if token not in special])
    rng = np.random.default_rng(0)
    ids, others = [], []
    for length in lengths:
        drawn, apart = rng.integers(0, usual.size, length), rng.integers(1, usual.size, length)
        ids.append(torch.from_numpy(usual[drawn]))
        others.append(torch.from_numpy(usual[(drawn + apart) % usual.size]))
    return ids, others


def movements(logits: list[torch.Tensor], base: list[torch.Tensor]) -> list[torch.Tensor]:
    """Root mean square of the change of each token's logits; entries masked with -inf do not move."""
    # Masked entries are -inf on both sides, and -inf less -inf is nan.
    return [
        torch.nan_to_num(one - other, 0.0, 0.0, 0.0).square().mean(-1).sqrt()
        for one, other in zip(logits, base, strict=True)
    ]
