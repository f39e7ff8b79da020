"""Publishing a data set, or a trained adapter or whole model, with its card."""

import json
import logging
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_longalign.cards.adapter import read_report, render_card
from hf_longalign.cards.page import CARD, REPOSITORY, is_ours, is_template
from hf_longalign.cards.scores import hub_results
from hf_longalign.hub.push import MAX_FILES, Destination, push, write_dry_run
from hf_longalign.hub.scan import Machine, check_private
from hf_longalign.records.report import SUITES
from hf_longalign.records.training import is_local_path
from hf_longalign.run_record import RECORD_NAME


logger = logging.getLogger(__name__)

# What the folder of a data set may hold, and a shard as the synthesis and `datasets` name it:
# <configuration>/<split>-00000-of-00001.parquet
_DATASET = re.compile(r"README\.md|.+\.parquet|assets/[^/]+\.png")
_SHARD = re.compile(r"[^/]+/[^/]+-\d{5}-of-\d{5}\.parquet")
# What of a model's folder is published; all else stays: optimiser state, pickles, checkpoints, journals, logs.
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PUBLISHED = (
    *WEIGHTS,
    *(CARD, "adapter_config.json", "config.json", "generation_config.json", "longalign_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("additional_chat_templates/*.jinja", "report.json", "report.md", "study.md", "*.png", "assets/*.png"),
    *("evaluation/report.json", "evaluation/report.md", "evaluation/*.png", ".eval_results/*.yaml"),
)
# Pictures that are drawn for a report or a card, and results written for the Hub; others in a repository are a
# person's.
_DRAWN = ("needle_*.png", "puzzles_*.png", "ruler_*.png", "perplexity.png", "coverage.png", "distances.png")
_RESULTS = tuple(f".eval_results/{suite}.yaml" for suite in SUITES)
# Arguments of a push as the command line calls them.
_OPTIONS = {
    "base_model": "--base_name",
    "private": "--hub_private_repo",
    "branch": "--hub_revision",
    "tag": "--tag",
    "dry_run": "--push_dry_run",
    "license": "--license",
}
# Where a base model's name stands.
_NAMES = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}


def publish_dataset(
    folder: str | Path,
    repo_id: str,
    *,
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
    """Push a folder written by the synthesis as one commit, compare what arrived, and return the data set's URL.

    Everything that is about to go is searched for tokens, keys, local paths and the names of this machine first. Data
    and card travel in the same commit, and shards of an earlier push that are no longer there are deleted in it: a
    reader sees the old data set or the new one. What people wrote into the card on the Hub stays. The whole push is
    repeated over failures that pass; after a commit whose answer was lost the repetition changes nothing.

    Args:
        folder: holds `README.md`, a folder of Parquet files per configuration, and the card's pictures in `assets`.
        repo_id: `user/name` or `organisation/name`; made if it is not there.
        private: whether a new repository is private; one that is there must be as said. `None`: its owner's default.
        branch: pushed to instead of main; made from main if it is not there.
        create_pr: open a pull request instead; its URL is returned.
        tag: a name for this version, new in the repository.
        dry_run: an absent or empty folder: write there what would be pushed, push nothing and return the folder.
        allow: texts that the search finds and that may be seen by everyone; a folder allows what lies in it.
        resume_command: the command that goes on after a failure, for its message; `None`: one that makes this call.
        token: a token with the right to write; `None`: the one of this machine.
        endpoint: URL of the Hub; `None`: the one of `HF_ENDPOINT`.

    Raises:
        ValueError: something private in the folder; a folder with other files, without card or data, or with too many
            files for one commit; a repository that holds something else.
        PublishError: the push did not arrive whole; the message names what goes on with it.

    Example:

    ```python
    publish_dataset("outputs/contexts", "user/contexts", dry_run="look")
    publish_dataset("outputs/contexts", "user/contexts", private=True, tag="v1")
    ```
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if CARD not in files or not any(name.endswith(".parquet") for name in files):
        raise ValueError(f"`folder` must hold README.md and Parquet files, got {folder}. Write it with the synthesis.")
    # What else lies there, a journal or a log, was not meant for everyone.
    other = sorted(name for name in files if not _DATASET.fullmatch(name))
    if other:
        raise ValueError(
            f"`folder` must hold README.md, Parquet files and assets/*.png alone, got {other[0]}. Move it elsewhere."
        )
    _check_number(files, "Write fewer shards, each up to 5 GB.")
    to = Destination(repo_id, "dataset", private, branch, create_pr, tag, token, endpoint)
    return _send(files, to, folder, lambda name: bool(_SHARD.fullmatch(name)), dry_run, allow, resume_command)


def publish_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    dry_run: str | Path | None = None,
    allow: Collection[str] = (),
    message: str | None = None,
    resume_command: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push an adapter or a whole model as one commit, compare what arrived, and return its URL.

    Weights, configuration, tokenizer, card, training record and evaluation report go (`PUBLISHED`), all else of the
    folder stays and is named in the log. The card is written anew, see `hf_longalign.cards.merge_card`; one without
    marks is a person's own and goes as it is. The scores of `report.json` go as the Hub's `.eval_results` too. Where
    the base model was a local folder, `base_model` takes its place in what is pushed. The folder itself is not
    touched. For the rest see [`publish_dataset`].

    Args:
        folder: what `LongAlignSFTTrainer` saved.
        repo_id: `user/name` or `organisation/name`; made if it is not there.
        base_model: Hub id, or any neutral name, of the base model; needed where the adapter names a local folder.
            Readers load a neutral name through `load_adapter(…, base_model=…)`.
        license, languages: for the card, a person's own too: as the Hub names them, and ISO 639 codes.
        message: of the commit.
        private, branch, create_pr, tag, dry_run, allow, resume_command, token, endpoint: as in [`publish_dataset`].

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
    card = selected[CARD].read_text(encoding="utf-8") if CARD in selected else ""
    # Whose it is turns out when it is pushed.
    named = repo_id if "/" in repo_id else REPOSITORY
    facts: dict[str, Any] = {"base_model": base_model, "license": license, "languages": languages}
    if not card.strip() or is_ours(card) or is_template(card) or license or languages:
        if RECORD_NAME not in selected:
            raise ValueError(
                f"`folder` must hold {RECORD_NAME} to write a card from, got {folder} without. Write README.md into "
                "it, with license and languages in its front matter, and give neither here."
            )
        # Written anew and not taken as it lies there: a report may have come after the training.
        files[CARD] = render_card(folder, repo_id=named, **facts).encode("utf-8")
    report = read_report(folder)
    if report is not None:
        # What an earlier report left in the folder tells of scores that this one does not hold.
        earlier = {name for name in files if "/" not in name and _is_drawn(name)} - set(report.images)
        files = {name: content for name, content in files.items() if name not in (*earlier, *_RESULTS)}
        files |= hub_results(report, named)
    to = Destination(
        repo_id, "model", private, branch, create_pr, tag, token, endpoint, message or Destination.message
    )
    return _send(files, to, folder, _is_owned, dry_run, allow, resume_command, **facts)


def _send(
    files: Mapping[str, Path | bytes],
    to: Destination,
    folder: Path,
    owned: Callable[[str], bool],
    dry_run: str | Path | None,
    allow: Collection[str],
    resume_command: str | None,
    **facts: Any,
) -> str:
    """Search what is about to go, then push it, or write it where a person looks at it first."""
    # Before a dry run too: what a person looks at must be what may go.
    check_private(files, Machine.here(to.repo_id, facts.get("base_model"), token=to.token), allow)
    if dry_run is not None:
        return write_dry_run(files, to, dry_run)
    if resume_command is None:
        given = {name: getattr(to, name) for name in ("repo_id", "private", "branch", "create_pr", "tag")}
        resume_command = publish_command(folder, **given, **facts, allow=allow)
    return push(files, to, owned=owned, resume_command=resume_command)


def publish_command(folder: str | Path, repo_id: str, **given: Any) -> str:
    """Return a push as one command of a shell, which keeps what is typed: so without a token.

    `given` are the other arguments of [`publish_dataset`] and [`publish_adapter`] that the command has.

    >>> publish_command("out", "user/rows", tag="v1", allow=["/data/my rows"])
    "hf-longalign push out --hub_model_id user/rows --tag v1 --allow '/data/my rows'"
    """
    words = ["hf-longalign", "push", str(folder), "--hub_model_id", repo_id]
    for name, option in _OPTIONS.items():
        if given.get(name) is not None:
            words += [option, str(given[name])]
    words += ["--create_pr"] if given.get("create_pr") else []
    for name in ("languages", "allow"):
        words += [f"--{name}", *given[name]] if given.get(name) else []
    return shlex.join(words)


def _is_published(name: str) -> bool:
    # `*` of fnmatch matches slashes too.
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in PUBLISHED)


def _is_owned(name: str) -> bool:
    """Whether a later push may delete it: what a person put there for the card is nothing of ours."""
    if name.startswith(".eval_results/"):
        return name in _RESULTS
    return _is_published(name) and (_is_drawn(name) or not name.endswith(".png"))


def _is_drawn(name: str) -> bool:
    return any(fnmatch(name.split("/")[-1], pattern) for pattern in _DRAWN)


def _select(folder: Path) -> dict[str, Path]:
    """The files of a model to publish by name; what stays is logged."""
    # Not deeper: what is published lies at the top or one folder down.
    entries = [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
    names = {path.relative_to(folder).as_posix(): path for path in entries}
    files = {name: path for name, path in names.items() if path.is_file() and _is_published(name)}
    config = "adapter_config.json" if "adapter_model.safetensors" in files else "config.json"
    if config not in files or not any(fnmatch(n, p) for n in files for p in WEIGHTS):
        raise ValueError(
            f"`folder` must hold weights as safetensors and their {config}, got {folder} with {sorted(files)}. "
            "Save the model into it with `trainer.save_model`."
        )
    _check_number(files, "Save the model with a larger `max_shard_size`.")
    used = {name.split("/")[0] for name in files}
    left = [
        f"{name}/" if path.is_dir() else name for name, path in names.items() if "/" not in name and name not in used
    ]
    if left:
        logger.info("Not published: %s.", ", ".join(left))
    return files


def _check_number(files: Collection[str], remedy: str) -> None:
    if len(files) > MAX_FILES:
        raise ValueError(
            f"`folder` must hold at most {MAX_FILES} files to be pushed as one commit, got {len(files)}. {remedy}"
        )


def _neutral(files: Mapping[str, Path], base_model: str | None) -> dict[str, bytes]:
    """New contents of the files that name a local folder as the base model, with `base_model` in its place."""
    if base_model is not None and _is_local(base_model):
        raise ValueError(f"`base_model` must be a Hub id or a neutral name, got the local {base_model!r}. Name it so.")
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if name == CARD or name.endswith("config.json")
    }
    # transformers and peft write the folder a model was loaded from into these files.
    named = {json.loads(texts[name]).get(key) for name, key in _NAMES.items() if name in texts}
    # The longest first: one folder may lie in another.
    local = sorted((name for name in named if name and _is_local(name)), key=len, reverse=True)
    if local and base_model is None:
        raise ValueError(
            f"`base_model` must be given where the base model is a local folder, got None and {local[-1]!r}. "
            "Set it (`base_name` of the command line) to the model's Hub id, or to a neutral name."
        )

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [renamed(inner) for inner in value]
        return base_model if value in local else value

    changed = {}
    for name, text in texts.items():
        new = text
        if name == CARD:
            for path in local:
                new = new.replace(path, str(base_model))
        else:
            value = renamed(json.loads(text))
            if name == "adapter_config.json" and base_model is not None:
                value["base_model_name_or_path"] = base_model
            if value != json.loads(text):  # else it goes as it was written
                new = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        if new != text:
            changed[name] = new.encode("utf-8")
    return changed


def check_base_name(base_name: str | None, base: str | None) -> None:
    """Refuse to train or evaluate for a push that has no name for its base.

    Raises:
        ValueError: the base is a local folder and has no public name.

    >>> check_base_name(None, "org/model")
    """
    if base and base_name is None and _is_local(base):
        raise ValueError(
            "`base_name` must be given to publish what a local folder was the base of, got None with "
            f"{base!r}. Set it to the model's Hub id, or to a neutral name."
        )


def _is_local(name: str) -> bool:
    return is_local_path(name) or Path(name).exists()
