"""Greedy answers of vLLM inside this process, without a server: a base, and an adapter beside it."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_longalign.evaluation.models import (
    ADAPTER,
    BASE,
    SCALED,
    base_revision,
    files_of,
    identity_of,
    published_config,
    tokenizer_state,
)
from hf_longalign.evaluation.options import ModelOptions
from hf_longalign.evaluation.prompt import Completion, Prompt, cut_at, encode_text
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.lazy import require
from hf_longalign.records.report import Speed
from hf_longalign.rope import rope_record
from hf_longalign.run_record import loaded_commit
from hf_longalign.serving import load_vllm, vllm_options


# Prompts of one call, which ends with its longest answer: what is answered by then is on disk after a kill.
_BATCH = 256


class VLLMAnswers:
    """Answers prompts greedily with vLLM's `LLM`, which reads a beginning that prompts share once.

    Written against the interface of vLLM 0.33 and tested with a stand-in of it; never run on a GPU.

    `engine` returns the `LLM`, loaded at the first prompt, and the adapter's `LoRARequest`, in force if `adapted`.
    """

    def __init__(
        self, engine: Callable[[], tuple[Any, Any]], tokenizer: PreTrainedTokenizerBase, *, adapted: bool = False
    ) -> None:
        self.stats = Speed()
        self.on_read: Callable[[Prompt], None] = lambda prompt: None
        self._engine, self._tokenizer, self._adapted = engine, tokenizer, adapted

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its answer, 256 at a time, in the order in which beginnings are shared.

        Raises:
            ValueError: a prompt beyond the range that vLLM was given, before anything is generated.
            EndpointError: vLLM cannot load the model.
        """
        # Neighbours share most, so vLLM still holds what it has read of them.
        encoded = sorted(
            ((encode_text(self._tokenizer, one.text, chat=one.chat, prefix=one.prefix), one) for one in prompts),
            key=lambda pair: pair[0],
        )
        if not encoded:
            return
        llm, lora = self._engine()
        needed = max(len(ids) + prompt.max_new_tokens for ids, prompt in encoded)
        reach = int(llm.model_config.max_model_len)
        if needed > reach:
            raise ValueError(
                f"`lengths` must be within the range that vLLM was given, {reach:,} tokens, got {needed:,} with the "
                f"answer. Set shorter lengths, or `vllm_options` to '{{\"max_model_len\": {needed}}}'."
            )
        make = require("vllm", "vllm").SamplingParams
        for first in range(0, len(encoded), _BATCH):
            batch, start = encoded[first : first + _BATCH], time.perf_counter()
            # All that is not given is off: vLLM reads a generation config's penalties for its own defaults alone.
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in batch],
                [make(temperature=0.0, max_tokens=one.max_new_tokens, stop=list(one.stop)) for _, one in batch],
                use_tqdm=False,
                lora_request=lora if self._adapted else None,
            )
            self.stats.seconds += time.perf_counter() - start
            for (ids, prompt), output in zip(batch, outputs, strict=True):
                (written,) = output.outputs
                self.stats.prompt_tokens += len(ids)
                self.stats.cached_tokens += output.num_cached_tokens or 0
                self.stats.generated_tokens += len(written.token_ids)
                text, cut = cut_at(written.text, prompt.stop), written.finish_reason == "length"
                yield prompt, Completion(text, len(written.token_ids), cut)


def vllm_examinees(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> list[Examinee]:
    """Return the base, and the adapter beside it on the same weights in memory.

    Where the adapter was trained with scaled RoPE, the base has that RoPE too, and is called so: vLLM has one RoPE
    for all that it holds. The base as published is a run of its own, without the adapter.

    `config` is that of the model with the RoPE of the adapter.
    """
    require("vllm", "vllm")  # missing is told now, and not when all prompts are made
    given, revision = json.loads(options.vllm_options or "{}"), base_revision(options)
    more: dict[str, Any] = {"dtype": options.dtype, "revision": revision, **given}
    if options.trust_remote_code:
        more["trust_remote_code"] = True
    engine = cache(partial(load_vllm, options.model, options.adapter, **more))
    base = {
        "engine": "vllm",
        "options": more,
        "name": options.model,
        "commit": getattr(config, "_commit_hash", None),
        "files": files_of(options.model),
        "rope": rope_record(config).to_json(),
        "tokenizer": tokenizer_state(tokenizer),
    }
    identity = identity_of(base)
    if options.adapter is None:
        return [Examinee(BASE, identity, VLLMAnswers(engine, tokenizer), what="the model, by vLLM")]
    vllm_options(options.adapter)  # refuses what vLLM would compute in another way, before anything is asked
    scaled = rope_record(published_config(options)) != rope_record(config)
    what = "the base without the adapter, by vLLM" + (", with the RoPE scaling it was trained with" if scaled else "")
    commit = loaded_commit(options.adapter, "adapter_config.json")
    adapter = identity_of([identity, options.adapter, commit, files_of(options.adapter)])
    return [
        Examinee(SCALED if scaled else BASE, identity, VLLMAnswers(engine, tokenizer), what=what),
        Examinee(
            ADAPTER, adapter, VLLMAnswers(engine, tokenizer, adapted=True), what="the base with the adapter, by vLLM"
        ),
    ]
