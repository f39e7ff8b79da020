"""The files between the pipeline and the rows made from them, for the process that asks and those that compose."""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Sequence, Set
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hf_longalign.rows import BadRowError, Row, read_rows
from hf_longalign.synthesis.compose import BudgetError, Composer
from hf_longalign.synthesis.disk import read_table, table_row, write_array, write_table
from hf_longalign.synthesis.outcome import CONFIGS, Outcome, features, general_row, outcome_row
from hf_longalign.synthesis.pool import Pool, by_bm25, by_embeddings, nearest
from hf_longalign.synthesis.seeds import Document, read_documents
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.synthesis.tokens import ControlTokens, TokenCounter
from hf_longalign.text import digest


if TYPE_CHECKING:
    from hf_longalign.synthesis.builder import ContextSynthesisConfig


logger = logging.getLogger(__name__)

# These shape only how contexts are put together: another value needs no context anew.
_COMPOSITION = (
    *("n_distractors", "target_tokens", "distractor_sources", "hard_share"),
    *("embedding_model", "reference", "test_share", "general_data", "general_share"),
)
# So much of a text to be summarised stands for it when the closest others are looked for.
_QUERY_WORDS = 100
_ROLES = ("system", "user", "assistant")
_MADE = re.compile(rf"(?:{'|'.join(CONFIGS)}|outcomes|composition)-[0-9a-f]{{16}}")


