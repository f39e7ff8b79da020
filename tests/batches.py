"""Documents with skipped positions, as padded and packed batches, and what a model makes of them."""

from dataclasses import dataclass

import numpy as np
import torch
from families import VOCABULARY, WINDOW, naive_logits, tiny_model

from hf_longalign.positions import STRATEGIES, sample_positions


BLOCKS = ([5, 3, 2, 3], [4, 4, 6, 3, 2, 2], [6, 3])
TARGET = 64
# Skips of less than a window, of exactly a window, and of more, at the start, in the middle and near the end.
MIXED = np.cumsum([0, 1, 3, 1, 1, WINDOW, 1, 1, WINDOW - 1, 1, 1, 1, 1, 5, 1, 2, 1, 1, 12, 1, 1])
ALL_STRATEGIES = [*STRATEGIES, "mixed"]
# Rounding: four times what the worst family has. A wrong mask is off by 0.05 and more.
ATOL = 1e-4


@dataclass(frozen=True)
class Document:
    input_ids: torch.Tensor
    positions: torch.Tensor


def make_documents(strategy: str, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    documents = []
    for blocks in BLOCKS:
        tokens = sum(blocks)
        positions = MIXED[:tokens]
        if strategy != "mixed":
            positions = sample_positions(blocks, strategy=strategy, target_length=TARGET, rng=rng)
        ids = rng.integers(3, VOCABULARY, tokens)
        documents.append(Document(torch.from_numpy(ids), torch.from_numpy(positions)))
    return documents


def padded_batch(documents: list[Document]) -> dict:
    longest = max(len(document.input_ids) for document in documents)
    batch = {
        key: torch.zeros(len(documents), longest).long() for key in ("input_ids", "position_ids", "attention_mask")
    }
    for row, document in enumerate(documents):
        tokens = len(document.input_ids)
        batch["input_ids"][row, :tokens] = document.input_ids
        batch["position_ids"][row, :tokens] = document.positions
        batch["attention_mask"][row, :tokens] = 1
    return batch


def packed_batch(documents: list[Document]) -> dict:
    lengths = [len(document.input_ids) for document in documents]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.cat([document.input_ids for document in documents])[None],
        "position_ids": torch.cat([document.positions for document in documents])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def batch_logits(model, documents: list[Document], packed: bool) -> torch.Tensor:
    """Logits of all real tokens, (tokens, vocabulary)."""
    if packed:
        return model(**packed_batch(documents), use_cache=False).logits[0]
    batch = padded_batch(documents)
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def reference_logits(family: str, documents: list[Document]) -> torch.Tensor:
    return torch.cat([naive_logits(tiny_model(family), d.input_ids, d.positions) for d in documents])


def parameter_gradients(model, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = (logits.log_softmax(-1) * weights).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1.0)
        assert error < ATOL, f"{name}: {error:.1e}"
