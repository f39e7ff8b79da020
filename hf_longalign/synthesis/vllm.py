"""Replies from vLLM inside this process, without a server."""

import json
from collections.abc import Sequence
from typing import Any

from hf_longalign.endpoint.protocol import BAD_REQUEST, GenerationError, Reply, Request
from hf_longalign.lazy import require
from hf_longalign.serving import load_vllm
from hf_longalign.synthesis.local import BatchingGenerator, Waiting, recorded_name
from hf_longalign.text import digest


# Fields of a request's body that are no field of `SamplingParams`: they are read elsewhere.
_ELSEWHERE = ("chat_template_kwargs", "max_completion_tokens")


class VLLMGenerator(BatchingGenerator):
    """Generates with vLLM's `LLM` (https://docs.vllm.ai/en/stable/serving/offline_inference/).

    Written against the interface of vLLM 0.33 and tested with a stand-in of it; not run on a GPU. The random numbers
    of a reply are seeded by its request alone; what else is in the batch can change the last bits of its logits.

    A LoRA adapter of `LongAlignSFTTrainer` gets the RoPE and the range it was trained with, which vLLM would not read
    by itself. Another model's RoPE is scaled by `hf_overrides`, as in the example. Beginnings that prompts share are
    computed once.

    Parameters:
        model: Hub id or folder; of an adapter the base.
        revision: of a Hub id; recorded with it.
        adapter: Hub id or folder of a LoRA adapter on the model; recorded beside it.
        batch_size: the most requests in one call of `LLM.generate`, which ends with the longest reply.
        **options: further arguments of `vllm.LLM` (`tensor_parallel_size`, `max_model_len`, `gpu_memory_utilization`
            …). `hf_overrides` is recorded by a digest.

    Example (nothing is loaded before the first request):

    >>> rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> longer = {"rope_parameters": rope, "max_position_embeddings": 131072}
    >>> VLLMGenerator("org/tiny", hf_overrides=longer, max_model_len=131072, tensor_parallel_size=2).model
    'org/tiny+overrides-069cdf4f'
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        batch_size: int = 256,
        **options: Any,
    ) -> None:
        name = recorded_name(model, revision)
        if adapter is not None:
            name += f"+{recorded_name(adapter)}"
        if options.get("hf_overrides"):
            name += f"+overrides-{digest(json.dumps(options['hf_overrides'], sort_keys=True), size=4)}"
        super().__init__(name, batch_size)
        self._source = model
        self._adapter = adapter
        self._options = {"revision": revision, **options}
        self._lora: Any = None

    def _read_files(self) -> tuple[Any, Any]:
        model, self._lora = load_vllm(self._source, self._adapter, name=self.model, **self._options)
        return model, model.get_tokenizer()

    def _length(self, model: Any) -> int:
        return int(model.model_config.max_model_len)

    def _encode(self, request: Request) -> list[int]:
        self._params(request)  # here, where it is refused alone and not with its batch
        return super()._encode(request)

    def _params(self, request: Request) -> Any:
        sampling = request.sampling
        fields = {name: value for name, value in sampling.extra.items() if name not in _ELSEWHERE}
        given = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        fields |= {name: value for name, value in given.items() if value is not None}
        # By the key and not by the request's own seed, which may be None: two draws of one prompt must differ.
        fields |= {"seed": int(request.key[:15], 16), "max_tokens": sampling.token_limit}
        try:
            return require("vllm", "vllm").SamplingParams(**fields)
        except (TypeError, ValueError) as error:
            raise GenerationError(BAD_REQUEST, f"vLLM refuses the sampling: {error}") from None

    def _generate(self, batch: Sequence[Waiting]) -> list[Reply]:
        model, _ = self._load()
        outputs = model.generate(
            [{"prompt_token_ids": waiting.prompt} for waiting in batch],
            [self._params(waiting.request) for waiting in batch],
            use_tqdm=False,
            lora_request=self._lora,
        )
        return [
            Reply(
                written.text,
                written.finish_reason,
                len(output.prompt_token_ids),
                len(written.token_ids),
                self.model,
                cached_tokens=output.num_cached_tokens or 0,
            )
            for output in outputs
            for written in output.outputs
        ]
