"""The "longalign_varlen" attention: exact over packed and padded rows with skipped positions, without flash-attn."""

from hf_longalign.attention.interface import mark_boundaries, register_attention
from hf_longalign.attention.support import ATTENTION_NAME, exactness_problem, has_recurrent_layers


__all__ = ["ATTENTION_NAME", "exactness_problem", "has_recurrent_layers", "mark_boundaries", "register_attention"]
