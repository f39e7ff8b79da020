"""Publishing on the Hub: the options that every command has for it, the push itself, and the command `push`."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub import get_token

from hf_longalign.commands.options import OptionParser
from hf_longalign.hub import Destination, check_dry_run, publish_adapter, publish_command, publish_dataset
from hf_longalign.options import option
from hf_longalign.training_options import CardOptions


if TYPE_CHECKING:
    from transformers import TrainingArguments

    Hub: TypeAlias = "RepositoryOptions | TrainingArguments"  # whose fields have the same names


@dataclass
class RepositoryOptions:
    """Where to push, under the names that `transformers.TrainingArguments` has for it."""

    hub_model_id: str | None = option(
        None, "The repository, user/name; unset: called as the folder that is published."
    )
    hub_private_repo: bool | None = option(None, "Whether a new repository is private; unset: as its owner has it.")
    hub_revision: str | None = option(None, "Branch to push to; unset: main.")


@dataclass
class HubOptions(RepositoryOptions):
    """Where to push, and whether to."""

    push_to_hub: bool = option(False, "Publish the result on the Hub.")


@dataclass
class PublishOptions:
    """How a push is made."""

    create_pr: bool = option(False, "Open a pull request instead of pushing to main.")
    tag: str | None = option(None, "Tag what was pushed, such as v1.0.")
    push_dry_run: str | None = option(None, "Write exactly the files of a push into this folder, and push nothing.")
    allow: list[str] = option(
        [],
        "Texts that look private and may be seen by everyone, such as a path in a row; a folder allows "
        "what lies in it.",
    )

    def check_idle(self, *, push_to_hub: bool) -> None:
        """Refuse options of a push where there is none."""
        given = next((name for name in ("push_dry_run", "create_pr", "tag") if getattr(self, name)), None)
        if given is not None and not push_to_hub:
            raise ValueError(
                f"`{given}` needs `push_to_hub`, got {getattr(self, given)!r} alone. Set `push_to_hub` too."
            )

    def check_push(self, hub: "Hub", folder: str | Path, token: str | None = None) -> None:
        """Refuse before the work what would be refused after it."""
        # The same rules hold for both types of repositories.
        Destination(**destination(hub, folder), repo_type="model", create_pr=self.create_pr, tag=self.tag).check()
        if self.push_dry_run is not None:
            check_dry_run(self.push_dry_run)
        elif (token or get_token()) is None:
            raise ValueError(
                "`push_to_hub` needs a token with the right to write, got none. Run `hf auth login` first."
            )

    def options(self) -> dict[str, Any]:
        """Return them as arguments of `publish_dataset`, `publish_adapter` and `trainer.push_to_hub`."""
        return {"create_pr": self.create_pr, "tag": self.tag, "allow": self.allow, "dry_run": self.push_dry_run}

    def push(self, publish: Callable[..., str], command: str) -> str:
        """Publish, and return what to tell the user."""
        try:
            url = publish(**self.options())
        except ValueError as error:
            raise ValueError(f"{error} The work is done; once that is mended, publish it with: {command}") from error
        return f"Published {url}" if self.push_dry_run is None else f"Nothing pushed; what would be is in {url}"


def destination(hub: "Hub", folder: str | Path) -> dict[str, Any]:
    """Return where a push goes as arguments of `publish_dataset`; a repository without a name is called as the folder.

    >>> destination(HubOptions(hub_model_id="user/rows"), "outputs/contexts")
    {'repo_id': 'user/rows', 'private': None, 'branch': None}
    >>> destination(HubOptions(), "outputs/contexts")["repo_id"]
    'contexts'
    """
    repo_id = hub.hub_model_id or Path(folder).resolve().name
    return {"repo_id": repo_id, "private": hub.hub_private_repo, "branch": hub.hub_revision}


def same_command() -> str:
    """Return the command that started this process; what it leaves on disk makes the second run short."""
    # `python -m` puts the path of __main__.py there, which nobody would type.
    program = Path(sys.argv[0])
    start = ["-m", "hf_longalign"] if program.name == "__main__.py" else [str(program)]
    start = ["hf-longalign"] if program.name == "hf-longalign" else ["python", *start]
    return shlex.join([*start, *sys.argv[1:]])


DESCRIPTION = """Publish a folder on the Hub as one commit: a data set, an adapter or a whole model, by what it holds.

    hf-longalign push outputs/contexts --hub_model_id user/contexts --hub_private_repo true
    hf-longalign push outputs/qwen2.5-0.5b --hub_model_id user/qwen2.5-0.5b-32k --create_pr
    hf-longalign push outputs/qwen2.5-0.5b --push_dry_run look         # write what would go, and push nothing"""
CONFIGS = ("adapter_config.json", "config.json")


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the folder, where it goes and how."""
    parser = OptionParser("push", (RepositoryOptions, PublishOptions, CardOptions), DESCRIPTION)
    parser.add_argument("folder", help="what to publish")
    hub, publish, card, more = parser.read(arguments, check)
    return Path(more.folder), hub, publish, card


def check(hub: RepositoryOptions, publish: PublishOptions, card: CardOptions, more: argparse.Namespace) -> None:
    """Refuse what is wrong with several of the options together."""
    folder = Path(more.folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be there, got {more.folder!r}. Correct the path.")
    publish.check_push(hub, folder)
    if not _is_model(folder) and any(card.card().values()):
        raise ValueError(
            f"`license`, `languages` and `base_name` are for adapters and models, got a data set in {folder}. Leave "
            "them out; give `license` to `synthesize`, whose card tells it."
        )


def run(folder: Path, hub: RepositoryOptions, publish: PublishOptions, card: CardOptions) -> int:
    """Push it."""
    to = destination(hub, folder)
    push: Callable[..., str] = publish_dataset
    if _is_model(folder):
        to, push = {**to, **card.card()}, publish_adapter
    print(publish.push(partial(push, folder, **to), publish_command(folder, **to, **publish.options())))
    return 0


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CONFIGS)
