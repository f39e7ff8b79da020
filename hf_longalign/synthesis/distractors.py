"""In which order contexts are offered as distractors: at random, source after source, or the closest first."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from hf_longalign.synthesis.extras import require
from hf_longalign.text import normalise


SOURCES = ("same_task", "other_tasks", "documents")
NEIGHBOURS = 64


def shuffled(items: Sequence[int] | np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Yield the items in random order, at the cost of those that are taken and not of all.

    Example:

    >>> sorted(shuffled([3, 5, 7], np.random.default_rng(0)))
    [3, 5, 7]
    """
    moved: dict[int, int] = {}
    for last in range(len(items) - 1, -1, -1):
        drawn = int(rng.integers(last + 1))
        yield int(items[moved.get(drawn, drawn)])
        moved[drawn] = moved.pop(last, last)


def offer(
    groups: Sequence[np.ndarray], rng: np.random.Generator, *, nearest: Sequence[int] = (), hard_share: float = 0.0
) -> Iterator[int]:
    """Yield indices of contexts, none twice: group after group, each shuffled, a share of it the nearest first.

    Args:
        groups: indices by source, the preferred source first.
        rng: draws the order.
        nearest: the indices closest to what is asked, closest first.
        hard_share: how likely the next context is the nearest one left in its group.

    Example:

    >>> groups = [np.array([1, 2, 3]), np.array([8, 9])]
    >>> order = list(offer(groups, np.random.default_rng(0), nearest=[9, 2], hard_share=1.0))
    >>> order[0], order[3:]
    (2, [9, 8])
    """
    seen: set[int] = set()
    for group in groups:
        members = {int(index) for index in group} if hard_share else set()
        near = iter([int(index) for index in nearest if int(index) in members])
        for index in shuffled(group, rng):
            while hard_share and rng.random() < hard_share:
                hard = next((index for index in near if index not in seen), None)
                if hard is None:
                    break
                seen.add(hard)
                yield hard
            if index not in seen:
                seen.add(index)
                yield index


def nearest(
    scores: Iterable[np.ndarray], groups: Iterable[Sequence[np.ndarray]], neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Return the closest contexts of every row, int32 `(rows, sources * neighbours)`, padded with -1.

    Args:
        scores: for every row the similarity of every context.
        groups: for every row the indices it may use, by source; the closest are ranked within each source.
        neighbours: how many of each source. Equal scores keep the order of the contexts.

    Example:

    >>> nearest([np.array([0.1, 0.9, 0.5, 0.9])], [[np.array([0, 1]), np.array([2, 3])]], neighbours=2).tolist()
    [[1, 0, 3, 2]]
    """
    return np.array(
        [
            np.concatenate([_closest(row, group, neighbours) for group in sources])
            for row, sources in zip(scores, groups, strict=True)
        ],
        dtype=np.int32,
    )


def bm25_scores(queries: Sequence[str], texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield for each query the BM25 score of every text (bm25s)."""
    bm25s = require("bm25s")
    index = bm25s.BM25()
    index.index([normalise(text).split() or [""] for text in texts], show_progress=False)
    return (index.get_scores(normalise(query).split()) for query in queries)


def embedding_scores(queries: Sequence[str], texts: Sequence[str], model_name: str) -> Iterator[np.ndarray]:
    """Yield for each query the cosine of its embedding with that of every text, by a transformers encoder."""
    embedded = embed([*queries, *texts], model_name)
    targets = embedded[len(queries) :].T
    return (row @ targets for row in embedded[: len(queries)])


def embed(texts: Sequence[str], model_name: str, batch_size: int = 16) -> np.ndarray:
    """Return unit vectors, float32 `(texts, hidden)`: the mean over the tokens of an encoder's last hidden states."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model: Any = AutoModel.from_pretrained(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    longest = min(512, getattr(model.config, "max_position_embeddings", 512) - 2)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    vectors: list[Any] = [None] * len(texts)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = tokenizer(
            [texts[number] for number in numbers],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu().numpy()
        for number, vector in zip(numbers, means, strict=True):
            vectors[number] = vector
    return np.stack(vectors)


def _closest(scores: np.ndarray, group: np.ndarray, neighbours: int) -> np.ndarray:
    # Rounded: sums of floats may differ in the last bits between machines, and ties must not.
    ranked = group[np.argsort(-np.round(scores[group], 4), kind="stable")][:neighbours]
    return np.pad(ranked, (0, neighbours - len(ranked)), constant_values=-1)
