"""The contexts of a data set, side by side: what is gold for one row distracts in another, unless they conflict."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_longalign.synthesis.checks import NEUTRALISED
from hf_longalign.synthesis.disk import read_array, whole, write_array
from hf_longalign.synthesis.documents import Document
from hf_longalign.text import content_words, digest, normalise


# Over 450 published seeds of 2WikiMQA, HotpotQA and MuSiQue the median gold context covers 0.82 to 1.0 of its
# instruction, and 0.02 % or less of the other contexts of a task cover 0.8: those that share what it asks for.
COVERAGE = 0.8
# So many texts tell which words are rare.
_SAMPLE = 2000


def hash_words(words: Iterable[str]) -> np.ndarray:
    """Return the 32-bit hashes of words, uint32, sorted, each once.

    Example:

    >>> hash_words(["dam", "ashby", "dam"]).tolist() == sorted({zlib.crc32(b"dam"), zlib.crc32(b"ashby")})
    True
    """
    return np.unique(np.array([zlib.crc32(word.encode()) for word in words], np.uint32))


class Words:
    """The content words of every text, as hashes in two arrays, which many processes can map into memory.

    As sets of strings they would take 30 kB a context; hashed they take 4 bytes a word, and looking up the few words
    of an instruction among those of a text takes microseconds.

    Attributes:
        hashes: uint32 `(total,)`, sorted within each text.
        ends: int64 `(texts,)`, where the hashes of each text end.
    """

    def __init__(self, hashes: np.ndarray, ends: np.ndarray):
        self.hashes = hashes
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Words":
        """Return the words of texts."""
        rows = [hash_words(content_words(text)) for text in texts]
        return cls(np.concatenate([np.empty(0, np.uint32), *rows]), np.cumsum([len(row) for row in rows]))

    @classmethod
    def stored(cls, folder: Path, texts: Callable[[], Iterable[str]]) -> "Words":
        """Return the words of texts, mapped from two files in `folder`, which are written where they are not there."""
        hashes, ends = folder / "words.bin", folder / "words.npy"
        if not ends.is_file():
            counts = []
            with whole(hashes) as unfinished, unfinished.open("wb") as file:
                for text in texts():
                    row = hash_words(content_words(text))
                    row.tofile(file)
                    counts.append(len(row))
            write_array(ends, np.cumsum(counts, dtype=np.int64))
        empty = not hashes.stat().st_size  # which cannot be mapped
        mapped = np.empty(0, np.uint32) if empty else np.memmap(hashes, np.uint32, "r")
        # As plain arrays over the same memory: slicing a memmap costs more than all that is done with the slice.
        return cls(np.asarray(mapped), np.asarray(read_array(ends)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.hashes[self.ends[index - 1] if index else 0 : self.ends[index]]


class Rivals:
    """Tells whether a context holds what an instruction asks for, by the rare words they share.

    Args:
        words: those of the texts; some thousand of them tell how rare a word is.

    Example:

    >>> rivals = Rivals(Words.of(["the dam of Thornwick", "the dam of Ashby", "a film by Ada"]))
    >>> asked = rivals.asked("Where is the dam of Ashby?")
    >>> [rivals.covers(asked, index) for index in range(3)]
    [False, True, False]
    """

    def __init__(self, words: Words):
        self._words = words
        sample = range(0, len(words), max(1, len(words) // _SAMPLE))
        self._documents = len(sample)
        found = np.concatenate([np.empty(0, np.uint32), *(words[index] for index in sample)])
        self._known, self._frequencies = np.unique(found, return_counts=True)

    def asked(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the words of an instruction and their weights, the inverse document frequencies."""
        hashes = hash_words(content_words(instruction))
        places = np.searchsorted(self._known, hashes)
        known = _holds(self._known, hashes, places)
        counts = [int(self._frequencies[place]) if held else 0 for place, held in zip(places, known, strict=True)]
        return hashes, np.array([log((self._documents + 1) / (count + 1)) for count in counts])

    def covers(self, asked: tuple[np.ndarray, np.ndarray], index: int) -> bool:
        """Return whether text `index` holds most of what is `asked`; everything holds common words alone."""
        hashes, weights = asked
        held = _holds(self._words[index], hashes)
        # Rounded: what stands exactly at the border must not depend on the order of a sum.
        return bool(round(float(weights[held].sum()), 9) >= round(COVERAGE * float(weights.sum()), 9))


