"""Long-context instruction tuning from short data, as drop-in parts for transformers, TRL, datasets and PEFT.

Names are loaded when they are first used: importing the package imports neither torch nor transformers and changes
nothing in them.

Example:

>>> import hf_longalign
>>> sorted(hf_longalign.__all__)[-1]
'scale_rope'
"""

from importlib import import_module
from typing import Any

from hf_longalign.version import __version__


_EXPORTS = {
    "ContextSynthesisBuilder": "synthesis.builder",
    "ContextSynthesisConfig": "synthesis.config",
    "LongAlignSFTConfig": "config",
    "LongAlignSFTTrainer": "trainer",
    "OpenAIGenerator": "endpoint",
    "SkipPositionCallback": "callback",
    "SkipPositionDataCollator": "collator",
    "TransformersGenerator": "synthesis.local",
    "load_adapter": "adapter",
    "merge_adapter": "adapter",
    "publish_adapter": "hub.publish",
    "publish_dataset": "hub.publish",
    "register_attention": "attention",
    "run_preflight": "preflight",
    "sample_positions": "positions",
    "scale_rope": "rope",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
