"""The files between the stages and the rows made from them, for the process that asks and those that compose."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_longalign.synthesis.chat import Composer
from hf_longalign.synthesis.compose import BudgetError
from hf_longalign.synthesis.config import ContextSynthesisConfig
from hf_longalign.synthesis.distractors import bm25_scores, embedding_scores, nearest
from hf_longalign.synthesis.documents import read_documents
from hf_longalign.synthesis.feasible import available_distractors, distractor_limit
from hf_longalign.synthesis.mixing import draw_general
from hf_longalign.synthesis.outcome import Outcome
from hf_longalign.synthesis.pool import Pool
from hf_longalign.synthesis.schema import features, general_row, outcome_row
from hf_longalign.synthesis.tables import read_array, read_table, write_array, write_table
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.synthesis.tokens import TokenCounter
from hf_longalign.text import digest


logger = logging.getLogger(__name__)

# These shape only how contexts are put together: another value needs no context anew.
_COMPOSITION = (
    *("n_distractors", "target_tokens", "tokenizer", "distractor_sources", "hard_share", "hard_by"),
    *("embedding_model", "reference", "test_share", "general_data", "general_share"),
)
_QUERY_WORDS = 100


@dataclass
class Workspace:
    """One configuration's files, in the folder of its data set.

    Attributes:
        config: what is made and how.
        folder: where the files lie.
    """

    config: ContextSynthesisConfig
    folder: Path

    def __getstate__(self) -> dict[str, Any]:
        # Tables are mapped, and a composer built, by each process for itself.
        return {"config": self.config, "folder": self.folder}

    @cached_property
    def counter(self) -> TokenCounter | None:
        """What counts tokens."""
        return None if self.config.tokenizer is None else TokenCounter(self.config.tokenizer)

    @cached_property
    def accepted(self) -> pa.Table:
        """The accepted contexts, with the columns of `contexts`."""
        return read_table(self._outcomes("accepted"))

    @cached_property
    def rejected(self) -> pa.Table:
        """What was rejected, with the columns of `rejected`."""
        return read_table(self._outcomes("rejected"))

    @cached_property
    def general(self) -> pa.Table:
        """The general rows that are mixed in."""
        return read_table(self._composed("general.arrow"))

    @cached_property
    def test(self) -> np.ndarray:
        """For every accepted context, whether it belongs to the test split; by its id alone."""
        ids, share = self.accepted["seed_id"].to_pylist(), self.config.test_share
        draws = np.array([int(digest("split", str(self.config.seed), seed_id), 16) / 2**64 for seed_id in ids])
        return draws < share

    @cached_property
    def pool(self) -> Pool:
        """All contexts and documents."""
        return Pool(self.accepted, read_documents(self.config.documents), self.test)

    @cached_property
    def composer(self) -> Composer:
        """What composes the rows of `chat`."""
        config = self.config
        return Composer(
            pool=self.pool,
            sources=tuple(config.distractor_sources),
            limit=distractor_limit(config),
            counter=self.counter,
            budget=config.target_tokens,
            reference=config.reference,
            nearest=read_array(self._composed("nearest.npy")) if config.hard_share and config.name == "chat" else None,
            hard_share=config.hard_share,
            avoid_conflicts="conflict" in config.checks,
            seed=config.seed,
        )

    def has_outcomes(self) -> bool:
        """Whether the outcomes are on disk."""
        return self._outcomes("accepted").is_file() and self._outcomes("rejected").is_file()

    def write_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Write the outcomes.

        Raises:
            ValueError: no seed was accepted.
        """
        if not any(outcome.accepted for outcome in outcomes):
            raise ValueError(f"No seed of {len(outcomes)} was accepted. The first was rejected: {outcomes[0].reason}.")
        for kind, name in (("rejected", "rejected"), ("accepted", "contexts")):
            columns = features(name)
            rows = (outcome_row(outcome) for outcome in outcomes if outcome.accepted is (kind == "accepted"))
            write_table(self._outcomes(kind), ({key: row[key] for key in columns} for row in rows), columns)

    def splits(self, config_name: str) -> dict[str, list[int]]:
        """Return the row numbers of each split of a configuration, and write what their rows need."""
        numbers = np.arange(len(self.test))
        if config_name == "rejected":
            # With a budget, whether a context alone exceeds it is found by the processes that count.
            tested = len(numbers) if self.config.target_tokens is not None else 0
            return {"train": list(range(self.rejected.num_rows + tested))}
        splits = {"train": numbers[~self.test].tolist(), "test": numbers[self.test].tolist()}
        if config_name == "chat":
            self._report_few_distractors()
            self._write_nearest()
            splits["train"] += [len(numbers) + number for number in range(self._write_general(len(splits["train"])))]
        return {name: rows for name, rows in splits.items() if rows}

    def row(self, config_name: str, number: int) -> dict[str, Any] | None:
        """Return a row of a configuration, or `None` where that number has none."""
        if config_name == "contexts":
            return _row(self.accepted, number)
        return self._chat_row(number) if config_name == "chat" else self._rejected_row(number)

    def _chat_row(self, number: int) -> dict[str, Any] | None:
        general = number - len(self.test)
        if general >= 0:
            return _row(self.general, general)
        try:
            return self.composer.row(number)
        except BudgetError:
            return None

    def _rejected_row(self, number: int) -> dict[str, Any] | None:
        if number < self.rejected.num_rows:
            return _row(self.rejected, number)
        number -= self.rejected.num_rows
        reason = self.composer.over_budget(number)
        return {**_row(self.accepted, number), "reason": f"budget: {reason}"} if reason else None

    def _report_few_distractors(self) -> None:
        limit = distractor_limit(self.config)
        tasks = Counter(self.accepted["task"].to_pylist())
        available = available_distractors(tasks, self.config, len(self.pool.documents))
        for task, number in available.items():
            if limit is not None and number < limit:
                logger.warning("Task %r has %d contexts to distract with, %d were wanted.", task, number, limit)

    def _write_nearest(self) -> None:
        config, path = self.config, self._composed("nearest.npy")
        if not config.hard_share or path.is_file():
            return
        texts = [self.pool.text(index) for index in range(len(self.pool))]
        # The instruction finds what an answer could be looked for in; one that all rows share would find nothing.
        queries = [
            " ".join(text.split()[:_QUERY_WORDS]) if find_task(task).is_summary else instruction
            for task, instruction, text in zip(
                self.accepted["task"].to_pylist(), self.accepted["instruction"].to_pylist(), texts, strict=False
            )
        ]
        if config.hard_by == "bm25":
            scores = bm25_scores(queries, texts)
        else:
            scores = embedding_scores(queries, texts, config.embedding_model or "")
        groups = (self.pool.groups(index, config.distractor_sources) for index in range(len(queries)))
        write_array(path, nearest(scores, groups))

    def _write_general(self, long_rows: int) -> int:
        config = self.config
        rows = draw_general(config.general_data, config.general_share, long_rows, config.seed)
        if rows:
            write_table(self._composed("general.arrow"), map(general_row, rows), features("chat"))
        return len(rows)

    def _outcomes(self, kind: str) -> Path:
        return self.folder / f"outcomes-{self.config.fingerprint(without=_COMPOSITION)}" / f"{kind}.arrow"

    def _composed(self, name: str) -> Path:
        return self.folder / f"composition-{self.config.fingerprint()}" / name


def _row(table: pa.Table, number: int) -> dict[str, Any]:
    return table.slice(number, 1).to_pylist()[0]
