"""What is imported only when it is used: names of a package, and packages of an extra."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__all__`, `__getattr__` and `__dir__` of a package (PEP 562).

    Without it `import hf_longalign` would take the seconds that torch, transformers and TRL take to import.

    Args:
        package: its `__name__`.
        exports: name -> module in the package that holds it.

    Example:

    >>> names, load, _ = lazy_exports("hf_longalign", {"sample_positions": "positions"})
    >>> names, load("sample_positions").__module__
    (['sample_positions'], 'hf_longalign.positions')
    """

    def load(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{exports[name]}"), name)
        # Python asks this function for what the module lacks: from now on it does not.
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports})

    return list(exports), load, names


def require(module: str, extra: str) -> Any:
    """Import a module of an extra, where it is used.

    Raises:
        ImportError: it is not installed; the message holds the exact command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f'`{package}` is not installed. Run: pip install "hf_longalign[{extra}]"') from error
