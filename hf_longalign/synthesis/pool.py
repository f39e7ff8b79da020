"""The contexts of a data set, side by side: which may distract from which, and in what order they are offered."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_longalign.lazy import require
from hf_longalign.synthesis.checks import NEUTRALISED
from hf_longalign.synthesis.disk import whole, write_array
from hf_longalign.synthesis.seeds import Document
from hf_longalign.synthesis.tokens import batches_by_length, load_model
from hf_longalign.text import content_words, digest, normalise


# Over 450 published seeds of 2WikiMQA, HotpotQA and MuSiQue the median gold context covers 0.82 to 1.0 of its
# instruction, and 0.02 % or less of the other contexts of a task cover 0.8: those that share what it asks for.
COVERAGE = 0.8
# So many texts tell which words are rare.
_SAMPLE = 2000


def hash_words(words: Iterable[str]) -> np.ndarray:
    """Return the 32-bit hashes of words, uint32, sorted, each once."""
    # crc32 and not `hash`, which Python seeds anew in every process.
    return np.unique(np.array([zlib.crc32(word.encode()) for word in words], np.uint32))


class Rivals:
    """Tells whether a text holds what an instruction asks for, by the rare words they share.

    The content words of all `texts` lie in two files in `folder`, which are written where they are not there and which
    many processes map into memory: the hashes, uint32 `(total,)`, sorted within each text, and where those of each
    text end, int64 `(texts,)`.
    """

    # As sets of strings the words would take 30 kB a context; hashed they take 4 bytes each, and looking up the few
    # words of an instruction among those of a text takes microseconds.
    def __init__(self, folder: Path, texts: Iterable[str]):
        hashes, ends = folder / "words.bin", folder / "words.npy"
        # The ends are written last, so that their file says that both are whole.
        if not ends.is_file():
            counts = []
            with whole(hashes) as unfinished, unfinished.open("wb") as file:
                for text in texts:
                    row = hash_words(content_words(text))
                    row.tofile(file)
                    counts.append(len(row))
            write_array(ends, np.cumsum(counts, dtype=np.int64))
        empty = not hashes.stat().st_size  # which cannot be mapped
        mapped = np.empty(0, np.uint32) if empty else np.memmap(hashes, np.uint32, "r")
        # As plain arrays over the same memory: slicing a memmap costs more than all that is done with the slice.
        self._hashes, self._ends = np.asarray(mapped), np.load(ends)
        # Evenly spaced and not at random: the same words are rare in every process.
        sample = range(0, len(self._ends), max(1, len(self._ends) // _SAMPLE))
        self._documents = len(sample)
        self._frequencies = Counter(word for index in sample for word in self.words(index).tolist())

    def words(self, index: int) -> np.ndarray:
        """Return the hashed words of text `index`."""
        return self._hashes[self._ends[index - 1] if index else 0 : self._ends[index]]

    def asked(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the words of an instruction and their weights, the inverse document frequencies."""
        hashes = hash_words(content_words(instruction))
        counts = [self._frequencies[word] for word in hashes.tolist()]
        return hashes, np.array([log((self._documents + 1) / (count + 1)) for count in counts])

    def covers(self, asked: tuple[np.ndarray, np.ndarray], index: int) -> bool:
        """Return whether text `index` holds most of what is `asked`; everything holds common words alone."""
        hashes, weights = asked
        words = self.words(index)
        # Twice and not once: where nothing lies between the two sides of a word, it is not there.
        held = np.searchsorted(words, hashes, "right") > np.searchsorted(words, hashes, "left")
        # Rounded: what stands exactly at the border must not depend on the order of a sum.
        return bool(round(float(weights[held].sum()), 9) >= round(COVERAGE * float(weights.sum()), 9))


