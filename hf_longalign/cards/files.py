"""The card of an adapter or a whole model, made from the files beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_longalign.cards.adapter import adapter_card
from hf_longalign.cards.page import CARD, merge_card
from hf_longalign.records.report import Report
from hf_longalign.records.training import TrainingRecord
from hf_longalign.run_record import load_record


REPORT = "report.json"


def write_adapter_card(folder: str | Path, **facts: Any) -> Path:
    """Write the README.md of an adapter, or of a whole model, and return its path; see [`render_card`]."""
    path = Path(folder) / CARD
    path.write_text(render_card(folder, **facts), encoding="utf-8")
    return path


def render_card(
    folder: str | Path,
    *,
    record: TrainingRecord | None = None,
    adapter_config: Mapping[str, Any] | None = None,
    **facts: Any,
) -> str:
    """Return the README.md of an adapter, or of a whole model, with what people wrote into the one that is there.

    The pictures in the folder and in its `assets` are shown, and `report.json` if it is there.

    Args:
        folder: where the card goes.
        record: of the training; `None`: `longalign_config.json` of the folder.
        adapter_config: of PEFT; `None`: `adapter_config.json` of the folder, without which it is a whole model.
        **facts: the other arguments of [`adapter_card`].

    Raises:
        ValueError: no record, a file that cannot be read, or a card whose front matter or marks cannot.
    """
    folder = Path(folder)
    record = record or load_record(folder)
    path = folder / "adapter_config.json"
    if adapter_config is None and path.is_file():
        adapter_config = json.loads(path.read_text(encoding="utf-8"))
    if adapter_config is not None and Path(adapter_config.get("base_model_name_or_path") or "").exists():
        adapter_config = {**adapter_config, "base_model_name_or_path": None}  # a relative folder looks like a Hub id
    images = [image for place in (".", "assets") for image in sorted((folder / place).glob("*.png"))]
    names = [image.relative_to(folder).as_posix() for image in images]
    card = adapter_card(record, adapter_config, read_report(folder), images=names, **facts)
    old = folder / CARD
    return merge_card(card, old.read_text(encoding="utf-8") if old.is_file() else None)


def read_report(folder: str | Path) -> Report | None:
    """Return the report of the evaluation in a folder; `None` where there is none.

    Raises:
        ValueError: a file that is no report of this package.
    """
    path = Path(folder) / REPORT
    return Report.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
