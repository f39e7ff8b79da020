"""The record of a training run, `longalign_config.json` beside the weights: gathered, saved and loaded.

Only what is known for certain stands in it, and no path of the machine that trained.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_longalign.records.base import dumps
from hf_longalign.records.training import HubSource, RunRecord, TrainingRecord, is_hub_id


if TYPE_CHECKING:  # a push reads the record without torch
    from transformers import PretrainedConfig, TrainerState, TrainingArguments

RECORD_NAME = "longalign_config.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
_HUB_FILE = re.compile(r"hf://datasets/([^@]+)@")
_COMMIT = re.compile(r"(?<=[/@\\])[0-9a-f]{40}(?=[/\\])")


def save_record(directory: str | Path, record: TrainingRecord) -> Path:
    """Write a record into the directory of a model or adapter and return the file's path."""
    path = Path(directory) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(record), encoding="utf-8")
    return path


def check_place(option: str, name: str | Path, file: str | None = None, revision: str | None = None) -> None:
    """Refuse what is no folder and cannot be a name on the Hub, which the libraries would call a bad Hub id.

    Args:
        file: what it must hold: `"config.json"` of a whole model, or `"adapter_config.json"`.

    Raises:
        ValueError: names the option.
        ConnectionError: as in [`model_file`].

    Example:

    >>> check_place("adapter", "outputs/run/lsat")
    Traceback (most recent call last):
    ...
    ValueError: `adapter` must be a folder or a Hub id, got 'outputs/run/lsat', which is not there. Correct the path.
    """
    if not Path(name).exists() and not is_hub_id(str(name)):
        raise ValueError(
            f"`{option}` must be a folder or a Hub id, got {str(name)!r}, which is not there. Correct the path."
        )
    if file is None or model_file(name, file, revision):
        return
    kind = "a whole model" if file == "config.json" else "an adapter"
    problem, remedy = f"has no {file}", "Give the folder or Hub id of one."
    if model_file(name, "adapter_config.json", revision):
        problem, remedy = "is an adapter", f"Run `hf-longalign merge {quote(str(name))} merged`, and give 'merged'."
    raise ValueError(f"`{option}` must be {kind}, got {str(name)!r}, which {problem}. {remedy}")


