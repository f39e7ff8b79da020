"""Publishing on the Hub, complete or not at all: the only code of this package that writes there."""

from hf_longalign.hub.publish import check_base_name, publish_adapter, publish_command, publish_dataset
from hf_longalign.hub.push import Destination, PublishError, check_dry_run, on_main_process


__all__ = [
    "Destination",
    "PublishError",
    "check_base_name",
    "check_dry_run",
    "on_main_process",
    "publish_adapter",
    "publish_command",
    "publish_dataset",
]
