"""Publish a folder: a data set that `synthesize` wrote, or an adapter or a whole model that was trained."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_longalign.cards import write_adapter_card
from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import AdapterCardOptions, PublishOptions, RepositoryOptions, destination
from hf_longalign.hub import publish_adapter, publish_command, publish_dataset


DESCRIPTION = """Publish a folder on the Hub as one commit: a data set, an adapter or a whole model, by what it holds.

    hf-longalign push outputs/contexts --hub_model_id user/contexts --hub_private_repo true
    hf-longalign push outputs/qwen2.5-0.5b --hub_model_id user/qwen2.5-0.5b-32k --create_pr
    hf-longalign push outputs/qwen2.5-0.5b --push_dry_run look         # write what would go, and push nothing"""
CONFIGS = ("adapter_config.json", "config.json")


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the folder, where it goes and how."""
    parser = OptionParser("push", (RepositoryOptions, PublishOptions, AdapterCardOptions), DESCRIPTION)
    parser.add_argument("folder", help="what to publish")
    hub, publish, card, more = parser.read(arguments)
    folder = Path(more.folder)
    try:
        if not folder.is_dir():
            raise ValueError(f"`folder` must be there, got {more.folder!r}. Correct the path.")
        publish.check_push(hub, folder)
        if not _is_model(folder) and (card.license or card.languages):
            raise ValueError(
                f"`license` and `languages` are for adapters and models, got a data set in {folder}. "
                "Give `license` to `synthesize`, whose card tells it."
            )
    except ValueError as error:
        parser.error(str(error))
    return folder, hub, publish, card


def run(folder: Path, hub: RepositoryOptions, publish: PublishOptions, card: AdapterCardOptions) -> int:
    """Push it."""
    to = destination(hub, folder)
    push: Callable[..., str] = publish_dataset
    if _is_model(folder):
        if card.license or card.languages:
            write_adapter_card(folder, **card.card())
        to["base_model"], push = card.base_name, publish_adapter
    print(publish.push(partial(push, folder, **to), publish_command(folder, **to, **publish.options())))
    return 0


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CONFIGS)
