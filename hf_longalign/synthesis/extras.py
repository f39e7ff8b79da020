"""Packages that only synthesis needs: imported where they are used, and named with what to install."""

from importlib import import_module
from typing import Any


def require(module: str) -> Any:
    """Import a module of the `synthesis` extra.

    Raises:
        ImportError: it is not installed; the message holds the exact command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f'`{package}` is not installed. Run: pip install "hf_longalign[synthesis]"') from error
