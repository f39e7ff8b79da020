"""The options with which every recipe publishes on the Hub."""

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import get_token

from hf_longalign.cards.page import check_license
from hf_longalign.hub import Destination, check_base_name, check_dry_run


@dataclass
class PublishArguments:
    """Where a push goes, beside `push_to_hub`."""

    branch: str | None = field(default=None, metadata={"help": "Push to this branch; unset: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of pushing to main."})
    tag: str | None = field(default=None, metadata={"help": "Tag what was pushed, such as v1.0."})
    push_dry_run: str | None = field(
        default=None, metadata={"help": "Write exactly the files of a push into this folder, and push nothing."}
    )

    allow: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts that look private and may be seen by everyone, such as a path in a row; a folder allows "
            "what lies in it."
        },
    )

    def check(self, repo_id: str, token: str | None = None) -> None:
        """Refuse before the work what would be refused after it."""
        Destination(repo_id, "model", None, self.branch, self.create_pr, self.tag).check()
        if self.push_dry_run is not None:
            check_dry_run(self.push_dry_run)
        if self.push_dry_run is None and (token or get_token()) is None:
            raise ValueError(
                "`push_to_hub` needs a token with the right to write, got none. Run `hf auth login` first."
            )

    def options(self) -> dict[str, Any]:
        """Return them as arguments of `publish_dataset` and `publish_adapter`."""
        given = {"branch": self.branch, "create_pr": self.create_pr, "tag": self.tag, "allow": self.allow}
        return {**given, "dry_run": self.push_dry_run}

    def push(self, publish: Callable[..., str], command: str) -> str:
        """Publish, and return what to tell the user.

        Args:
            publish: takes `options`.
            command: does it again, and none of the work before it.
        """
        try:
            url = publish(**self.options())
        except ValueError as error:
            raise ValueError(f"{error} The work is done; once that is mended, publish it with: {command}") from error
        return f"Published {url}" if self.push_dry_run is None else f"Nothing pushed; what would be is in {url}"


def start_logging() -> None:
    """Log what the package says, and not every request."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)


def same_command() -> str:
    """Return the command that started this process; what it leaves on disk makes the second run short."""
    return shlex.join(["accelerate", "launch", *sys.argv])


@dataclass
class AdapterPublishArguments(PublishArguments):
    """The same of an adapter, and what its card says that training does not know."""

    base_name: str | None = field(
        default=None, metadata={"help": "What the adapter calls its base where that is a local folder: its Hub id."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the adapter, as on the Hub."})
    languages: list[str] = field(default_factory=list, metadata={"help": "ISO 639 codes of its languages."})

    def check(self, repo_id: str, token: str | None = None, base: str | None = None) -> None:
        """Refuse before the work what would be refused after it; `base` is what the adapter is trained on."""
        super().check(repo_id, token)
        check_license(license=self.license)
        check_base_name(self.base_name, base)

    def card(self) -> dict[str, Any]:
        """Return them as arguments of `write_adapter_card`."""
        return {"base_model": self.base_name, "license": self.license, "languages": self.languages}
