"""The contexts of a data set, side by side: what is gold for one row distracts in another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from hf_longalign.synthesis.conflicts import Rivals
from hf_longalign.synthesis.documents import Document
from hf_longalign.text import content_words, digest, normalise


# So many texts tell which words are rare.
_SAMPLE = 2000
_KEPT_WORD_SETS = 20_000


@dataclass
class Pool:
    """Accepted contexts, then documents, as columns; texts are read where they are needed.

    Attributes:
        table: rows with the columns of `contexts`, in the order of the seeds.
        documents: texts that only distract.
        test: for every row of the table, whether it belongs to the test split.
    """

    table: pa.Table
    documents: Sequence[Document]
    test: np.ndarray

    def __post_init__(self) -> None:
        self.size = self.table.num_rows
        self.ids = self.table["seed_id"].to_pylist() + [document.document_id for document in self.documents]
        tasks = self.table["task"].to_pylist() + ["documents"] * len(self.documents)
        self.tasks = np.unique(tasks, return_inverse=True)[1]
        self.titles = self.table["title"].to_pylist() + [document.title for document in self.documents]
        self._words: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return self.size + len(self.documents)

    def row(self, index: int) -> dict[str, Any]:
        """Return a row of the table."""
        return self.table.slice(index, 1).to_pylist()[0]

    def text(self, index: int) -> str:
        """Return a context or document."""
        return self.table["context"][index].as_py() if index < self.size else self.documents[index - self.size].text

    def words(self, index: int) -> set[str]:
        """Return the content words of a text, kept for the next time."""
        if index not in self._words:
            if len(self._words) >= _KEPT_WORD_SETS:
                self._words.clear()
            self._words[index] = content_words(self.text(index))
        return self._words[index]

    def groups(self, index: int, sources: Sequence[str]) -> list[np.ndarray]:
        """Return the indices a row may take its distractors from, source by source.

        A row of the train split never sees the context of a test row; the other way round is no leak.
        """
        numbers = np.arange(len(self))
        usable = numbers != index
        if not self.test[index]:
            usable[: self.size] &= ~self.test
        same = self.tasks == self.tasks[index]
        of_seeds = numbers < self.size
        by_source = {"same_task": of_seeds & same, "other_tasks": of_seeds & ~same, "documents": ~of_seeds}
        return [numbers[usable & by_source[source]] for source in sources]

    @cached_property
    def titled(self) -> bool:
        """Whether every text has a title, so that titles can tell them apart."""
        return all(self.titles)

    @cached_property
    def instructions(self) -> list[str]:
        """The normalised instruction of every row of the table."""
        return [normalise(text) for text in self.table["instruction"].to_pylist()]

    @cached_property
    def rivals(self) -> Rivals:
        """What tells a context that could be taken for the gold one, learnt from a part of the texts."""
        step = max(1, len(self) // _SAMPLE)
        return Rivals(self.text(index) for index in range(0, len(self), step))

    def conflict(self, index: int) -> Callable[[int], bool]:
        """Return what tells whether another text conflicts with row `index` as its distractor.

        Two contexts conflict where their instructions are the same, or where the other holds what this row asks for.
        """
        instruction = self.table["instruction"][index].as_py()
        same = self.instructions[index]

        def conflicts(other: int) -> bool:
            if other < self.size and self.instructions[other] == same:
                return True
            return self.rivals.covers(instruction, self.words(other))

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
