"""Where a run comes from and what it ran on, for its record: only what is known for certain, no path of a machine."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PretrainedConfig, TrainerState, TrainingArguments


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def base_source(config: PretrainedConfig, revision: str | None = None) -> dict[str, str] | None:
    """Return the Hub id of a loaded model and its commit; `None` for a model of this machine.

    Args:
        config: the loaded model's.
        revision: the branch, tag or commit it was loaded from; `None`: the default one.

    Example:

    >>> base_source(PretrainedConfig(name_or_path="/models/mine"))
    """
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or Path(name).is_absolute() or Path(name).exists():
        return None
    commit = loaded_commit(name, "config.json", revision)
    return None if commit is None else {"name": name, "revision": commit}


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
    """Return the versions of the libraries a run stands on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(args: TrainingArguments) -> str:
    """Return the devices of a run: the number of processes, and the name of this one's device."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    return f"{args.world_size} x {name}"


def run_facts(args: TrainingArguments, state: TrainerState, *, resumed: bool) -> dict[str, Any]:
    """Return how a run went: steps, batch, optimiser and, where it ran through from start to end, its time.

    Args:
        args: the arguments.
        state: the state, during or after training.
        resumed: whether it went on from a checkpoint; the time of the earlier part is not known then.
    """
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    seconds = next((log["train_runtime"] for log in reversed(state.log_history) if "train_runtime" in log), None)
    facts = {
        "steps": state.global_step,
        "epochs": None if state.epoch is None else round(float(state.epoch), 4),
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": float(args.learning_rate),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimiser": str(getattr(args.optim, "value", args.optim)),
        "precision": precision,
        "seconds": None if resumed else seconds,
    }
    return {name: value for name, value in facts.items() if value is not None}
