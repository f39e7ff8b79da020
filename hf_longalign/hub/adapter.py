"""Publishing a trained adapter, or a whole model, with its card, record and report on the Hub."""

import json
import logging
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_longalign.cards.card_file import renewed_card
from hf_longalign.cards.edits import is_own_card
from hf_longalign.hub.private import Machine
from hf_longalign.hub.push import CARD, MAX_FILES, Destination, push, write_dry_run
from hf_longalign.hub.scan import check_private
from hf_longalign.run_record import RECORD_NAME


logger = logging.getLogger(__name__)

# What is published; everything else of an output folder stays: optimiser state, pickles, checkpoints, journals, logs.
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PUBLISHED = (
    *WEIGHTS,
    *(CARD, "adapter_config.json", "config.json", "generation_config.json", "longalign_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("additional_chat_templates/*.jinja", "report.json", "report.md", "*.png", "assets/*.png"),
    *("evaluation/report.json", "evaluation/report.md", "evaluation/*.png"),
)
# Pictures that are drawn for a report or a card; others in a repository are a person's.
_DRAWN = ("needle_*.png", "perplexity.png", "coverage.png")
# Where a base model's name stands.
_NAMES = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}


def publish_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    dry_run: str | Path | None = None,
    allow: Collection[str] = (),
    resume_command: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push an adapter or a whole model as one commit, compare what arrived, and return its URL.

    Weights, configuration, tokenizer, card, training record and evaluation report go (`PUBLISHED`), all else of the
    folder stays and is named in the log. The card is README.md, renewed as `write_adapter_card` does it; one without
    any section of this package is a person's own and goes as it is, unless TRL or PEFT wrote it. Where the base model
    was a local folder, `base_model` takes its place in what is pushed; the folder itself is not touched. For the rest
    see [`publish_dataset`].

    Args:
        folder: what `LongAlignSFTTrainer` saved.
        repo_id: `user/name` or `organisation/name`; made if it is not there.
        base_model: Hub id, or any neutral name, of the base model; needed where the adapter names a local folder.
            Readers load a neutral name through `load_adapter(…, base_model=…)`.
        private: as in [`publish_dataset`], and so all that follow.
        branch: the same.
        create_pr: the same.
        tag: the same.
        dry_run: the same.
        allow: the same.
        resume_command: the same.
        token: the same.
        endpoint: the same.

    Raises:
        ValueError: no weights in the folder, neither a card nor the record to write it from, a base model that is a
            local folder, something private in what is about to go, or a repository that holds something else.
        PublishError: the push did not arrive whole; the message names what goes on with it.

    Example:

    ```python
    publish_adapter("outputs/qwen2.5-0.5b", "user/qwen2.5-0.5b-32k", private=True)
    ```
    """
    folder = Path(folder)
    selected = _select(folder)
    files: dict[str, Path | bytes] = {**selected, **_neutral(selected, base_model)}
    if CARD not in selected or not is_own_card(selected[CARD].read_text(encoding="utf-8")):
        if RECORD_NAME not in selected:
            raise ValueError(
                f"`folder` must hold README.md, or {RECORD_NAME} to write it from, got {folder} with neither. Write a "
                "card into it."
            )
        files[CARD] = renewed_card(folder, base_model=base_model).encode("utf-8")
    to = Destination(repo_id, "model", private, branch, create_pr, tag, token, endpoint)
    check_private(files, Machine.here(repo_id, base_model, token=token), allow)
    if dry_run is not None:
        return write_dry_run(files, to, dry_run)
    return push(files, to, owned=_is_owned, resume_command=resume_command)


def _is_published(name: str) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in PUBLISHED)


def _is_owned(name: str) -> bool:
    """Whether a later push may delete it: a picture that a person put there for the card is nothing of ours."""
    drawn = any(fnmatch(name.split("/")[-1], pattern) for pattern in _DRAWN)
    return _is_published(name) and (drawn or not name.endswith(".png"))


def _select(folder: Path) -> dict[str, Path]:
    """The files to publish by name; what stays is logged."""
    entries = [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
    names = {path.relative_to(folder).as_posix(): path for path in entries}
    files = {name: path for name, path in names.items() if path.is_file() and _is_published(name)}
    config = "adapter_config.json" if "adapter_model.safetensors" in files else "config.json"
    if config not in files or not any(fnmatch(n, p) for n in files for p in WEIGHTS):
        raise ValueError(
            f"`folder` must hold weights as safetensors and their {config}, got {folder} with {sorted(files)}. "
            "Save the model into it with `trainer.save_model`."
        )
    if len(files) > MAX_FILES:
        raise ValueError(
            f"`folder` must hold at most {MAX_FILES} files to be pushed as one commit, got {len(files)}. "
            "Save the model with a larger `max_shard_size`."
        )
    used = {*files, *(name.split("/")[0] for name in files)}
    left = [
        f"{name}/" if path.is_dir() else name for name, path in names.items() if "/" not in name and name not in used
    ]
    if left:
        logger.info("Not published: %s.", ", ".join(left))
    return files


def _neutral(files: Mapping[str, Path], base_model: str | None) -> dict[str, bytes]:
    """New contents of the files that name a local folder as the base model, with `base_model` in its place."""
    if base_model is not None and _is_local(base_model):
        raise ValueError(f"`base_model` must be a Hub id or a neutral name, got the local {base_model!r}. Name it so.")
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if _may_name(name)}
    named = {json.loads(texts[name]).get(key) for name, key in _NAMES.items() if name in texts}
    local = {name for name in named if isinstance(name, str) and _is_local(name)}
    if local and base_model is None:
        raise ValueError(
            f"`base_model` must be given where the base model is a local folder, got None and {sorted(local)[0]!r}. "
            "Set it to the model's Hub id, or to a neutral name."
        )
    changed = {}
    for name, text in texts.items():
        if name.endswith(".json"):
            value = json.loads(text)
            new = _renamed(value, local, base_model)
            if name == "adapter_config.json" and base_model is not None:
                new["base_model_name_or_path"] = base_model
            if new != value:
                changed[name] = (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
        else:
            for path in sorted(local, key=len, reverse=True):
                text = text.replace(path, str(base_model))
            if text != texts[name]:
                changed[name] = text.encode("utf-8")
    return changed


def _may_name(name: str) -> bool:
    return name == CARD or name.endswith("config.json")


def _renamed(value: Any, local: Collection[str], base_model: str | None) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, local, base_model) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, local, base_model) for item in value]
    return base_model if isinstance(value, str) and value in local else value


def _is_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", "\\")) or name[1:3] in (":\\", ":/") or Path(name).exists()
