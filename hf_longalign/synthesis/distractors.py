"""In which order contexts are offered as distractors: at random, source after source, or the closest first."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hf_longalign.synthesis.extras import require
from hf_longalign.synthesis.pool import Pool
from hf_longalign.text import normalise


SOURCES = ("same_task", "other_tasks", "documents")
NEIGHBOURS = 64
# A row is compared with so many texts of a source at most, so that a row costs the same in a pool of any size.
COMPARED = 20_000

Scorer = Callable[[int], np.ndarray]


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
    groups: Sequence[np.ndarray],
    rng: np.random.Generator,
    *,
    own: int = -1,
    nearest: Sequence[Sequence[int]] | np.ndarray = (),
    hard_share: float = 0.0,
) -> Iterator[int]:
    """Yield indices of contexts, none twice: group after group, each shuffled, a share of it the nearest first.

    Args:
        groups: indices by source, the preferred source first.
        rng: draws the order.
        own: the row's own index, which is not offered.
        nearest: for each group the indices closest to what is asked, closest first; -1 is none.
        hard_share: how likely the next context is the nearest one left in its group.

    Example:

    >>> groups = [np.array([1, 2, 3]), np.array([8, 9])]
    >>> order = list(offer(groups, np.random.default_rng(0), own=1, nearest=[[2], [9]], hard_share=1.0))
    >>> order
    [2, 3, 9, 8]
    """
    for number, group in enumerate(groups):
        near = iter([int(index) for index in nearest[number] if index >= 0] if hard_share else [])
        seen = {own}
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
    pool: Pool,
    sources: Sequence[str],
    score: Callable[[np.ndarray], Scorer],
    *,
    neighbours: int = NEIGHBOURS,
    compared: int = COMPARED,
) -> np.ndarray:
    """Return the closest contexts of every row, int32 `(rows, sources, neighbours)`, padded with -1.

    A source of more than `compared` texts is dealt out at random into parts, and a row is compared with those of one.

    Args:
        pool: all texts.
        sources: where distractors come from.
        score: for the indices of some texts, a function of a row that returns how close each of them is to it.
        neighbours: how many of each source. Equal scores keep the order of the contexts.
        compared: with how many texts of a source a row is compared at most.
    """
    found = np.full((pool.size, len(sources), neighbours), -1, np.int32)
    for place, source in enumerate(sources):
        for members, rows in _populations(pool, source):
            needed = max(1, -(-len(members) // compared))
            # At random, not every so-manieth: seeds often stand in turns, one of each task.
            dealt = np.array_split(np.random.default_rng(0).permutation(members), needed)[: len(rows)]
            for part, texts in enumerate(map(np.sort, dealt)):
                close = score(texts)
                for row in rows[part :: len(dealt)]:
                    usable = _usable(pool, source, int(row), texts)
                    best = _closest(close(int(row)), usable, neighbours)
                    found[row, place, : len(best)] = texts[best]
    return found


def _populations(pool: Pool, source: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts that can be looked through together, and the rows that look for theirs among them."""
    seeds = np.arange(pool.size)
    if source == "same_task":
        for task in range(len(pool.task_names)):
            same = np.flatnonzero(pool.tasks == task)
            yield same, same
    elif source == "other_tasks":
        yield seeds, seeds
    else:
        yield np.arange(pool.size, len(pool)), seeds


def _usable(pool: Pool, source: str, row: int, texts: np.ndarray) -> np.ndarray:
    """Which of the texts the row may take, see `Pool.groups`."""
    if source == "documents":
        return np.ones(len(texts), bool)
    same = pool.tasks[texts] == pool.tasks[row]
    return (same if source == "same_task" else ~same) & (~pool.test[texts] | pool.test[row]) & (texts != row)


def _closest(scores: np.ndarray, usable: np.ndarray, neighbours: int) -> np.ndarray:
    """The places of the highest scores among the usable ones, the highest first."""
    places = np.flatnonzero(usable)
    # Rounded: sums of floats may differ in the last bits between machines, and ties must not.
    falling = -np.round(scores[places].astype(np.float64), 4)
    if len(places) > neighbours:
        border = np.partition(falling, neighbours - 1)[neighbours - 1]
        kept = falling <= border
        places, falling = places[kept], falling[kept]
    return places[np.argsort(falling, kind="stable")][:neighbours]


def by_bm25(pool: Pool, queries: Sequence[str]) -> Callable[[np.ndarray], Scorer]:
    """Score texts by BM25 (bm25s): `queries` holds what each row asks for."""
    bm25s = require("bm25s")

    def score(texts: np.ndarray) -> Scorer:
        index = bm25s.BM25()
        words = [normalise(pool.text(int(number))).split() or [""] for number in texts]
        index.index(words, show_progress=False)
        return lambda row: index.get_scores(normalise(queries[row]).split() or [""])

    return score


def by_embeddings(pool: Pool, queries: Sequence[str], model_name: str) -> Callable[[np.ndarray], Scorer]:
    """Score texts by the cosine of their embeddings with those of the queries, by a transformers encoder."""
    asked, vectors = embed(queries, model_name), embed(list(pool.texts()), model_name)

    def score(texts: np.ndarray) -> Scorer:
        targets = vectors[texts]
        return lambda row: targets @ asked[row]

    return score


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
