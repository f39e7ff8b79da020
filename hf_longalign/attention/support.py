"""What each attention backend computes exactly, as a rule over the model's config alone.

"Exact" means: every document's logits are those of the document alone, as the long sequence in which each skipped
position holds a masked token. The rule knows the layer kinds and backends of transformers; `run_preflight` then tries
the model itself.
"""

import re
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig

from hf_longalign.rope import rope_record


ATTENTION_NAME = "longalign_varlen"

RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"})
# A model that has one kind of layer only may name none.
SUPPORTED_LAYERS = (
    frozenset({None, "full_attention", "sliding_attention", "attention", "moe", "mlp"}) | RECURRENT_LAYERS
)

_MASK_BACKENDS = frozenset({"eager", "sdpa", "flex_attention"})
# Flash attention by the `kernels` package: all run behind the one function of transformers that hands boundaries on.
# A kernel of another name may bring a function of its own.
_FLASH_KERNELS = frozenset(
    f"kernels-community/{name}"
    for name in ("flash-attn2", "flash-attn3", "flash-attn4", "vllm-flash-attn3", "aiter-flash-attn")
)
# A packed mask is made of the position ids, which these models do not hand to the function that makes it.
_NO_POSITIONS_FOR_MASK = frozenset({"afmoe", "biogpt", "gpt_oss", "granitemoehybrid", "opt"})
# Nor do these, or they carry a state over the whole row, and no other attention serves them.
_NEVER_PACKED = frozenset(
    {
        "bart", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "bloom", "camembert", "data2vec-text",
        "electra", "ernie", "falcon", "marian", "mbart", "megatron-bert", "mpt", "mvp", "pegasus", "plbart",
        "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roformer", "rwkv", "trocr", "xglm", "xlm-roberta",
        "xlm-roberta-xl", "xlstm", "xmod",
    }
)  # fmt: skip
# Why no attention can keep the packed documents of these models apart once positions skip; the masks that "eager" and
# "sdpa" make of ordinary positions are right.
_OWN_ATTENTION = "computes its attention itself and asks no `attn_implementation`"
_OWN_LAYERS = "does not hand `cu_seq_lens_q` on to its attention"
_PADDED_ALONE = {
    "codegen": _OWN_ATTENTION,
    "gptj": _OWN_ATTENTION,
    "gpt_neox_japanese": _OWN_ATTENTION,
    "nemotron": _OWN_LAYERS,
    "stablelm": _OWN_LAYERS,
    "doge": "lays a mask of its own over its attention",
    "llama4_text": "makes a chunked mask even where no layer uses it",
}
# Models whose attention is not told the positions, in which a window must be counted.
_NO_POSITIONS_FOR_WINDOW = frozenset({"moshi", "recurrent_gemma"})
_REMEDY = f'Set attn_implementation="{ATTENTION_NAME}"'


def is_flash_attention(attn_implementation: str) -> bool:
    """Whether a backend is flash attention that takes document boundaries: an installed one, or one by `kernels`.

    >>> is_flash_attention("flash_attention_2"), is_flash_attention("kernels-community/vllm-flash-attn3@main")
    (True, True)
    >>> is_flash_attention("sdpa"), is_flash_attention("someone/flashy-attention")
    (False, False)
    """
    repository = re.split("[@:]", attn_implementation)[0].strip()
    return re.fullmatch(r"flash_attention_[234]", attn_implementation) is not None or repository in _FLASH_KERNELS


