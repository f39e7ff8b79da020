"""The part of vLLM's documented interface that is used: names, arguments and defaults as in vLLM 0.33.

`test_the_stand_in_is_as_documented` compares them with an installed vLLM, if there is one.
"""

import random
from dataclasses import dataclass
from types import SimpleNamespace

from transformers import AutoTokenizer


@dataclass
class EngineArgs:
    """What `LLM` hands its other arguments to."""

    enable_prefix_caching: bool | None = None
    enable_lora: bool = False
    max_lora_rank: int = 16
    max_model_len: int = 512


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16

    def __post_init__(self):
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}.")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class TokensPrompt:
    prompt_token_ids: list[int]


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: object
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: object
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None


class LLM:
    """Writes what `write` says to a prompt, or words drawn by the seed; notes how it was made and asked."""

    made, asked, write = [], [], None

    def __init__(
        self, model, *, tensor_parallel_size=1, dtype="auto", quantization=None, revision=None,
        tokenizer_revision=None, seed=0, gpu_memory_utilization=0.92, enforce_eager=False, hf_overrides=None, **kwargs,
    ):  # fmt: skip
        length = EngineArgs(**kwargs).max_model_len  # refuses what it does not know
        self.made.append({"model": model, "revision": revision, "hf_overrides": hf_overrides, **kwargs})
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.model_config = SimpleNamespace(max_model_len=length)

    def get_tokenizer(self):
        return self._tokenizer

    def generate(
        self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None,
        tokenization_kwargs=None, mm_processor_kwargs=None,
    ):  # fmt: skip
        assert len(prompts) == len(sampling_params)
        self.asked.append((prompts, sampling_params, lora_request))
        return [
            self._answer(TokensPrompt(**prompt).prompt_token_ids, params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt, params):
        drawn = random.Random(params.seed).choices("abcdefgh", k=40)
        text = self.write(self._tokenizer.decode(prompt)) if self.write else " ".join(drawn)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][: params.max_tokens]
        reason = "length" if len(ids) == params.max_tokens else "stop"
        text = self._tokenizer.decode(ids)
        return RequestOutput("0", None, prompt, None, [CompletionOutput(0, text, ids, None, None, reason)], True, 7)
