"""The command that serves an adapter, or a whole model, with the RoPE and the range it was trained with.

No server reads the RoPE of a training by itself: it gives an adapter the base's own, without a word. Only what an
engine is known to compute as transformers does is written down for it; everything else is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from hf_longalign.endpoint.protocol import EndpointError
from hf_longalign.lazy import require
from hf_longalign.records.training import RopeRecord, TrainingRecord
from hf_longalign.run_record import check_place, load_record, model_file


@dataclass(frozen=True)
class Engine:
    """A server, and its two commands."""

    source: str  # the page that the options were read on
    whole: str  # serves a merged `model` of a range `reach`, the longest prompt being `prompt`
    adapter: str | None = None  # serves an adapter; `None`: it has to be merged
    rope: str = "rope_parameters"  # what the engine calls them among its overrides
    run: bool = False  # whether a test starts it and compares its answers, or it was only read of


ENGINES = {
    "vllm": Engine(
        "https://docs.vllm.ai/en/stable/features/context_extension/",
        "vllm serve {model} --max-model-len {reach}",
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {model}={model} \\\n"
        "  --hf-overrides {overrides} \\\n  --max-model-len {reach}",
    ),
    "sglang": Engine(
        "https://docs.sglang.io/advanced_features/server_arguments.html",
        "python -m sglang.launch_server --model-path {model} --context-length {reach}",
        "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {model}={model} \\\n"
        "  --json-model-override-args {overrides} \\\n  --context-length {reach}",
        # Releases on transformers 4 know this alone; on 5 it replaces everything, so the theta stands in it.
        rope="rope_scaling",
    ),
    "tgi": Engine(
        "https://huggingface.co/docs/text-generation-inference/reference/launcher",
        "text-generation-launcher --model-id {model} --max-input-tokens {prompt} --max-total-tokens {reach} "
        "\\\n  --max-batch-prefill-tokens {reach}",
    ),
    "transformers": Engine(
        "https://huggingface.co/docs/transformers/main/en/serving", "transformers serve {model} --port 8000", run=True
    ),
    "llama.cpp": Engine(
        "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
        "python llama.cpp/convert_hf_to_gguf.py {model} --outfile {model}.gguf\n"
        "llama-server --model {model}.gguf --ctx-size {reach}",
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
        ValueError: an unknown engine, a path to nothing, no record of the training, or a RoPE that the engine
            computes in another way.

    Example:

    ```python
    print(serve_command("user/qwen2.5-0.5b-128k", "vllm"))
    ```
    """
    check_place("model", model)
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
    rank = _rank(config or {})
    if rank is None or not _is_plain(record):
        raise ValueError(
            f"`adapter` must be one that vLLM loads beside its base, got {str(adapter)!r}. Merge it with "
            f"`hf-longalign merge {quote(str(adapter))} merged`, and set `model` to the result instead."
        )
    _check_known(record.rope, "vllm")
    lora, reach = {"enable_lora": True, "max_lora_rank": rank}, record.rope.max_position_embeddings
    return {**lora, "hf_overrides": _overrides(record.rope, "vllm"), "max_model_len": reach} if reach else lora


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
    known = ENGINES[engine]
    if engine != "transformers":
        _check_known(record.rope, engine)
    reach = record.rope.max_position_embeddings or 0
    if not reach:
        raise ValueError(
            f"`{name}` must have a range to be served in, got a model without `max_position_embeddings`. Serve it as "
            "its base is served: it has no RoPE that could be lost."
        )
    lines = [f"# {'Run in the tests, read' if known.run else 'Read, not run'}: {known.source}"]
    if adapter_config is None:
        return "\n".join([*lines, known.whole.format(model=quote(name), reach=reach, prompt=reach - 1)])
    base = base_model or adapter_config.get("base_model_name_or_path")
    rank = _rank(adapter_config)
    if known.adapter is not None and rank is not None and _is_plain(record) and base:
        overrides = quote(json.dumps(_overrides(record.rope, engine)))
        names = {"base": quote(base), "model": quote(name)}
        return "\n".join([*lines, known.adapter.format(**names, rank=rank, overrides=overrides, reach=reach)])
    # Of a folder such as "." the name that it has.
    merged = quote(f"{(Path(name).resolve() if Path(name).exists() else Path(name)).name}-merged")
    options = f" --base_model {quote(base_model)}" if base_model else ""
    merge = f"hf-longalign merge {quote(name)} {merged}{options}"
    return "\n".join([*lines, merge, known.whole.format(model=merged, reach=reach, prompt=reach - 1)])


def _overrides(rope: RopeRecord, engine: str) -> dict[str, Any]:
    return {ENGINES[engine].rope: rope.rope_parameters or {}, "max_position_embeddings": rope.max_position_embeddings}


def _is_plain(record: TrainingRecord) -> bool:
    """Whether one RoPE is that of all layers of a model of text alone: of others vLLM and SGLang override a part."""
    layered = record.rope.parts != [record.rope.rope_parameters or {}]
    return not layered and not str(record.architecture or "").endswith("ForConditionalGeneration")


def _check_known(rope: RopeRecord, engine: str) -> None:
    for part in rope.parts:
        kind = str(part.get("rope_type", "default"))
        if kind not in _KNOWN:
            what = f"rope_type={kind!r}"
        elif more := sorted(set(part) - _KNOWN[kind] - _ANY):
            what = f"`{more[0]}` in {kind!r} RoPE"
        else:
            continue
        raise ValueError(
            f"`engine` must be 'transformers' for this model, got {engine!r}, which may compute {what} in another way "
            "than the training did. Set 'transformers'."
        )


def _rank(config: Mapping[str, Any]) -> int | None:
    """The rank that a server must have room for; `None` where it knows no such adapter and it has to be merged."""
    # What these train, servers leave out or refuse: they read plain LoRA alone.
    special = ("modules_to_save", "use_dora", "trainable_token_indices", "layer_replication", "megatron_config")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, special)):
        return None
    targets = config.get("target_modules") or []
    if {"lm_head", "embed_tokens"} & {str(target).rsplit(".", 1)[-1] for target in targets}:
        return None
    largest = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in _RANKS if rank >= largest), None)