@dataclass
class Pool:
    """Accepted contexts, then documents, as columns; texts are read where they are needed.

    Attributes:
        table: rows with the columns of `contexts`, in the order of the seeds; `test` says which are of the test split.
        documents: texts that only distract.
        folder: where the words of all texts are kept.
    """

    table: pa.Table
    documents: Sequence[Document]
    test: np.ndarray
    folder: Path
    _groups: dict[tuple[str, int, bool], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = self.table.num_rows
        self.ids = self.table["seed_id"].to_pylist() + [document.document_id for document in self.documents]
        # Tasks as small numbers: comparing arrays of strings for each row would take longer than composing it.
        _, self.tasks = np.unique(self.table["task"].to_pylist(), return_inverse=True)
        self.titles = self.table["title"].to_pylist() + [document.title for document in self.documents]

    def __len__(self) -> int:
        return self.size + len(self.documents)

    def text(self, index: int) -> str:
        """Return a context or document."""
        return self.table["context"][index].as_py() if index < self.size else self.documents[index - self.size].text

    def texts(self) -> Iterator[str]:
        """Yield every context and document."""
        return map(self.text, range(len(self)))

    def groups(self, index: int, sources: Sequence[str]) -> list[np.ndarray]:
        """Return the indices a row may take its distractors from, source by source; its own is among them."""
        groups = []  # shared by all rows of a task and split: nothing here grows with the pool
        for source in sources:
            key = (source, int(self.tasks[index]), bool(self.test[index]))
            if key not in self._groups:
                documents = np.arange(self.size, len(self))
                self._groups[key] = documents if source == "documents" else np.flatnonzero(self.usable(*key))
            groups.append(self._groups[key])
        return groups

    def usable(self, source: str, task: int, for_test: bool, texts: Any = slice(None)) -> np.ndarray:
        """Return which of the contexts `texts` the rows of a task and split may take from a source."""
        # A row of the train split never sees the context of a test row; the other way round is no leak.
        same = self.tasks[texts] == task
        return (same if source == "same_task" else ~same) & (~self.test[texts] | for_test)

    @cached_property
    def titled(self) -> bool:
        """Whether every text has a title, so that titles can tell them apart."""
        return all(self.titles)

    @cached_property
    def neutralised(self) -> np.ndarray:
        """For every text, whether marks of chat templates were made plain words of in it or its seed."""
        found = np.zeros(len(self), bool)
        checks = self.table["checks"].combine_chunks()
        hits = checks.flatten().field("outcome").to_numpy(zero_copy_only=False) == NEUTRALISED
        found[np.asarray(checks.value_parent_indices())[hits]] = True
        found[self.size :] = [document.neutralised > 0 for document in self.documents]
        return found

    @cached_property
    def rivals(self) -> Rivals:
        """Tells a context that could be taken for the gold one."""
        return Rivals(self.folder, self.texts())

    def conflict(self, index: int) -> Callable[[int], bool]:
        """Return a function that tells whether another text holds what row `index` asks for, or asks the same."""
        instructions = self.table["instruction"]
        own = normalise(instructions[index].as_py())
        # Where prompts name the gold context nothing is looked up: only once it is needed.
        asked = cache(lambda: self.rivals.asked(own))

        def conflicts(other: int) -> bool:
            same = other < self.size and normalise(instructions[other].as_py()) == own
            return same or self.rivals.covers(asked(), other)

        return conflicts

    def name(self, index: int) -> str:
        """Return how a context is announced: by its title where all have one, else by an ID."""
        # All or none: one context with an ID among titles would give itself away.
        return f"Title: {self.titles[index]}" if self.titled else f"ID: {self._short_id(index)}"

    def reference(self, index: int, noun: str) -> str:
        """Return how an instruction points at a context."""
        if self.titled:
            return f'the {noun} titled "{self.titles[index]}"'
        return f"the {noun} with the ID {self._short_id(index)}"

    def _short_id(self, index: int) -> str:
        return digest("id", self.ids[index], size=4).upper()


SOURCES = ("same_task", "other_tasks", "documents")
NEIGHBOURS = 64
# A row is compared with so many texts of a source at most, so that a row costs the same in a pool of any size.
COMPARED = 20_000

Scorer = Callable[[int], np.ndarray]


def shuffled(items: Sequence[int] | np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Yield the items in random order, at the cost of those that are taken and not of all."""
    # Fisher and Yates, with only the moved places kept: a row takes ten of a hundred thousand.
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

    `groups` are indices by source, the preferred source first; the row's `own` is not offered. `nearest` holds for
    each group the indices closest to what is asked, closest first, -1 for none; `hard_share` is how likely the next
    context is the nearest one left in its group.
    """
    for number, group in enumerate(groups):
        near = iter([int(index) for index in nearest[number] if index >= 0] if hard_share else [])
        # By group, as no context stands in two of them.
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
    `score` takes the indices of some texts and returns a function of a row: how close each of them is to it. Equal
    scores keep the order of the contexts.
    """
    found = np.full((pool.size, len(sources), neighbours), -1, np.int32)
    everyone = np.arange(pool.size)
    for place, source in enumerate(sources):
        # Texts that can be looked through together, and the rows that look for theirs among them.
        populations = [(np.arange(pool.size, len(pool)) if source == "documents" else everyone, everyone)]
        if source == "same_task":
            own = [np.flatnonzero(pool.tasks == task) for task in np.unique(pool.tasks)]
            populations = list(zip(own, own, strict=True))
        for members, rows in populations:
            needed = max(1, -(-len(members) // compared))
            # At random, not evenly spaced: seeds often stand in turns, one of each task.
            dealt = np.array_split(np.random.default_rng(0).permutation(members), needed)[: len(rows)]
            for part, texts in enumerate(map(np.sort, dealt)):
                close = score(texts)
                for row in rows[part :: len(dealt)]:
                    usable = np.ones(len(texts), bool)
                    if source != "documents":
                        usable = pool.usable(source, pool.tasks[row], pool.test[row], texts) & (texts != row)
                    best = _closest(close(int(row)), usable, neighbours)
                    found[row, place, : len(best)] = texts[best]
    return found


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
    bm25s = require("bm25s", "synthesis")

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


def embed(texts: Sequence[str], model_name: str) -> np.ndarray:
    """Return unit vectors, float32 `(texts, hidden)`: the mean over the tokens of an encoder's last hidden states."""
    import torch

    tokenizer, model = load_model("AutoModel", model_name)
    longest = min(512, getattr(model.config, "max_position_embeddings", 512) - 2)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    vectors: list[Any] = [None] * len(texts)
    for numbers in batches_by_length(list(map(len, texts)), 16):
        batch = tokenizer([texts[number] for number in numbers], **options).to(model.device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        # Means over real tokens alone: padding would pull short texts towards each other.
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu().numpy()
        for number, vector in zip(numbers, means, strict=True):
            vectors[number] = vector
    return np.stack(vectors)