def layer_kinds(config: PretrainedConfig) -> frozenset[str]:
    """Kinds of the model's layers, in transformers' words: "full_attention", "sliding_attention", "linear_attention" …

    >>> from transformers import MistralConfig
    >>> sorted(layer_kinds(MistralConfig(sliding_window=4096)))
    ['sliding_attention']
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return frozenset(kinds)
    if getattr(text, "sliding_window", None) is not None:
        return frozenset({"sliding_attention"})
    return frozenset(
        {"full_attention" if getattr(text, "attention_chunk_size", None) is None else "chunked_attention"}
    )


def has_recurrent_layers(config: PretrainedConfig) -> bool:
    """Whether some layers carry a state from token to token (Mamba, linear attention, convolutions).

    Those have no positions: a skip reaches the attention layers only.

    >>> from transformers import LlamaConfig, Qwen3NextConfig
    >>> has_recurrent_layers(LlamaConfig()), has_recurrent_layers(Qwen3NextConfig())
    (False, True)
    """
    return bool(layer_kinds(config) & RECURRENT_LAYERS)


def exactness_problem(
    config: PretrainedConfig,
    attn_implementation: str,
    *,
    packed: bool,
    skipped: bool,
    target_length: int | None = None,
) -> str | None:
    """Say why this model on this backend would not be exact, and what to do; None when it is.

    Args:
        config: the model's config, multimodal ones included.
        attn_implementation: the backend of its language model.
        packed: whether several documents share a row, with `cu_seq_lens_q` and its kin; otherwise each has a row,
            with the 2-D `attention_mask`.
        skipped: whether positions may skip.
        target_length: the largest position plus one; None for unknown.

    Returns:
        The reason, naming backend and layer kind, and the remedy; or None.

    >>> from transformers import Gemma2Config, LlamaConfig
    >>> exactness_problem(LlamaConfig(), "sdpa", packed=False, skipped=True) is None
    True
    >>> print(exactness_problem(Gemma2Config(), "eager", packed=False, skipped=True))
    "eager" counts the window of sliding_attention layers in tokens, not in positions.
    Set attn_implementation="longalign_varlen".
    """
    text = config.get_text_config(decoder=True)
    kinds = layer_kinds(config)
    if target_length is not None and target_length <= (getattr(text, "sliding_window", None) or 0):
        kinds = kinds - {"sliding_attention"}
    problems = (
        _layer_problem(kinds, attn_implementation, packed, skipped),
        _model_problem(text.model_type, kinds, attn_implementation, packed, skipped),
        _rope_problem(text, target_length, packed, skipped),
        _backend_problem(text.model_type, kinds, attn_implementation, packed, skipped),
    )
    return next((problem for problem in problems if problem is not None), None)


def _layer_problem(kinds: frozenset[str], backend: str, packed: bool, skipped: bool) -> str | None:
    unknown = sorted(kinds - SUPPORTED_LAYERS)
    if unknown and (packed or skipped or backend == ATTENTION_NAME):
        also = ', and attn_implementation="eager"' if backend == ATTENTION_NAME else ""
        return (
            f'"{backend}" is not exact for {", ".join(unknown)} layers with packed rows or skipped positions. Set '
            f'packing=False and skip_strategy="none"{also}.'
        )
    recurrent = sorted(kinds & RECURRENT_LAYERS)
    if not recurrent or not packed:
        return None
    missing = [] if find_spec("causal_conv1d") else ["causal-conv1d"]
    if kinds & (RECURRENT_LAYERS - {"conv"}) and not (find_spec("fla") or find_spec("mamba_ssm")):
        missing.append("flash-linear-attention (linear attention) or mamba-ssm (Mamba)")
    if not missing:
        return None
    return (
        f"{', '.join(recurrent)} layers let packed documents leak into each other without the kernels that take their "
        f"boundaries. Install {' and '.join(missing)}, or train padded rows (packing=False)."
    )


def _rope_problem(text: Any, target_length: int | None, packed: bool, skipped: bool) -> str | None:
    for rope in rope_record(text).parts if packed or skipped else ():
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        trained = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        if (target_length or text.max_position_embeddings) > trained:
            return (
                f'RoPE of type "{kind}" takes its factor from the largest position of the whole batch, so documents '
                f"change each other once one passes position {trained}. Set a target length of at most {trained}."
            )
    return None


def _model_problem(model_type: str, kinds: frozenset[str], backend: str, packed: bool, skipped: bool) -> str | None:
    """What no backend can mend, of models whose code stands in the way."""
    reason = _PADDED_ALONE.get(model_type) if skipped or backend == ATTENTION_NAME else None
    if model_type in _NEVER_PACKED:
        reason = "does not tell the documents of a row apart"
    if packed and reason is not None:
        return (
            f"A {model_type} model {reason}, so its packed documents would see each other. Set packing=False to train "
            "padded rows."
        )
    if skipped and model_type in _NO_POSITIONS_FOR_WINDOW and "sliding_attention" in kinds:
        return (
            f"A {model_type} model does not hand `position_ids` on to its attention, where the window of "
            'sliding_attention layers would have to be counted in positions. Set skip_strategy="none".'
        )
    return None


def _backend_problem(model_type: str, kinds: frozenset[str], backend: str, packed: bool, skipped: bool) -> str | None:
    if backend == ATTENTION_NAME or not (packed or skipped):
        return None
    if backend not in _MASK_BACKENDS and not is_flash_attention(backend):
        return f'"{backend}" is not known to be exact for packed rows or skipped positions. {_REMEDY}.'
    sliding = sorted(kind for kind in kinds if "sliding" in kind)
    if skipped and sliding:
        return f'"{backend}" counts the window of {", ".join(sliding)} layers in tokens, not in positions. {_REMEDY}.'
    if is_flash_attention(backend) or not packed:
        return None
    if skipped:
        return f'"{backend}" takes every skipped position in a packed row for the end of a document. {_REMEDY}.'
    if model_type in _NO_POSITIONS_FOR_MASK:
        return f'"{backend}" lets the packed documents of a {model_type} model see each other. {_REMEDY}.'
    return None
