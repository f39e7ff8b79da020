"""Context Synthesis (https://arxiv.org/abs/2502.15592): short pairs become long-context chat data."""

from typing import TYPE_CHECKING

from hf_longalign.lazy import lazy_exports


if TYPE_CHECKING:
    from hf_longalign.synthesis.builder import ContextSynthesisBuilder, ContextSynthesisConfig
    from hf_longalign.synthesis.local import TransformersGenerator, VLLMGenerator
    from hf_longalign.synthesis.shards import merge_shards, run_shard

_EXPORTS = {
    "ContextSynthesisBuilder": "builder",
    "ContextSynthesisConfig": "builder",
    "TransformersGenerator": "local",
    "VLLMGenerator": "local",
    "merge_shards": "shards",
    "run_shard": "shards",
}

__all__, __getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
