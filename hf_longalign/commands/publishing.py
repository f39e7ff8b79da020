"""The options with which every recipe publishes on the Hub."""

import json
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_longalign.hub.push import Destination, check_dry_run


@dataclass
class PublishArguments:
    """Where a push goes, beside `push_to_hub`."""

    branch: str | None = field(default=None, metadata={"help": "Push to this branch; unset: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of pushing to main."})
    tag: str | None = field(default=None, metadata={"help": "Tag what was pushed, such as v1.0."})
    push_dry_run: str | None = field(
        default=None, metadata={"help": "Write exactly the files of a push into this folder, and push nothing."}
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

    def push(self, publish: Callable[..., str], folder: str | Path, repo_id: str, **options: Any) -> str:
        """Publish a folder, and return what to tell the user.

        Args:
            publish: `publish_dataset` or `publish_adapter`.
            folder: what to publish.
            repo_id: where.
            **options: more of its arguments; `resume_command` is the command that goes on after a failure, if it is
                not this very call, which repeats none of the work that the folder comes from.
        """
        options |= {"branch": self.branch, "create_pr": self.create_pr, "tag": self.tag, "dry_run": self.push_dry_run}
        options["resume_command"] = options.get("resume_command") or _call(publish, folder, repo_id, options)
        try:
            url = publish(folder, repo_id, **options)
        except ValueError as error:
            command = options["resume_command"]
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


def _call(publish: Callable[..., str], folder: str | Path, repo_id: str, options: dict[str, Any]) -> str:
    """The call as one command of a shell; a token stays in the environment or in `hf auth login`."""
    given = {name: value for name, value in options.items() if name != "token" and value not in (None, False)}
    # A string in JSON is one in Python, in quotation marks that the shell leaves alone.
    arguments = [json.dumps(str(folder)), json.dumps(repo_id)]
    arguments += [f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in given.items()]
    name = publish.__name__
    code = f"from hf_longalign import {name}; print({name}({', '.join(arguments)}))"
    return shlex.join(["python", "-c", code])


@dataclass
class AdapterPublishArguments(PublishArguments):
    """The same of an adapter, and what its card says that training does not know."""

    base_name: str | None = field(
        default=None, metadata={"help": "What the adapter calls its base where that is a local folder: its Hub id."}
    )
    adapter_license: str | None = field(default=None, metadata={"help": "Licence of the adapter, as on the Hub."})
    languages: list[str] = field(default_factory=list, metadata={"help": "ISO 639 codes of its languages."})

    def check(self, repo_id: str, token: str | None = None, base: str | None = None) -> None:
        """Refuse before the work what would be refused after it; `base` is what the adapter is trained on."""
        super().check(repo_id, token)
        if base is not None and self.base_name is None and Path(base).exists():
            raise ValueError(
                f"`base_name` must be given to publish what a local folder was the base of, got {base!r}. Set it to "
                "the model's Hub id, or to a neutral name."
            )

    def card(self) -> dict[str, Any]:
        """Return them as arguments of `write_adapter_card`."""
        return {"base_model": self.base_name, "license": self.adapter_license, "languages": self.languages}
