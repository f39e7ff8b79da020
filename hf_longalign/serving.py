"""The command that serves an adapter, or a whole model, with the RoPE and the range it was trained with.

No server reads the RoPE of a training by itself: it gives an adapter the base's own, without a word. Only what an
engine is known to compute as transformers does is written down for it; everything else is refused by name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from hf_longalign.endpoint.protocol import EndpointError
from hf_longalign.lazy import require
from hf_longalign.records.training import TrainingRecord
from hf_longalign.run_record import load_record, model_file


@dataclass(frozen=True)
class Engine:
    """A server, and its two commands."""

    source: str  # the page that the options were read on
    whole: Callable[[str, int], str]  # serves a merged model of a range
    # Serves an adapter, from base, adapter, rank, overrides and range; `None`: it has to be merged.
    adapter: Callable[..., str] | None = None
    run: bool = False  # whether a test starts it and compares its answers, or it was only read of


def _vllm(base: str, adapter: str, rank: int, rope: dict[str, Any], reach: int) -> str:
    return (
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {adapter}={adapter} \\\n"
        f"  --hf-overrides {quote(json.dumps(_overrides(rope, reach)))} \\\n  --max-model-len {reach}"
    )


def _overrides(rope: dict[str, Any], reach: int) -> dict[str, Any]:
    return {"rope_parameters": rope, "max_position_embeddings": reach}


def _sglang(base: str, adapter: str, rank: int, rope: dict[str, Any], reach: int) -> str:
    # Releases on transformers 4 know `rope_scaling` alone; on 5 it replaces everything, so the theta stands in it.
    overrides = {"rope_scaling": rope, "max_position_embeddings": reach}
    return (
        f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {adapter}={adapter} \\\n"
        f"  --json-model-override-args {quote(json.dumps(overrides))} \\\n  --context-length {reach}"
    )


ENGINES = {
    "vllm": Engine(
        "https://docs.vllm.ai/en/stable/features/context_extension/",
        lambda model, reach: f"vllm serve {model} --max-model-len {reach}",
        _vllm,
    ),
    "sglang": Engine(
        "https://docs.sglang.io/advanced_features/server_arguments.html",
        lambda model, reach: f"python -m sglang.launch_server --model-path {model} --context-length {reach}",
        _sglang,
    ),
    "tgi": Engine(
        "https://huggingface.co/docs/text-generation-inference/reference/launcher",
        lambda model, reach: (
            f"text-generation-launcher --model-id {model} --max-input-tokens {reach - 1} --max-total-tokens {reach} "
            f"\\\n  --max-batch-prefill-tokens {reach}"
        ),
    ),
    "transformers": Engine(
        "https://huggingface.co/docs/transformers/main/en/serving",
        lambda model, reach: f"transformers serve {model} --port 8000",
        run=True,
    ),
    "llama.cpp": Engine(
        "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
        lambda model, reach: (
            f"python llama.cpp/convert_hf_to_gguf.py {model} --outfile {model}.gguf\n"
            f"llama-server --model {model}.gguf --ctx-size {reach}"
        ),
    ),
}
# Scaling that engines other than transformers compute as it does, with these parameters; of "yarn" they fix the
# others, "dynamic" and "longrope" they compute for the longest sequence where transformers follows the present one.
_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
_ANY = {"rope_type", "rope_theta", "partial_rotary_factor"}
# What vLLM takes for `--max-lora-rank`.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve_command(model: str | Path, engine: str = "vllm", *, base_model: str | None = None) -> str:
    """Return the command line that serves an adapter, or a merged model, as it was trained.

    Args:
        model: directory or Hub id of what `LongAlignSFTTrainer` or [`~hf_longalign.merge_adapter`] saved.
        engine: `"vllm"`, `"sglang"`, `"tgi"`, `"transformers"` or `"llama.cpp"`.
        base_model: what an adapter is served on; `None`: the base it names.

    Raises:
        ValueError: an unknown engine, no record of the training, or a RoPE that the engine computes in another way.

    Example:

    ```python
    print(serve_command("user/qwen2.5-0.5b-128k", "vllm"))
    ```
    """
    record, config = _saved(model)
    return command_of(record, config, str(model), engine, base_model=base_model)


def load_vllm(model: str, adapter: str | None = None, *, name: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Return vLLM's `LLM`, and the `LoRARequest` of an adapter, which gets the RoPE and range it was trained with.

    Args:
        model: Hub id or folder; of an adapter the base.
        adapter: Hub id or folder.
        name: what an error calls the model: libraries name the folder, a path of this machine.
        **options: further arguments of `vllm.LLM`. Beginnings that prompts share are computed once.

    Raises:
        ImportError: vLLM is missing.
        ValueError: an adapter that vLLM would compute in another way, see [`vllm_options`].
        EndpointError: vLLM cannot load the model.
    """
    vllm, lora = require("vllm", "vllm"), None
    options = {"enable_prefix_caching": True, **options}
    if adapter is not None:
        options = {**vllm_options(adapter), **options}
        lora = require("vllm.lora.request", "vllm").LoRARequest("adapter", 1, adapter)
    try:
        return vllm.LLM(model, **options), lora
    except (OSError, ValueError, RuntimeError) as error:
        name = name or Path(model).name
        raise EndpointError(f"The model {name!r} cannot be loaded: {str(error).replace(model, name)}") from None