def model_file(model_id: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a model or adapter, a directory or a Hub id; `None` where it has no such file.

    Raises:
        ValueError: the Hub has no such repository or revision, or does not show it.
        ConnectionError: the Hub cannot be reached, and the cache does not know whether there is such a file.
    """
    if Path(model_id).is_dir():
        path = Path(model_id) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(model_id), name, revision=revision))
    except LocalEntryNotFoundError as error:
        # Of a file that the Hub has once said not to have the cache keeps a mark; what is merely not there may exist.
        if try_to_load_from_cache(str(model_id), name, revision=revision) is _CACHED_NO_EXIST:
            return None
        # Not the folder in the cache: it holds what was asked for so far, and may lack this very file.
        command = f"hf download {model_id}{f' --revision {revision}' if revision else ''} --local-dir FOLDER"
        raise ConnectionError(
            f"`{model_id}` is no folder here, its {name} is not in the cache, and the Hub cannot be asked whether it "
            f"has one. Correct a path; or go on with a connection, or where there is one run `{command}`, and give "
            "that folder."
        ) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"`{model_id}`{at} must be a folder, or on the Hub and open to you, got {type(error).__name__}. Correct "
            "the name, or log in with `hf auth login`."
        ) from error


def load_record(model_id: str | Path, revision: str | None = None) -> TrainingRecord:
    """Return the record of a model or adapter, a directory or a Hub id.

    Raises:
        ValueError: there is none, or it cannot be read.
        ConnectionError: it is not in the cache, and the Hub cannot be reached.
    """
    path = model_file(model_id, RECORD_NAME, revision)
    if path is None:
        raise ValueError(
            f"`{model_id}` has no {RECORD_NAME}, so it was not saved by `LongAlignSFTTrainer`. Load it with "
            "`peft.PeftModel.from_pretrained` on a base model that has the RoPE it was trained with."
        )
    try:
        return TrainingRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` must hold a JSON object, got {error}. Save the record again.") from error


def base_source(config: "PretrainedConfig", revision: str | None = None) -> HubSource | None:
    """Return the Hub id of a loaded model and its commit; `None` for a model of this machine.

    Args:
        config: the loaded model's.
        revision: the branch, tag or commit it was loaded from; `None`: the default one.

    Example:

    >>> from transformers import PretrainedConfig
    >>> base_source(PretrainedConfig(name_or_path="/models/mine"))
    """
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or Path(name).is_absolute() or Path(name).exists():
        return None
    # A name does not tell the Hub from a folder that has gone since; the cache knows what came from there.
    commit = loaded_commit(name, "config.json", revision)
    return None if commit is None else HubSource(name, commit)


def data_source(dataset: Any) -> HubSource | None:
    """Return where on the Hub a data set comes from, read from the data set itself; `None` where it does not say.

    A data set keeps its source through `map`, `filter`, `shuffle`, `select` and `train_test_split`; one that was
    joined from several, or lies in memory alone, has none.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`.
    """
    info = getattr(dataset, "info", None)
    if info is None or info.builder_name is None:  # `concatenate_datasets` leaves it out
        return None
    paths = [file["filename"] for file in getattr(dataset, "cache_files", [])]
    streamed = getattr(dataset, "_ex_iterable", None)
    while streamed is not None:  # each `map` and `filter` wraps what it reads from
        paths += getattr(streamed, "kwargs", {}).get("files", [])
        streamed = getattr(streamed, "ex_iterable", None)
    commits = {found[0] for path in paths if (found := _COMMIT.search(str(path)))}
    if len(commits) != 1:
        return None
    commit = commits.pop()
    # The folder of a prepared data set spells the name in another way (`MyRows` as `my_rows`); that of the download
    # is exact.
    names = {found[1] for path in paths if (found := _HUB_FILE.match(str(path)))}
    downloads = Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}")
    names |= {"/".join(path.parts[-3].split("--")[1:]) for path in downloads}
    split = None if dataset.split is None else str(dataset.split)
    return HubSource(names.pop(), commit, info.config_name, split) if len(names) == 1 else None


def loaded_commit(name: str, file: str, revision: str | None = None) -> str | None:
    """Return the commit at which this machine last loaded a file of the Hub; `None` where it did not.

    >>> loaded_commit("org/never-loaded", "config.json")
    """
    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # no name that a repository can have
        return None
    # What came from the Hub is in the cache, in a folder named after the commit.
    return Path(path).parent.name if isinstance(path, str) else None


def versions() -> dict[str, str]:
    """Return the versions of the libraries a run stands on, all of which this package requires."""
    return {name: version(name) for name in PACKAGES}


def hardware(args: "TrainingArguments") -> str:
    """Return the devices of a run: the number of processes, and the name of this one's device."""
    import torch

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    return f"{args.world_size} x {name}"


def run_facts(args: "TrainingArguments", state: "TrainerState", *, resumed: bool, copies: int = 1) -> RunRecord:
    """Return how a run went.

    Args:
        args: the arguments.
        state: the state, during or after training.
        resumed: whether it went on from a checkpoint; the time of the earlier part is not known then.
        copies: how many processes share one model and so a batch.
    """
    # The last one: every `train` of a trainer adds its own.
    seconds = next((log["train_runtime"] for log in reversed(state.log_history) if "train_runtime" in log), None)
    return RunRecord(
        steps=state.global_step,
        epochs=None if state.epoch is None else round(float(state.epoch), 4),
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size // copies,
        learning_rate=float(args.learning_rate),
        schedule=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        precision="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        seconds=None if resumed else seconds,
    )
