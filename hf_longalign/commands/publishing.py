"""The options with which every command publishes on the Hub, and the push itself."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import get_token

from hf_longalign.hub.push import Destination, check_dry_run


class Hub(Protocol):
    """Where a push goes: `HubOptions`, or the fields of the same names in `transformers.TrainingArguments`."""

    hub_model_id: str | None
    hub_private_repo: bool | None
    hub_revision: str | None


@dataclass
class HubOptions:
    """Whether to push and where to, under the names that `transformers.TrainingArguments` has for it."""

    push_to_hub: bool = field(default=False, metadata={"help": "Publish the result on the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The repository, user/name; unset: called as the folder that is published."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; unset: as its owner has it."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to; unset: main."})


@dataclass
class PublishOptions:
    """How a push is made."""

    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of pushing to main."})
    tag: str | None = field(default=None, metadata={"help": "Tag what was pushed, such as v1.0."})
    push_dry_run: str | None = field(
        default=None, metadata={"help": "Write exactly the files of a push into this folder, and push nothing."}
    )
    allow: list[str] = field(
        default_factory=list,
        metadata={"help": "Texts that look private and may be seen by everyone, such as a path in the data."},
    )

    def check_push(self, hub: Hub, folder: str | Path, token: str | None = None) -> None:
        """Refuse before the work what would be refused after it."""
        Destination(repository(hub, folder), "model", None, hub.hub_revision, self.create_pr, self.tag).check()
        if self.push_dry_run is not None:
            check_dry_run(self.push_dry_run)
        elif (token or get_token()) is None:
            raise ValueError(
                "`push_to_hub` needs a token with the right to write, got none. Run `hf auth login` first."
            )

    def push(
        self,
        publish: Callable[..., str],
        folder: str | Path,
        hub: Hub,
        *,
        repo_id: str | None = None,
        resume_command: str | None = None,
        **options: Any,
    ) -> str:
        """Publish a folder, and return what to tell the user.

        Args:
            publish: `publish_dataset` or `publish_adapter`.
            folder: what to publish.
            hub: where.
            repo_id: the repository, where the folder is only a copy of what is published.
            resume_command: what goes on after a failure; `None`: `hf-longalign push`, which repeats none of the work
                that the folder comes from.
            **options: more arguments of `publish`.
        """
        repo_id = repo_id or repository(hub, folder)
        command = resume_command or self._command(folder, repo_id, hub, options)
        try:
            url = publish(
                folder,
                repo_id,
                private=hub.hub_private_repo,
                branch=hub.hub_revision,
                create_pr=self.create_pr,
                tag=self.tag,
                dry_run=self.push_dry_run,
                allow=self.allow,
                resume_command=command,
                **options,
            )
        except ValueError as error:
            raise ValueError(f"{error} The work is done; once that is mended, publish it with: {command}") from error
        return f"Published {url}" if self.push_dry_run is None else f"Nothing pushed; what would be is in {url}"

    def _command(self, folder: str | Path, repo_id: str, hub: Hub, options: dict[str, Any]) -> str:
        """The command that pushes the folder as it is; a token stays in the environment or in `hf auth login`."""
        given = {
            "hub_model_id": repo_id,
            "hub_private_repo": hub.hub_private_repo,
            "hub_revision": hub.hub_revision,
            "create_pr": self.create_pr or None,
            "tag": self.tag,
            "push_dry_run": self.push_dry_run,
            "base_name": options.get("base_model"),
        }
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        words += ["--allow", *self.allow] if self.allow else []
        return shlex.join(["python", "-m", "hf_longalign", "push", str(folder), *words])


@dataclass
class CardOptions:
    """What a card says that the files do not know."""

    license: str | None = field(
        default=None, metadata={"help": "Licence of what is published, as the Hub names it: cc-by-4.0, apache-2.0 …"}
    )


@dataclass
class AdapterCardOptions(CardOptions):
    """The same of the card of an adapter."""

    base_name: str | None = field(
        default=None, metadata={"help": "What the adapter calls its base where that is a local folder: its Hub id."}
    )
    languages: list[str] = field(default_factory=list, metadata={"help": "ISO 639 codes of its languages."})

    def check_base(self, base: str) -> None:
        """Refuse to publish what a local folder without a name is the base of."""
        if self.base_name is None and Path(base).exists():
            raise ValueError(
                f"`base_name` must be given to publish what a local folder was the base of, got {base!r}. Set it to "
                "the model's Hub id, or to a neutral name."
            )

    def card(self) -> dict[str, Any]:
        """Return them as arguments of `write_adapter_card`."""
        return {"base_model": self.base_name, "license": self.license, "languages": self.languages}


def repository(hub: Hub, folder: str | Path) -> str:
    """Return the repository to push to: the one asked for, or one that is called as the folder is.

    >>> repository(HubOptions(hub_model_id="user/rows"), "outputs/contexts")
    'user/rows'
    >>> repository(HubOptions(), "outputs/contexts")
    'contexts'
    """
    return hub.hub_model_id or Path(folder).resolve().name


def same_command() -> str:
    """Return the command that started this process; what it leaves on disk makes the second run short."""
    program = Path(sys.argv[0])
    start = ["-m", "hf_longalign"] if program.name == "__main__.py" else [str(program)]
    start = ["hf-longalign"] if program.name == "hf-longalign" else ["python", *start]
    return shlex.join([*start, *sys.argv[1:]])