def vllm_options(adapter: str | Path) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` with which an adapter computes what it was trained for: RoPE, range, rank.

    Raises:
        ValueError: no record of the training, a RoPE that vLLM computes in another way, or an adapter to be merged.
    """
    record, config = _saved(adapter)
    rope, rank = record.rope.rope_parameters or {}, _rank(config or {})
    if rank is None or not _is_plain(record):
        raise ValueError(
            f"`adapter` must be one that vLLM loads beside its base, got {str(adapter)!r}. Merge it with "
            f"`hf-longalign merge {quote(str(adapter))} merged`, and set `model` to the result instead."
        )
    _check_known(rope, "vllm")
    reach = record.rope.max_position_embeddings
    lora = {"enable_lora": True, "max_lora_rank": rank}
    return {**lora, "hf_overrides": _overrides(rope, reach or 0), "max_model_len": reach} if reach else lora


def _saved(model: str | Path) -> tuple[TrainingRecord, dict[str, Any] | None]:
    """The record of a model or adapter, and PEFT's configuration of an adapter."""
    path = model_file(model, "adapter_config.json")
    return load_record(model), json.loads(path.read_text(encoding="utf-8")) if path else None


def command_of(
    record: TrainingRecord,
    adapter_config: Mapping[str, Any] | None,
    name: str,
    engine: str = "vllm",
    *,
    base_model: str | None = None,
) -> str:
    """Return what [`serve_command`] does, from the record of the training and PEFT's config, `None` of a whole model.

    Example:

    >>> from hf_longalign.records.training import RopeRecord
    >>> rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> record = TrainingRecord(RopeRecord("qwen2", 131072, rope))
    >>> print(command_of(record, {"peft_type": "LORA", "r": 8}, "user/long", base_model="org/base"))
    # Read, not run: https://docs.vllm.ai/en/stable/features/context_extension/
    vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules user/long=user/long \\
      --hf-overrides '{"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
      "original_max_position_embeddings": 32768}, "max_position_embeddings": 131072}' \\
      --max-model-len 131072
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}. Set one of them.")
    known, rope = ENGINES[engine], record.rope.rope_parameters or {}
    parts = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if engine != "transformers":
        for part in parts:
            _check_known(part, engine)
    reach = record.rope.max_position_embeddings or 0
    if not reach:
        raise ValueError(
            f"`{name}` must have a range to be served in, got a model without `max_position_embeddings`. Serve it as "
            "its base is served: it has no RoPE that could be lost."
        )
    lines = [f"# {'Run in the tests, read' if known.run else 'Read, not run'}: {known.source}"]
    if adapter_config is None:
        return "\n".join([*lines, known.whole(quote(name), reach)])
    base = base_model or adapter_config.get("base_model_name_or_path")
    rank = _rank(adapter_config)
    if known.adapter is not None and rank is not None and _is_plain(record) and base:
        return "\n".join([*lines, known.adapter(quote(base), quote(name), rank, rope, reach)])
    merged = f"{Path(name).name}-merged"
    options = f" --base_model {quote(base_model)}" if base_model else ""
    merge = f"hf-longalign merge {quote(name)} {quote(merged)}{options}"
    return "\n".join([*lines, merge, known.whole(merged, reach)])


def _is_plain(record: TrainingRecord) -> bool:
    """Whether one RoPE is that of all layers of a model of text alone: of others vLLM and SGLang override a part."""
    layered = any(isinstance(value, dict) for value in (record.rope.rope_parameters or {}).values())
    return not layered and not str(record.architecture or "").endswith("ForConditionalGeneration")


def _check_known(rope: Mapping[str, Any], engine: str) -> None:
    kind = str(rope.get("rope_type", "default"))
    if kind not in _KNOWN:
        what = f"rope_type={kind!r}"
    elif more := sorted(set(rope) - _KNOWN[kind] - _ANY):
        what = f"`{more[0]}` in {kind!r} RoPE"
    else:
        return
    raise ValueError(
        f"`engine` must be 'transformers' for this model, got {engine!r}, which may compute {what} in another way "
        "than the training did. Set 'transformers'."
    )


def _rank(config: Mapping[str, Any]) -> int | None:
    """The rank that a server must have room for; `None` where it knows no such adapter and it has to be merged."""
    special = ("modules_to_save", "use_dora", "trainable_token_indices", "layer_replication", "megatron_config")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, special)):
        return None
    targets = config.get("target_modules") or []
    if {"lm_head", "embed_tokens"} & {str(target).rsplit(".", 1)[-1] for target in targets}:
        return None
    largest = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in _RANKS if rank >= largest), None)
