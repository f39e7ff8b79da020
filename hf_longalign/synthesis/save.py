"""Writing a prepared data set to a folder: Parquet files by configuration and split, and a card."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_longalign.synthesis.card import dataset_card
from hf_longalign.synthesis.config import ContextSynthesisConfig
from hf_longalign.synthesis.schema import CONFIGS


# Few enough that a push of some hundred GB stays below 50 files, small enough to be read in parts.
SHARD_BYTES = 500_000_000
_BATCH_ROWS = 100
_WRITING = ("context_words", "facts_first", "temperature", "top_p", "max_tokens", "sampling_seed", "retries")
_SETTINGS = (
    *("n_distractors", "target_tokens", "distractor_sources", "hard_share", "hard_by", "reference", "checks"),
    *("min_words", "difficulty", "difficulty_use", "difficulty_share", "general_share", "test_share", "seed"),
)


def save(folder: str | Path, data: Mapping[str, Mapping[str, Dataset]], config: ContextSynthesisConfig) -> Path:
    """Write the configurations and their card; `load_dataset(folder, "chat")` reads them, as does the Hub.

    The folder appears whole or not at all, and equal data gives equal bytes. A configuration without rows is left out:
    nothing could load it.

    Args:
        folder: where to; it must be absent, empty, or written by this function.
        data: data sets by configuration and split.
        config: the settings the card names.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "chat").is_dir():
        raise ValueError(f"`output_dir` must be absent, empty or an earlier output, got {folder}. Choose another.")
    data = {
        name: kept for name, splits in data.items() if (kept := {k: rows for k, rows in splits.items() if len(rows)})
    }
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for name, splits in data.items():
            (unfinished / name).mkdir(parents=True)
            for split, dataset in splits.items():
                _write_split(unfinished / name, split, dataset)
        (unfinished / "README.md").write_text(_card(data, config), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_split(folder: Path, split: str, dataset: Dataset) -> None:
    shards = max(1, -(-_text_bytes(dataset.data.table) // SHARD_BYTES))
    for index in range(shards):
        part = dataset.shard(shards, index, contiguous=True) if shards > 1 else dataset
        # A fixed batch size: the default follows the files the rows were prepared in.
        part.to_parquet(folder / f"{split}-{index:05d}-of-{shards:05d}.parquet", batch_size=_BATCH_ROWS)


def _text_bytes(table: pa.Table) -> int:
    """Bytes of all strings: unlike the size in memory it does not depend on how many files the rows lie in."""

    def size(array: pa.Array) -> int:
        if pa.types.is_string(array.type):
            return int(pc.sum(pc.binary_length(array)).as_py() or 0)
        if pa.types.is_list(array.type):
            return size(array.flatten())
        return sum(map(size, array.flatten())) if pa.types.is_struct(array.type) else 0

    return sum(size(chunk) for column in table.columns for chunk in column.chunks)


def _card(data: Mapping[str, Mapping[str, Dataset]], config: ContextSynthesisConfig) -> str:
    chat = list(data["chat"].values())
    tasks = Counter(task or "general data" for dataset in chat for task in dataset["task"])
    reasons = Counter(
        reason.split(":")[0] for dataset in data.get("rejected", {}).values() for reason in dataset["reason"]
    )
    given = config.method == "context" and config.generator == "documents"
    names = _SETTINGS if given else _WRITING + _SETTINGS
    return dataset_card(
        method="given" if given else config.method,
        model=config.model,
        splits={name: {split: len(data[name][split]) for split in data[name]} for name in CONFIGS if name in data},
        tasks=dict(sorted(tasks.items())),
        rejected=dict(reasons.most_common()),
        tokens=[tokens for dataset in chat for tokens in dataset["total_tokens"] if tokens is not None],
        settings={name: _plain(getattr(config, name)) for name in names},
    )


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else value
