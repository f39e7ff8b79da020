"""What an adapter's files tell of it: the facts its card is made from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from hf_longalign.cards.markdown import code


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
IMAGES = {
    "needle_accuracy": "Accuracy by context length",
    "needle_heatmap": "Accuracy by depth and length",
    "perplexity": "Perplexity by position",
    "coverage": "Relative distances covered in training",
}


@dataclass(frozen=True)
class Data:
    """A data set of the Hub that was trained on."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter or a whole model; what is empty or `None` is not known and not in the card.

    Attributes:
        record: `longalign_config.json`, see `LongAlignSFTTrainer.training_record`.
        adapter_config: `adapter_config.json` of PEFT.
        report: `report.json` of an evaluation of base and adapter.
        base_model: Hub id of the base model, and its revision.
        data: what was trained on.
        images: paths of pictures relative to the card, by name without ending, see `IMAGES`.
        license: licence of the adapter, as the Hub names it.
        languages: ISO 639 codes.
        repo_id: `user/name`; a placeholder stands there until the adapter is pushed.
        whole: whether all weights are there, and no adapter.
    """

    record: Mapping[str, Any]
    adapter_config: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    base_model: str | None = None
    base_revision: str | None = None
    data: Data | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    languages: Sequence[str] = ()
    repo_id: str | None = None
    whole: bool = False


def adapter_facts(
    record: Mapping[str, Any],
    adapter_config: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    images: Sequence[str] | None = None,
) -> AdapterFacts:
    """Return the facts that the files of an adapter or a whole model hold.

    Args:
        record: `longalign_config.json`.
        adapter_config: `adapter_config.json`; `None` of a whole model.
        report: `report.json`.
        repo_id: `user/name` of the adapter.
        base_model: Hub id of the base model, where the files name a local folder.
        dataset: Hub id of the data set, where the record does not hold it.
        license: licence of the adapter.
        languages: ISO 639 codes.
        images: paths of the pictures relative to the card; `None`: those of the report.

    Example:

    >>> facts = adapter_facts({"base": {"name": "/home/me/model"}}, {"base_model_name_or_path": "Qwen/Qwen3-4B"})
    >>> facts.base_model, facts.data
    ('Qwen/Qwen3-4B', None)
    """
    config, base = adapter_config or {}, record.get("base") or {}
    names = (base_model, config.get("base_model_name_or_path"), base.get("name"))
    name = next((name for name in names if is_hub_id(name)), None)
    revision = base.get("revision") if base.get("name") == name else None
    if config.get("base_model_name_or_path") == name:
        revision = revision or config.get("revision")
    found = record.get("data") or {}
    if dataset is not None and dataset != found.get("name"):
        found = {"name": dataset}
    paths = (report or {}).get("images") or [] if images is None else images
    return AdapterFacts(
        record=record,
        adapter_config=config,
        report=report,
        base_model=name,
        base_revision=revision,
        data=Data(**found) if is_hub_id(found.get("name")) else None,
        images={PurePosixPath(path).stem: path for path in paths},
        license=license,
        languages=languages,
        repo_id=repo_id,
        whole=adapter_config is None,
    )


def is_hub_id(name: str | None) -> bool:
    """Return whether a name can be that of a repository of the Hub; a path of this machine is none of a reader's.

    >>> is_hub_id("Qwen/Qwen3-4B"), is_hub_id("/home/me/model"), is_hub_id("outputs/run/last"), is_hub_id(None)
    (True, False, False, False)
    """
    return name is not None and HUB_ID.fullmatch(name) is not None


def model_link(name: str, revision: str | None = None) -> str:
    """Return a link to a model and its revision."""
    link = f"[{name}](https://huggingface.co/{name})"
    return f"{link} at revision {code(revision)}" if revision else link


def data_link(data: Data) -> str:
    """Return a link to a data set with its configuration, split and revision."""
    link = f"[{data.name}](https://huggingface.co/datasets/{data.name})"
    details = [f"configuration {code(data.config)}" if data.config and data.config != "default" else ""]
    details += [f"split {code(data.split)}" if data.split else ""]
    details += [f"revision {code(data.revision)}" if data.revision else ""]
    known = ", ".join(detail for detail in details if detail)
    return f"{link} ({known})" if known else link


def show_image(facts: AdapterFacts, stem: str) -> str:
    """Return a picture; empty where there is none."""
    return f"![{IMAGES[stem]}]({facts.images[stem]})" if stem in facts.images else ""
