"""Writing the card of an adapter or a whole model from the files beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_longalign.cards.adapter import adapter_card
from hf_longalign.cards.edits import merge_card
from hf_longalign.cards.facts import adapter_facts
from hf_longalign.hub.push import CARD


def write_adapter_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
) -> Path:
    """Write the README.md of an adapter, or of a whole model, from what lies in its folder, and return its path.

    Read are `adapter_config.json`, `longalign_config.json`, an evaluation's `report.json`, and the pictures in the
    folder and in its `assets`. What a person wrote into the card that is there stays, see [`merge_card`].

    Args:
        folder: what `LongAlignSFTTrainer` saved.
        repo_id: where it will be published; a push fills it in otherwise.
        base_model: Hub id of the base model, where the adapter names a local folder, and of a whole model.
        license: licence of the adapter, as the Hub names it.
        languages: ISO 639 codes.

    Raises:
        ValueError: no adapter and no model in the folder, or a card whose front matter or marks cannot be read.
    """
    path = Path(folder) / CARD
    card = renewed_card(folder, repo_id=repo_id, base_model=base_model, license=license, languages=languages)
    path.write_text(card, encoding="utf-8")
    return path


def renewed_card(folder: str | Path, **facts: Any) -> str:
    """Return what [`write_adapter_card`] writes, and write nothing; the arguments are the same."""
    folder = Path(folder)
    config = _read(folder / "adapter_config.json")
    if config is None and not (folder / "config.json").is_file():
        raise ValueError(
            f"`folder` must hold an adapter or a model, got {folder} without adapter_config.json and config.json. "
            "Save one into it."
        )
    base = (config or {}).get("base_model_name_or_path")
    if config is not None and base and Path(base).exists():  # a relative folder looks like a Hub id
        config["base_model_name_or_path"] = None
    images = [path for place in ("assets", ".") for path in sorted((folder / place).glob("*.png"))]
    card = adapter_card(
        adapter_facts(
            _read(folder / "longalign_config.json") or {},
            config,
            _read(folder / "report.json"),
            images=[path.relative_to(folder).as_posix() for path in images],
            **facts,
        )
    )
    path = folder / CARD
    return merge_card(card, path.read_text(encoding="utf-8") if path.is_file() else None)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
