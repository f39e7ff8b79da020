"""LongAlign's loss weighting (https://arxiv.org/abs/2401.18058): every sequence of an optimiser step weighs the same.

The loss of a step is `(1/M) sum_i (1/N_i) sum_{t in i} CE_t`: N_i target tokens in sequence i, M sequences that have
any, over all devices and accumulation steps. A sequence is a document of a packed row or a row of a padded batch.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def sequence_index(labels: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """Number the sequences of a batch.

    Args:
        labels: `(batch, length)` int64, -100 where nothing is learned.
        seq_idx: `(1, length)` document of each token in a packed row; `None` in a padded batch.

    Returns:
        `(batch, length)` int64.
    """
    if seq_idx is not None:
        return seq_idx.long()
    return torch.arange(labels.size(0), device=labels.device)[:, None].expand_as(labels)


def target_counts(labels: torch.Tensor, seq_idx: torch.Tensor | None = None) -> torch.Tensor:
    """Count the predicted target tokens N_i of each sequence; the first token of a row is never predicted.

    Args:
        labels: `(batch, length)` int64.
        seq_idx: `(1, length)` or `None`.

    Returns:
        `(sequences,)` int64.

    Example:

    >>> target_counts(torch.tensor([[-100, 5, 6], [-100, -100, 7]]))
    tensor([2, 1])
    >>> target_counts(torch.tensor([[-100, 5, -100, 7]]), seq_idx=torch.tensor([[0, 0, 1, 1]]))
    tensor([1, 1])
    """
    index = sequence_index(labels, seq_idx)
    counts = torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, index[:, 1:].reshape(-1), (labels[:, 1:] != -100).long().reshape(-1))


def sequence_weights(labels: torch.Tensor, seq_idx: torch.Tensor | None = None) -> torch.Tensor:
    """Weigh each predicted token by 1 / N_i of its sequence.

    Args:
        labels: `(batch, length)` int64.
        seq_idx: `(1, length)` or `None`.

    Returns:
        `(batch, length - 1)` float32, aligned with the predictions: entry t weighs the loss on token t + 1.

    Example:

    >>> sequence_weights(torch.tensor([[-100, 5, 6], [-100, -100, 7]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    counts = target_counts(labels, seq_idx)
    weights = 1 / counts[sequence_index(labels, seq_idx)[:, 1:]].clamp(min=1)
    return weights * (labels[:, 1:] != -100)


def one_label_per_sequence(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a row of labels with one target per sequence that has any: its count is M, as `Trainer` counts labels.

    Example:

    >>> one_label_per_sequence({"labels": torch.tensor([[-100, 5, 6], [-100, -100, -100]])})
    tensor([[-100,    0, -100]])
    """
    counts = target_counts(batch["labels"], batch.get("seq_idx"))
    labels = torch.where(counts > 0, 0, -100)
    return torch.nn.functional.pad(labels, (1, 0), value=-100)[None]


class SequenceWeightedModel:
    """The model with its log-probabilities weighted, so that TRL's sum over tokens becomes LongAlign's over sequences.

    TRL divides the sum by `num_items_in_batch`, or by the number of targets where that is `None` (evaluation).
    """

    def __init__(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> None:
        self.model = model
        self.counts = target_counts(inputs["labels"], inputs.get("seq_idx"))
        self.weights = sequence_weights(inputs["labels"], inputs.get("seq_idx"))
        if num_items_in_batch is None:
            self.weights = self.weights * self.counts.sum() / (self.counts > 0).sum().clamp(min=1)

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; a fused head's log-probabilities come out weighted."""
        outputs = self.model(**inputs)
        if inputs.get("fused_lm_head"):
            # Prompt learning puts virtual tokens in front, which have no targets.
            virtual = outputs.log_probs.size(1) - self.weights.size(1)
            outputs.log_probs = outputs.log_probs * torch.nn.functional.pad(self.weights, (virtual, 0))
        return outputs


def leave_head_uncompiled() -> None:
    """Keep TRL's fused head out of compiled graphs, of whose loop over tiles compiling makes nothing faster.

    On a GPU it is handed the targets alone, whose number differs from batch to batch: it would be compiled again for
    each.
    """
    from trl.kernels import ChunkedLogProbFunction

    torch._dynamo.eval_frame.skip_code(ChunkedLogProbFunction.forward.__code__)


def ignore_padding_of_packed_rows(backbone: torch.nn.Module, pad_token_id: int, multiple: int) -> None:
    """Keep padding at the end of a packed row out of a mixture's load-balancing loss.

    That loss leaves out what the attention mask hides, and packed rows have no mask. So the router's logits of such
    padding are taken out of what the backbone returns.

    Args:
        backbone: the model without its head, which returns `router_logits`.
        pad_token_id: what rows are padded with, as a document of its own.
        multiple: what their length is padded to a multiple of.
    """

    def cut(module: torch.nn.Module, args: Any, inputs: dict[str, Any], outputs: Any) -> Any:
        bounds, logits = inputs.get("cu_seq_lens_q"), getattr(outputs, "router_logits", None)
        if bounds is None or logits is None:
            return outputs
        start = int(bounds[bounds < bounds[-1]].max())  # documents without a token may follow
        padding = inputs["input_ids"][0, start:]
        # Padding is shorter than the multiple: a longer document is a row's own, whatever its tokens.
        if start and len(padding) < multiple and bool((padding == pad_token_id).all()):
            outputs.router_logits = tuple(layer.flatten(0, -2)[:start] for layer in logits)
        return outputs

    backbone.register_forward_hook(cut, with_kwargs=True)


def zero_without_targets(loss_function: Callable) -> Callable:
    """Make a model's loss 0 for a step without any target, where it would divide 0 by 0.

    Args:
        loss_function: `PreTrainedModel.loss_function`; called with `labels` or `shift_labels` and, in training, with
            the number of targets of the whole step.

    Example:

    >>> from transformers.loss.loss_utils import ForCausalLMLoss
    >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[1, -100]])
    >>> zero_without_targets(ForCausalLMLoss)(logits=logits, labels=labels, vocab_size=4).item()
    0.0
    """

    @wraps(loss_function)
    def loss(logits: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        count = kwargs.pop("num_items_in_batch", None)
        if count is None:
            shifted = kwargs.get("shift_labels")
            count = ((labels[..., 1:] if shifted is None else shifted) != -100).sum()
        return loss_function(logits, labels, *args, num_items_in_batch=torch.as_tensor(count).clamp(min=1), **kwargs)

    return loss


def fused_log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of the targets as TRL computes them in training: on its fused head, without the logits."""
    return model(**batch, use_cache=False, fused_lm_head=True).log_probs
