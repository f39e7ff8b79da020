"""The card of a trained adapter or whole model: what it is, how to load it, how good it is, and how it was made."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from hf_longalign.cards.page import CARD, REPOSITORY, check_license, code, listed, merge_card, render, table
from hf_longalign.cards.scores import PICTURES, eval_results, headline, reaches, scores_note, scores_table
from hf_longalign.positions import BOUNDARY_STRATEGIES
from hf_longalign.records.report import Report, suite_of
from hf_longalign.records.training import HubSource, TrainingRecord, is_hub_id
from hf_longalign.run_record import load_record
from hf_longalign.serving import command_of


REPORT = "report.json"
# What a study tells of the adapter beside others: a section of its own, in Markdown.
STUDY = "study.md"
# Methods by their tag, with what is cited for them: what was not used must not be, for a citation is a claim.
METHODS = {"skipalign": "wu2024long", "pose": "zhu2023pose", "randpos": None, "cream": None}


def adapter_card(
    record: TrainingRecord,
    adapter_config: Mapping[str, Any] | None = None,
    report: Report | None = None,
    *,
    repo_id: str = REPOSITORY,
    base_model: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    tags: Sequence[str] = (),
    images: Sequence[str] = (),
    study: str = "",
) -> str:
    """Return the README.md of an adapter, or of a whole model.

    Args:
        record: of the training.
        adapter_config: `adapter_config.json` of PEFT; `None` of a whole model.
        report: of an evaluation.
        repo_id: `user/name`; unset, a placeholder stands there until it is pushed.
        base_model: Hub id of the base model, where `adapter_config` names a local folder, and of a whole model.
        license: licence of the adapter, as the Hub names it.
        languages: ISO 639 codes.
        tags: more tags.
        images: paths of pictures relative to the card.
        study: a section that stands as it is, before what is cited.

    Raises:
        ValueError: a licence that is no id of the Hub.

    Example:

    >>> from hf_longalign.records.training import PositionsRecord, RopeRecord
    >>> record = TrainingRecord(RopeRecord("llama"), PositionsRecord("skip_all", 32768, 0.5, 0))
    >>> card = adapter_card(record, {"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    >>> "| target length | 32,768 positions |" in card, "library_name: peft" in card
    (True, True)
    """
    check_license(license=license)  # the Hub says so only when everything was uploaded
    config, data, whole = adapter_config or {}, record.data, adapter_config is None
    base, strategy = _base(record, config, base_model), record.positions.strategy
    skipped, lora = strategy != "none", config.get("peft_type") == "LORA"
    method = "skipalign" if strategy in BOUNDARY_STRATEGIES else strategy
    metadata = ModelCardData(
        base_model=base.name if base else None,
        base_model_relation=("finetune" if whole else "adapter") if base else None,
        datasets=[data.name] if data else None,
        language=list(languages) or None,
        library_name="transformers" if whole else "peft",
        license=license,
        pipeline_tag="text-generation",
        tags=[
            *("hf_longalign", *(["long-context"] if skipped else []), *([method] if method in METHODS else [])),
            *(["lora"] if lora else []),
            *("trl", "sft", *(tag for tag in tags if tag not in ("trl", "sft", "hf_longalign"))),
        ],
        model_name=repo_id if report else None,
        eval_results=eval_results(report, repo_id) if report else None,
    )
    serving = None
    with suppress(ValueError):  # not every RoPE is known to be served as it was trained
        serving = command_of(record, adapter_config, repo_id, base_model=base.name if base else None)
    # One beside the card, drawn for a report, wins over one in a folder.
    paths = {PurePosixPath(path).stem: path for path in sorted(images, key=lambda path: -path.count("/"))}
    cited = {
        METHODS.get(method): True,
        "bai2024longalign": record.training.loss_weighting == "sequence",
        "bai2023longbench": report is not None and any(suite.suite == "longbench" for suite in report.suites),
        "vonwerra2020trl": True,
    }
    values = {
        "serving": serving,
        "record": record,
        "report": report,
        "base": base,
        "data": data,
        "whole": whole,
        "skipped": skipped,
        "keeps_blocks": strategy in BOUNDARY_STRATEGIES,
        "kind": ("model" if whole else "LoRA adapter" if lora else "adapter"),
        "name": repo_id,
        "scaled": '"factor"' in json.dumps(record.rope.rope_parameters),  # per layer type in some models
        "python": _python,
        "adapter": _adapter(config),
        "duration": duration,
        "distances": _distances(record),
        "study": study.strip(),
        "pictures": {name: (title, paths[name]) for name, title in PICTURES.items() if name in paths},
        "citations": [key for key, used in cited.items() if key and used],
        **{helper.__name__: helper for helper in (headline, reaches, scores_note, scores_table, suite_of)},
    }
    return render("adapter.md.jinja", metadata, values)


def _base(record: TrainingRecord, config: Mapping[str, Any], given: str | None) -> HubSource | None:
    named, known = config.get("base_model_name_or_path"), record.base
    name = next((name for name in (given, named, known.name if known else None) if is_hub_id(name)), None)
    if name is None:
        return None
    revision = known.revision if known and known.name == name else None
    return HubSource(name, revision or (config.get("revision") if named == name else None))


def _adapter(config: Mapping[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type") or "")
    targets = config.get("target_modules") or []
    # By the last part of their names: PEFT may list every module of every layer.
    names = [targets] if isinstance(targets, str) else sorted({name.rsplit(".", 1)[-1] for name in targets})
    modules = "" if isinstance(targets, str) or len(targets) == len(names) else f" ({len(targets):,} modules)"
    parts = [
        f"LoRA of rank {config['r']}" if "r" in config else "LoRA",
        f"alpha {config['lora_alpha']}" if config.get("lora_alpha") is not None else "",
        f"dropout {config['lora_dropout']:g}" if config.get("lora_dropout") else "",
        f"on {listed([code(name) for name in names])}{modules}" if names else "",
    ]
    return ", ".join(filter(None, parts))


def _distances(record: TrainingRecord) -> str:
    """Loss by distance as a table; empty where it was not watched."""
    found = record.distances
    if found is None:
        return ""
    curves = (("before training", found.before), ("after training", found.after))
    rows = [[name, *(f"{loss:.3f}" for loss in losses)] for name, losses in curves if losses is not None]
    columns = range(1, len(found.lengths) + 1)
    return table(["distance", *(f"{length:,}" for length in found.lengths)], rows, right=columns)


def duration(seconds: float) -> str:
    """Return a time as a person says it.

    >>> duration(59.4), duration(754), duration(9000)
    ('59 s', '12 min 34 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _python(value: Any, indent: str = "") -> str:
    """JSON data as Python, a line per key."""
    if not isinstance(value, Mapping):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    inner = indent + "    "
    lines = "".join(f"{inner}{json.dumps(key)}: {_python(item, inner)},\n" for key, item in value.items())
    return f"{{\n{lines}{indent}}}"


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

    The pictures in its `assets` are shown, and `report.json` with its own pictures and `study.md` if they are there.

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
    report = read_report(folder)
    # As the report names them, where there is one: an earlier one may have left pictures in the folder.
    images = [image.name for image in sorted(folder.glob("*.png")) if report is None or image.name in report.images]
    images += [f"assets/{image.name}" for image in sorted((folder / "assets").glob("*.png"))]
    study = (folder / STUDY).read_text(encoding="utf-8") if (folder / STUDY).is_file() else ""
    card = adapter_card(record, adapter_config, report, images=images, study=study, **facts)
    old = folder / CARD
    return merge_card(card, old.read_text(encoding="utf-8") if old.is_file() else None)


def read_report(folder: str | Path) -> Report | None:
    """Return the report of the evaluation in a folder; `None` where there is none.

    Raises:
        ValueError: a file that is no report of this package.
    """
    path = Path(folder) / REPORT
    return Report.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