def _holds(known: np.ndarray, wanted: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    """Which of the `wanted` stand in the sorted array `known`."""
    if not len(known):
        return np.zeros(len(wanted), bool)
    places = np.searchsorted(known, wanted) if places is None else places
    return np.asarray(known[np.minimum(places, len(known) - 1)] == wanted)


@dataclass
class Pool:
    """Accepted contexts, then documents, as columns; texts are read where they are needed.

    Attributes:
        table: rows with the columns of `contexts`, in the order of the seeds.
        documents: texts that only distract.
        test: for every row of the table, whether it belongs to the test split.
        folder: where the words of all texts are kept; `None` to keep them in memory.
    """

    table: pa.Table
    documents: Sequence[Document]
    test: np.ndarray
    folder: Path | None = None
    _groups: dict[tuple[str, int, bool], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = self.table.num_rows
        self.ids = self.table["seed_id"].to_pylist() + [document.document_id for document in self.documents]
        names, self.tasks = np.unique(self.table["task"].to_pylist(), return_inverse=True)
        self.task_names = [str(name) for name in names]
        self.titles = self.table["title"].to_pylist() + [document.title for document in self.documents]

    def __len__(self) -> int:
        return self.size + len(self.documents)

    def row(self, index: int) -> dict[str, Any]:
        """Return a row of the table."""
        return self.table.slice(index, 1).to_pylist()[0]

    def text(self, index: int) -> str:
        """Return a context or document."""
        return self.table["context"][index].as_py() if index < self.size else self.documents[index - self.size].text

    def texts(self) -> Iterator[str]:
        """Yield every context and document."""
        return map(self.text, range(len(self)))

    def groups(self, index: int, sources: Sequence[str]) -> list[np.ndarray]:
        """Return the indices a row may take its distractors from, source by source; its own is among them.

        A row of the train split never sees the context of a test row; the other way round is no leak. The arrays are
        shared by all rows of a task and split: nothing here grows with the pool.
        """
        return [self.members(source, int(self.tasks[index]), bool(self.test[index])) for source in sources]

    def members(self, source: str, task: int, for_test: bool) -> np.ndarray:
        """Return the indices of a source, as the rows of a task and split may use it."""
        key = (source, task, for_test)
        if key not in self._groups:
            if source == "documents":
                found = np.arange(self.size, len(self))
            else:
                same = self.tasks == task
                usable = (same if source == "same_task" else ~same) & (~self.test | for_test)
                found = np.flatnonzero(usable)
            self._groups[key] = found
        return self._groups[key]

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
        return Rivals(Words.of(self.texts()) if self.folder is None else Words.stored(self.folder, self.texts))

    def conflict(self, index: int) -> Callable[[int], bool]:
        """Return a function that tells whether another text conflicts with row `index` as its distractor.

        Two contexts conflict where their instructions are the same, or where the other holds what this row asks for.
        """
        instructions = self.table["instruction"]
        own = normalise(instructions[index].as_py())
        asked: list[tuple[np.ndarray, np.ndarray]] = []

        def conflicts(other: int) -> bool:
            if other < self.size and normalise(instructions[other].as_py()) == own:
                return True
            if not asked:  # only now: where prompts name the gold context nothing is looked up
                asked.append(self.rivals.asked(own))
            return self.rivals.covers(asked[0], other)

        return conflicts

    def name(self, index: int) -> str:
        """Return how a context is announced: by its title where all have one, else by an ID."""
        return f"Title: {self.titles[index]}" if self.titled else f"ID: {self._short_id(index)}"

    def reference(self, index: int, noun: str) -> str:
        """Return how an instruction points at a context."""
        if self.titled:
            return f'the {noun} titled "{self.titles[index]}"'
        return f"the {noun} with the ID {self._short_id(index)}"

    def _short_id(self, index: int) -> str:
        return digest("id", self.ids[index], size=4).upper()
