"""Long-context instruction tuning from short data, as drop-in parts for transformers, TRL, datasets and PEFT.

Names are loaded when they are first used: importing the package imports neither torch nor transformers and changes
nothing in them.

Example:

>>> import hf_longalign
>>> sorted(hf_longalign.__all__)[-1]
'serve_command'
"""

from typing import TYPE_CHECKING

from hf_longalign.lazy import lazy_exports


__version__ = "0.1.0"

if TYPE_CHECKING:  # what an editor sees; the rest of Python sees the table below
    from hf_longalign.adapter import load_adapter
    from hf_longalign.attention import register_attention
    from hf_longalign.callback import SkipPositionCallback
    from hf_longalign.collator import SkipPositionDataCollator
    from hf_longalign.config import LongAlignSFTConfig
    from hf_longalign.endpoint import BatchGenerator, OpenAIGenerator
    from hf_longalign.evaluation import evaluate
    from hf_longalign.hub import publish_adapter, publish_dataset
    from hf_longalign.merge import merge_adapter
    from hf_longalign.positions import sample_positions
    from hf_longalign.preflight import run_preflight
    from hf_longalign.records import Report
    from hf_longalign.rope import scale_rope
    from hf_longalign.serving import serve_command
    from hf_longalign.synthesis import (
        ContextSynthesisBuilder,
        ContextSynthesisConfig,
        TransformersGenerator,
        merge_shards,
        run_shard,
    )
    from hf_longalign.trainer import LongAlignSFTTrainer

_EXPORTS = {
    "BatchGenerator": "endpoint",
    "ContextSynthesisBuilder": "synthesis",
    "ContextSynthesisConfig": "synthesis",
    "LongAlignSFTConfig": "config",
    "LongAlignSFTTrainer": "trainer",
    "OpenAIGenerator": "endpoint",
    "Report": "records",
    "SkipPositionCallback": "callback",
    "SkipPositionDataCollator": "collator",
    "TransformersGenerator": "synthesis",
    "evaluate": "evaluation",
    "load_adapter": "adapter",
    "merge_adapter": "merge",
    "merge_shards": "synthesis",
    "publish_adapter": "hub",
    "publish_dataset": "hub",
    "register_attention": "attention",
    "run_preflight": "preflight",
    "run_shard": "synthesis",
    "sample_positions": "positions",
    "scale_rope": "rope",
    "serve_command": "serving",
}

__all__, __getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
__all__ += ["__version__"]
