"""Writing a prepared data set to a folder: Parquet files, and a card of what its rows, settings and journal tell."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from hf_longalign import __version__
from hf_longalign.cards.dataset import Cost, DataRecord, DataSource, dataset_card
from hf_longalign.longbench_prompts import TEMPLATES
from hf_longalign.plots import plot_lengths
from hf_longalign.rows import text_arrays
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.checks import NEUTRALISED, majority_language
from hf_longalign.synthesis.disk import whole
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.outcome import CONFIGS
from hf_longalign.text import digest, word_count


if TYPE_CHECKING:
    from hf_longalign.synthesis.builder import ContextSynthesisConfig


logger = logging.getLogger(__name__)

Data = Mapping[str, Mapping[str, Dataset]]  # by configuration and split

# Few enough that a push of some hundred GB stays below 50 files, small enough to be read in parts.
SHARD_BYTES = 500_000_000
_BATCH_ROWS = 100
PICTURE = "assets/lengths.png"
_WRITTEN = re.compile(r"README\.md|assets/[^/]+\.png|[^/]+/[^/]+-\d{5}-of-\d{5}\.parquet")


def check_output(folder: Path, *kept: Path) -> None:
    """Refuse a folder that `export` would replace and that holds, or will hold, anything but an earlier output.

    `kept` are the journal and other paths that must outlive it. Raises a ValueError that names what would be lost.
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
    data: Data,
    config: "ContextSynthesisConfig",
    *,
    journal: Path | None = None,
    budget: Budget | None = None,
    license: str | None = None,
    seeds_license: str | None = None,
) -> Path:
    """Write the configurations and their card; `load_dataset(folder, "chat")` reads them, as does the Hub.

    The folder appears whole or not at all, and equal data gives equal bytes. A configuration without rows is left out:
    nothing could load it. `journal` holds the replies, and `budget` the prices of tokens, for the card's cost; the
    licences are named as the Hub names them. Raises what `check_output` raises.
    """
    folder = Path(folder)
    check_output(folder)
    kept = {name: {split: rows for split, rows in splits.items() if len(rows)} for name, splits in data.items()}
    data = {name: splits for name, splits in kept.items() if splits}
    with whole(folder) as unfinished:
        for name, splits in data.items():
            (unfinished / name).mkdir(parents=True)
            for split, dataset in splits.items():
                shards = max(1, -(-_text_bytes(dataset.data.table) // SHARD_BYTES))
                for index in range(shards):
                    part = dataset.shard(shards, index, contiguous=True) if shards > 1 else dataset
                    path = unfinished / name / f"{split}-{index:05d}-of-{shards:05d}.parquet"
                    # A fixed batch size: the default follows the files the rows were prepared in, and equal rows
                    # would give other bytes, which a push takes for a change.
                    part.to_parquet(path, batch_size=_BATCH_ROWS)
        record = dataset_facts(data, config, journal=journal, budget=budget)
        picture: str | None = PICTURE
        try:
            plot_lengths(record.lengths, record.depths, unfinished / PICTURE, unit=record.unit)
        except ImportError as error:  # matplotlib is an extra
            logger.warning("The card goes without its picture. %s", error)
            picture = None
        card = dataset_card(
            record,
            sample=next(iter(data["chat"].values()))[0],
            picture=picture,
            license=license,
            seeds_license=seeds_license,
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return folder


def _text_bytes(table: pa.Table) -> int:
    """Bytes of all strings: unlike the size in memory it does not depend on how many files the rows lie in."""
    texts = (array for column in table.columns for chunk in column.chunks for array in text_arrays(chunk))
    return sum(int(pc.sum(pc.binary_length(array)).as_py() or 0) for array in texts)


_SAMPLING = ("temperature", "top_p", "max_tokens", "sampling_seed", "retries")
_WRITING = ("context_words", "facts_first")
_SETTINGS = (
    *("n_distractors", "target_tokens", "distractor_sources", "hard_share", "hard_by", "reference", "min_words"),
    *("difficulty", "difficulty_use", "difficulty_share", "general_share", "test_share", "seed"),
)


def dataset_facts(
    data: Data, config: "ContextSynthesisConfig", *, journal: Path | None = None, budget: Budget | None = None
) -> DataRecord:
    """Return the facts of a prepared data set: functions of its rows, its settings and its replies alone."""
    chat = concatenate_datasets(list(data["chat"].values()))
    given = config.method == "context" and config.generator == "documents"
    lengths, unit = list(chat["total_tokens"]), "tokens"
    if None in lengths:  # nobody has counted them
        lengths = [sum(word_count(message["content"]) for message in messages) for messages in chat["messages"]]
        unit = "words"
    checks = list(chat["checks"])
    ran = {check["name"] for row in checks for check in row}
    contexts = [number for number in chat["n_contexts"] if number]
    hashes = {found for rows in _outcomes(data) for found in rows["prompt_hash"] if found}
    contexts_written = (row for rows in data.get("contexts", {}).values() for row in rows)
    texts = (f"{row['instruction']} {row['answer']} {row['context'][:200]}" for row in contexts_written)
    language = config.language or majority_language(texts)
    named = {task for task, reference in zip(chat["task"], chat["reference"], strict=True) if reference is not None}
    reasons = Counter(reason.split(":")[0] for rows in data.get("rejected", {}).values() for reason in rows["reason"])
    return DataRecord(
        method="given" if given else config.method,
        splits={name: {split: len(data[name][split]) for split in data[name]} for name in CONFIGS if name in data},
        tasks=dict(sorted(Counter(task or "general data" for task in chat["task"]).items())),
        rejected=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        generator=config.generator,
        model=config.model,
        judge_model=config.judge_model,
        sampling={} if given else _used(config, _SAMPLING),
        # A prompt that names the context that is meant is not LongBench's own.
        longbench_prompts=sorted(({*chat["task"]} & {*TEMPLATES}) - named),
        prompts=(len(hashes), digest(*sorted(hashes))) if hashes else None,
        # What was run, rather than what was set: a given text is not checked for what only models do.
        checks=[name for name in config.checks if name in ran],
        neutralised=sum(any(check["outcome"] == NEUTRALISED for check in row) for row in checks),
        lengths=lengths,
        unit=unit,
        depths=[
            depth
            for number, depth in zip(chat["n_contexts"], chat["gold_depth"], strict=True)
            # A context that stands alone is everywhere.
            if number > 1 and depth is not None
        ],
        contexts=(min(contexts), max(contexts)) if contexts else None,
        seeds=_sources(data, config),
        decontaminated=[Path(name).name for name in config.decontaminate_against],
        ngram=config.decontaminate_ngram if config.decontaminate_against else None,
        cost=_cost(data, journal, budget),
        settings=_used(config, _SETTINGS if config.method != "context" or given else _WRITING + _SETTINGS),
        languages=[language] if language else [],
        hf_longalign=__version__,
    )


def _used(config: "ContextSynthesisConfig", names: tuple[str, ...]) -> dict[str, Any]:
    """The settings that shaped the rows: not those of a step that was not taken."""
    unused = {
        *(() if config.hard_share else ("hard_share", "hard_by")),
        *(() if config.difficulty else ("difficulty_use", "difficulty_share")),
        *(() if config.difficulty_use != "record" else ("difficulty_share",)),
        *(() if "length" in config.checks else ("min_words",)),
        *(() if config.facts_first else ("facts_first",)),
        *(() if config.general_share else ("general_share",)),
        *(() if config.test_share else ("test_share",)),
    }
    values = {name: getattr(config, name) for name in names if name not in unused}
    if "n_distractors" in values:
        # What was used where nothing was set.
        values["n_distractors"] = config.distractor_limit
    return {name: value for name, value in values.items() if value is not None}


def _outcomes(data: Data) -> Iterator[Dataset]:
    for name in ("contexts", "rejected"):
        yield from data.get(name, {}).values()


def _sources(data: Data, config: "ContextSynthesisConfig") -> list[DataSource]:
    """The files and Hub data sets of the seeds with the rows read from each; no folder of this machine."""
    named = config.seeds if config.method == "context" else config.documents
    if not isinstance(named, list) or not all(isinstance(source, str) for source in named):
        return []  # rows in memory, whose origin nobody knows
    names = [source.rpartition("=")[2] for source in named]
    # A file name is published, never its folder; of a Hub data set the whole id, which others can follow.
    on_hub = {Path(name).name: name for name in names if not Path(name).exists() and not Path(name).suffix}
    # A row that is over the budget stands among the contexts and among the rejected.
    origins = {
        (task, origin) for rows in _outcomes(data) for task, origin in zip(rows["task"], rows["origin"], strict=True)
    }
    counts = Counter((origin.rpartition(":")[0], task) for task, origin in origins)
    repositories = {file: name.partition("@")[0].partition(":")[0] for file, name in on_hub.items()}
    return [
        DataSource(repositories.get(file, file), rows, task, on_hub=file in on_hub)
        for (file, task), rows in sorted(counts.items())
        if file
    ]


def _cost(data: Data, journal: Path | None, budget: Budget | None) -> Cost | None:
    """What the replies behind the rows took; `None` where the journal does not hold them all."""
    keys = {key for rows in _outcomes(data) for found in rows["journal_keys"] for key in found}
    if not keys or journal is None or not journal.is_file():
        return None
    with Journal(journal) as held:
        replies, prompt, completion, usd = held.cost_of(keys)
    if replies < len(keys):
        return None
    if not usd and budget is not None:  # paid for before prices were given
        usd = budget.cost(prompt, completion).usd
    # Without prices a cost of $0.00 would be a lie.
    return Cost(replies, prompt, completion, usd or None)