@dataclass
class Files:
    """The files of a data set, in its folder, which its three configurations share."""

    config: "ContextSynthesisConfig"
    folder: Path

    def __getstate__(self) -> dict[str, Any]:
        # Each process that composes maps the tables and builds a composer for itself. It needs no seeds, and it must
        # look where this process has written, whatever has become of their files.
        config = copy(self.config)
        config.seeds = None
        # The paths are computed already: without seeds the digests would be others.
        return {"config": config, "folder": self.folder, "_outcomes": self._outcomes, "_composed": self._composed}

    # Named by what shapes them: what was paid for is found again where only the composition changes, and a run with
    # other seeds or settings finds nothing. Computed once, because digesting seeds in memory takes seconds.

    @cached_property
    def _outcomes(self) -> Path:
        return self.folder / f"outcomes-{self.config.fingerprint(without=_COMPOSITION)}"

    @cached_property
    def _composed(self) -> Path:
        return self.folder / f"composition-{self.config.fingerprint()}"

    @cached_property
    def counter(self) -> TokenCounter | None:
        """What counts tokens."""
        return None if self.config.tokenizer is None else TokenCounter(self.config.tokenizer)

    @cached_property
    def control(self) -> ControlTokens | None:
        """The marks of chat templates that are looked for; `None` where the check is left out."""
        if "control_tokens" not in self.config.checks:
            return None
        return ControlTokens(self.counter.special_tokens if self.counter else ())

    @cached_property
    def documents(self) -> Sequence[Document]:
        """The documents of the configuration, read once; processes that compose map what was read into memory."""
        path = self._composed / "documents.arrow"
        if path.is_file():
            return _Documents(read_table(path))
        config = self.config
        return read_documents(config.documents, control=self.control, on_control_tokens=config.on_control_tokens)

    @cached_property
    def accepted(self) -> pa.Table:
        """The accepted contexts, with the columns of `contexts`."""
        return read_table(self._outcomes / "accepted.arrow")

    @cached_property
    def rejected(self) -> pa.Table:
        """What was rejected, with the columns of `rejected`."""
        return read_table(self._outcomes / "rejected.arrow")

    @cached_property
    def general(self) -> pa.Table:
        """The general rows that are mixed in."""
        return read_table(self._composed / "general.arrow")

    @cached_property
    def test(self) -> np.ndarray:
        """For every accepted context, whether it belongs to the test split; by its id alone."""
        ids, share = self.accepted["seed_id"].to_pylist(), self.config.test_share
        if not share:
            return np.zeros(len(ids), dtype=bool)
        # By id: a seed stays in its split when others are added, so that no test row of yesterday is trained on today.
        draws = np.array([int(digest("split", str(self.config.seed), seed_id), 16) / 2**64 for seed_id in ids])
        return draws < share

    @cached_property
    def pool(self) -> Pool:
        """All contexts and documents."""
        return Pool(self.accepted, self.documents, self.test, self._composed)

    @cached_property
    def composer(self) -> Composer:
        """What composes the rows of `chat`."""
        path = self._composed / "nearest.npy"
        nearest = np.load(path, mmap_mode="r") if self.config.hard_share and path.is_file() else None
        return Composer(self.pool, self.config, self.counter, nearest)

    def has_outcomes(self) -> bool:
        """Whether the outcomes are on disk."""
        return all((self._outcomes / f"{kind}.arrow").is_file() for kind in ("accepted", "rejected"))

    def write_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Write the outcomes; a ValueError where no seed was accepted."""
        # An empty data set would be written, cached and pushed as if all were well.
        if not any(outcome.accepted for outcome in outcomes):
            raise ValueError(f"No seed of {len(outcomes)} was accepted. The first was rejected: {outcomes[0].reason}.")
        for kind, name in (("rejected", "rejected"), ("accepted", "contexts")):
            columns = features(name)
            rows = (outcome_row(outcome) for outcome in outcomes if outcome.accepted is (kind == "accepted"))
            kept = ({key: row[key] for key in columns} for row in rows)
            write_table(self._outcomes / f"{kind}.arrow", kept, columns.arrow_schema)

    def splits(self, config_name: str) -> dict[str, list[int]]:
        """Return the row numbers of each split of a configuration, and write what their rows need."""
        config, numbers = self.config, np.arange(len(self.test))
        path = self._composed / "documents.arrow"
        if config.documents and not path.is_file():
            columns = [(name, pa.string()) for name in ("text", "origin", "title")]
            write_table(path, map(asdict, self.documents), pa.schema([*columns, ("neutralised", pa.int32())]))
            del self.documents  # from here on they are read from the disk here too
        if config_name == "rejected":
            # With a budget, whether a context alone exceeds it is found by the processes that count.
            tested = len(numbers) if config.target_tokens is not None else 0
            return {"train": list(range(self.rejected.num_rows + tested))}
        splits = {"train": numbers[~self.test].tolist(), "test": numbers[self.test].tolist()}
        if config_name == "chat":
            limit, tasks = config.distractor_limit, Counter(self.accepted["task"].to_pylist())
            for task, number in config.available_distractors(tasks, len(self.documents)).items():
                if limit is not None and number < limit:
                    logger.warning("Task %r has %d contexts to distract with, %d were wanted.", task, number, limit)
            self._write_nearest()
            if "conflict" in self.config.checks or self.config.reference == "auto":
                # Here, before there are processes that would each do it for themselves.
                _ = self.pool.rivals
            self.__dict__.pop("composer", None)  # one that was made for `rejected` has no nearest texts
            general = draw_general(config.general_data, config.general_share, len(splits["train"]), config.seed)
            if general:
                rows, columns = map(general_row, general), features("chat").arrow_schema
                write_table(self._composed / "general.arrow", rows, columns)
            # Numbers beyond the accepted contexts are rows of general data.
            splits["train"] += range(len(numbers), len(numbers) + len(general))
        return {name: rows for name, rows in splits.items() if rows}

    def row(self, config_name: str, number: int) -> dict[str, Any] | None:
        """Return a row of a configuration, or `None` where that number has none."""
        if config_name == "contexts":
            return table_row(self.accepted, number)
        if config_name == "rejected":
            # First what was rejected before, then every accepted context, which may alone exceed the budget.
            if number < self.rejected.num_rows:
                return table_row(self.rejected, number)
            number -= self.rejected.num_rows
            reason = self.composer.over_budget(number)
            return {**table_row(self.accepted, number), "reason": f"budget: {reason}"} if reason else None
        if number >= len(self.test):
            return table_row(self.general, number - len(self.test))
        try:
            return self.composer.row(number)
        except BudgetError:  # it stands among the rejected
            return None

    def _write_nearest(self) -> None:
        config, path = self.config, self._composed / "nearest.npy"
        if not config.hard_share or path.is_file():
            return
        # The instruction finds what an answer could be looked for in; one that all rows share would find nothing.
        columns = (self.accepted[name].to_pylist() for name in ("task", "instruction"))
        queries = [
            " ".join(self.pool.text(index).split()[:_QUERY_WORDS]) if find_task(task).is_summary else instruction
            for index, (task, instruction) in enumerate(zip(*columns, strict=True))
        ]
        if config.embedding_model is None:
            score = by_bm25(self.pool, queries)
        else:
            score = by_embeddings(self.pool, queries, config.embedding_model)
        write_array(path, nearest(self.pool, config.distractor_sources, score))


def forget_outcomes(folder: Path, keys: Set[str]) -> list[str]:
    """Remove what was made from the replies `keys` in the folder of a data set; returns the names of the folders.

    Outcomes that rest on other replies too stay: they could only be made again by paying for those.
    """
    # Of prepared rows all go, as they do not say what they are made from.
    names = sorted(path.name for path in folder.glob("*-*") if _MADE.fullmatch(path.name))
    stale = []
    for name in names:
        if name.startswith("outcomes-"):
            columns = (read_table(path)["journal_keys"].to_pylist() for path in (folder / name).glob("*.arrow"))
            stale += [name] if keys >= {key for column in columns for found in column for key in found} else []
    removed = [name for name in names if name in stale or not name.startswith("outcomes-")] if stale else []
    for name in removed:
        shutil.rmtree(folder / name)
    return removed


class _Documents(Sequence[Document]):
    """Documents in a table, each made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: Any) -> Any:
        return Document(**table_row(self._table, number))


def draw_general(sources: Sequence[Any], share: float, long_rows: int, seed: int) -> list[dict[str, Any]]:
    """Return general rows, each `{"messages": [...], "seed_id": ...}`, that make up `share` of the whole, or all.

    Raises a BadRowError for no conversation in the column `messages`, or one that the assistant does not end.
    """
    # share = general / (general + long), solved for general.
    wanted = round(share / (1 - share) * long_rows)
    if not wanted:
        return []
    rows = [row for source in sources for row in read_rows(source, "general_data")]
    # Which rows is random; their order stays that of the files.
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:wanted])
    return [_conversation(rows[number]) for number in chosen]


def _conversation(row: Row) -> dict[str, Any]:
    messages = row.values.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRowError(row, "no conversation", "Give a list of {role, content}.", "messages")
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in _ROLES or not isinstance(content, str):
            raise BadRowError(row, f"not a message: {str(message)[:60]}", f"Roles: {', '.join(_ROLES)}.", "messages")
    if messages[-1]["role"] != "assistant":
        raise BadRowError(row, "does not end with the assistant", "Cut what follows its last message.", "messages")
    cleaned = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"messages": cleaned, "seed_id": f"general:{row.origin}"}
