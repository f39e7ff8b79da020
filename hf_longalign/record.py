"""The record of a training run, one JSON file beside the weights: positions, RoPE, coverage."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


RECORD_NAME = "longalign_config.json"


def save_record(directory: str | Path, record: dict[str, Any]) -> Path:
    """Write a JSON-able record into a model or adapter directory and return the file's path."""
    path = Path(directory) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def load_record(model_id: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Return the record of a model or adapter, a directory or a Hub id.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = Path(model_id) / RECORD_NAME
    if not Path(model_id).is_dir():
        try:
            path = Path(hf_hub_download(str(model_id), RECORD_NAME, revision=revision))
        except EntryNotFoundError as error:
            raise ValueError(_missing(model_id)) from error
    if not path.is_file():
        raise ValueError(_missing(model_id))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` must hold a JSON object, got {error}. Save the record again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got {type(record).__name__}. Save the record again.")
    return record


def _missing(model_id: str | Path) -> str:
    return (
        f"`{model_id}` has no {RECORD_NAME}, so it was not saved by `LongAlignSFTTrainer`. Load it with "
        "`peft.PeftModel.from_pretrained` on a base model that has the RoPE it was trained with."
    )
