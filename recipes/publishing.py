"""The options with which every recipe publishes on the Hub."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_token


@dataclass
class PublishArguments:
    """Where a push goes, beside `push_to_hub`."""

    branch: str | None = field(default=None, metadata={"help": "Push to this branch; unset: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of pushing to main."})
    tag: str | None = field(default=None, metadata={"help": "Tag what was pushed, such as v1.0."})
    push_dry_run: str | None = field(
        default=None, metadata={"help": "Write exactly the files of a push into this folder, and push nothing."}
    )

    def check(self, token: str | None = None) -> None:
        """Refuse before the work what would be refused after it."""
        if self.push_dry_run is None and (token or get_token()) is None:
            raise ValueError(
                "`push_to_hub` needs a token with the right to write, got none. Run `hf auth login` first."
            )

    def options(self, *more: str) -> dict[str, Any]:
        """Return them as arguments of `publish_dataset` and `publish_adapter`; `more` goes on the resume command."""
        return {
            "branch": self.branch,
            "create_pr": self.create_pr,
            "tag": self.tag,
            "dry_run": self.push_dry_run,
            "resume_command": shlex.join(["accelerate", "launch", *sys.argv, *more]),
        }

    def told(self, url: str) -> str:
        """Return what to tell the user in the end."""
        return f"Published {url}" if self.push_dry_run is None else f"Nothing pushed; what would be is in {url}"


@dataclass
class AdapterPublishArguments(PublishArguments):
    """The same of an adapter, and what its card says that training does not know."""

    base_name: str | None = field(
        default=None, metadata={"help": "What the adapter calls its base where that is a local folder: its Hub id."}
    )
    adapter_license: str | None = field(default=None, metadata={"help": "Licence of the adapter, as on the Hub."})
    languages: list[str] = field(default_factory=list, metadata={"help": "ISO 639 codes of its languages."})

    def check(self, token: str | None = None, base: str | None = None) -> None:
        """Refuse before the work what would be refused after it; `base` is what the adapter is trained on."""
        super().check(token)
        if base is not None and self.base_name is None and Path(base).exists():
            raise ValueError(
                f"`base_name` must be given to publish what a local folder was the base of, got {base!r}. Set it to "
                "the model's Hub id, or to a neutral name."
            )

    def card(self) -> dict[str, Any]:
        """Return them as arguments of `write_adapter_card`."""
        return {"base_model": self.base_name, "license": self.adapter_license, "languages": self.languages}
