"""Writing a prepared data set to a folder: Parquet files by configuration and split, a card and its picture."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_longalign.cards import dataset_card
from hf_longalign.plots import plot_lengths
from hf_longalign.records.data import DataRecord
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.config import ContextSynthesisConfig
from hf_longalign.synthesis.disk import whole
from hf_longalign.synthesis.facts import dataset_facts


logger = logging.getLogger(__name__)

# Few enough that a push of some hundred GB stays below 50 files, small enough to be read in parts.
SHARD_BYTES = 500_000_000
_BATCH_ROWS = 100
PICTURE = "assets/lengths.png"
_WRITTEN = re.compile(r"README\.md|assets/[^/]+\.png|[^/]+/[^/]+-\d{5}-of-\d{5}\.parquet")


def check_output(folder: Path, *kept: Path) -> None:
    """Refuse a folder that `export` would replace and that holds, or will hold, anything but an earlier output.

    Args:
        folder: where the output goes.
        kept: the journal and other paths that must outlive it.

    Raises:
        ValueError: names what would be lost.
    """
    inside = next((path for path in kept if path.resolve().is_relative_to(folder.resolve())), None)
    if inside is not None:
        raise ValueError(
            f"`output_dir` must not hold `{inside.name}`, which outlives it, got {folder}. Choose another folder."
        )
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    other = next((path for path in files if not _WRITTEN.fullmatch(path.relative_to(folder).as_posix())), None)
    if other is not None:
        raise ValueError(
            f"`output_dir` must be absent, empty or an earlier output, got {folder} with `{other.name}` in it. "
            "Choose another."
        )


def export(
    folder: str | Path,
    data: Mapping[str, Mapping[str, Dataset]],
    config: ContextSynthesisConfig,
    *,
    journal: str | Path | None = None,
    budget: Budget | None = None,
    license: str | None = None,
    seeds_license: str | None = None,
) -> Path:
    """Write the configurations and their card; `load_dataset(folder, "chat")` reads them, as does the Hub.

    The folder appears whole or not at all, also where two processes write it at once, and equal data gives equal
    bytes. A configuration without rows is left out: nothing could load it.

    Args:
        folder: where to; it must be absent, empty, or written by this function.
        data: data sets by configuration and split.
        config: the settings the card names.
        journal: the journal of the replies, for the card's cost.
        budget: the prices of tokens, for the card's cost.
        license: licence of the data set, as the Hub names it.
        seeds_license: licence of the seeds, as the Hub names it.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder)
    check_output(folder)
    data = {
        name: kept for name, splits in data.items() if (kept := {k: rows for k, rows in splits.items() if len(rows)})
    }
    with whole(folder) as unfinished:
        for name, splits in data.items():
            (unfinished / name).mkdir(parents=True)
            for split, dataset in splits.items():
                _write_split(unfinished / name, split, dataset)
        record = dataset_facts(data, config, journal=journal, budget=budget)
        card = dataset_card(
            record,
            sample=next(iter(data["chat"].values()))[0],
            picture=_draw(record, unfinished),
            license=license,
            seeds_license=seeds_license,
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
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


def _draw(record: DataRecord, folder: Path) -> str | None:
    """Draw lengths and depths where matplotlib is there, and return where the picture is."""
    try:
        plot_lengths(record.lengths, record.depths, folder / PICTURE, unit=record.unit)
    except ImportError as error:
        logger.warning("The card goes without its picture. %s", error)
        return None
    return PICTURE
