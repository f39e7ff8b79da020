"""Publish a folder: a data set that `synthesize` wrote, or an adapter or a whole model that was trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_longalign.cards import write_adapter_card
from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import AdapterCardOptions, HubOptions, PublishOptions, destination
from hf_longalign.hub import publish_adapter, publish_command, publish_dataset


DESCRIPTION = """Publish a folder on the Hub as one commit: a data set, an adapter or a whole model, by what it holds.

    hf-longalign push outputs/contexts --hub_model_id user/contexts --hub_private_repo true
    hf-longalign push outputs/qwen2.5-0.5b --hub_model_id user/qwen2.5-0.5b-32k --create_pr
    hf-longalign push outputs/qwen2.5-0.5b --push_dry_run look         # write what would go, and push nothing"""
CONFIGS = ("adapter_config.json", "config.json")


@dataclass
class PushOptions(HubOptions):
    """`HubOptions` where a push is what the command is for."""

    push_to_hub: bool = True


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the folder, where it goes and how."""
    parser = OptionParser("push", (PushOptions, PublishOptions, AdapterCardOptions), DESCRIPTION)
    parser.add_argument("folder", help="what to publish")
    hub, publish, card, more = parser.read(arguments)
    folder = Path(more.folder)
    try:
        if not folder.is_dir():
            raise ValueError(f"`folder` must be there, got {more.folder!r}. Correct the path.")
        publish.check_push(hub, folder)
    except ValueError as error:
        parser.error(str(error))
    return folder, hub, publish, card


def run(folder: Path, hub: HubOptions, publish: PublishOptions, card: AdapterCardOptions) -> int:
    """Push it."""
    to = destination(hub, folder)
    push: Callable[..., str] = publish_dataset
    if any((folder / name).is_file() for name in CONFIGS):
        if card.license or card.languages:
            write_adapter_card(folder, **card.card())
        to["base_model"], push = card.base_name, publish_adapter
    print(publish.push(partial(push, folder, **to), publish_command(folder, **to, **publish.options())))
    return 0
