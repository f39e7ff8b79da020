"""Replies from a model on this machine, by transformers or vLLM: what waits is generated together."""

import asyncio
import hashlib
import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_longalign.endpoint.protocol import (
    BAD_REQUEST,
    TOO_LONG,
    EndpointError,
    GenerationError,
    Notify,
    Reply,
    Request,
    RunStopped,
    ignore,
    settle,
)
from hf_longalign.lazy import require
from hf_longalign.serving import load_vllm
from hf_longalign.text import digest


if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

# Requests that come this close together share a batch.
_GATHER_SECONDS = 0.01
_BLOCK = 2**16
_STRIDE = 2**24
# Further fields of a request that are read here, whatever generates: in `_encode`, and as `Sampling.token_limit`.
_READ_HERE = {"chat_template_kwargs", "max_completion_tokens"}


@dataclass
class Waiting:
    """A request with its prompt's token ids, and where its reply is awaited."""

    request: Request
    prompt: list[int]
    reply: "asyncio.Future[Reply]"


class BatchingGenerator(ABC):
    """The half of a generator on this machine that knows no model: what waits is generated together."""

    def __init__(self, name: str, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}. Set it to what the memory holds.")
        self.model = name
        self.concurrency = batch_size
        self._loaded: tuple[Any, Any] | None = None
        self._loading = threading.Lock()
        self._waiting: list[Waiting] = []
        self._working: asyncio.Task[None] | None = None
        self._draining = False

    async def check(self) -> None:
        """Load model and tokenizer. Raises `EndpointError` where there are none, or no chat template."""
        await asyncio.to_thread(self._load)

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """The reply, from the next batch. See `Generator.reply`."""
        # Long prompts take milliseconds, during which other replies could be handed over.
        prompt = await asyncio.to_thread(self._encode, request)
        if self._draining:
            raise RunStopped("The run is stopping.")
        waiting = Waiting(request, prompt, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await waiting.reply

    def drain(self) -> None:
        """Finish the batch at work and no other."""
        self._draining = True
        for waiting in self._waiting:
            settle(waiting.reply, RunStopped("The run is stopping."))
        self._waiting.clear()

    async def close(self) -> None:
        """End the batch at work; the model stays loaded for the next run."""
        if self._working is not None:
            await self._working
        self._working = None
        self._draining = False

    async def _work(self) -> None:
        while self._waiting:
            # Jobs that were just answered send their next request within this time and share the batch.
            await asyncio.sleep(_GATHER_SECONDS)
            batch, self._waiting = self._waiting[: self.concurrency], self._waiting[self.concurrency :]
            outcomes: Sequence[Reply | Exception]
            try:
                outcomes = await asyncio.to_thread(self._generate, batch)
            except Exception as error:  # noqa: BLE001 - raised where the replies are awaited
                outcomes = [error] * len(batch)
            for waiting, outcome in zip(batch, outcomes, strict=True):
                settle(waiting.reply, outcome)

    def _load(self) -> tuple[Any, Any]:
        """The model and its tokenizer, read where they are first needed."""
        # Two threads may need the model at once: the check and the first prompt.
        with self._loading:
            if self._loaded is None:
                model, tokenizer = self._read_files()
                if not getattr(tokenizer, "chat_template", None):
                    raise EndpointError(
                        f"The tokenizer of {self.model!r} has no chat template. Take an instruct model."
                    )
                self._loaded = model, tokenizer
        return self._loaded

    def _encode(self, request: Request) -> list[int]:
        """The prompt's token ids. Raises `GenerationError` where it and the reply exceed the model's length."""
        model, tokenizer = self._load()
        messages = [{"role": role, "content": content} for role, content in request.messages]
        try:
            ids: list[int] = (
                tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    return_dict=False,
                    **request.sampling.extra.get("chat_template_kwargs", {}),
                )
                if request.chat
                else tokenizer(messages[0]["content"])["input_ids"]
            )
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            raise GenerationError(BAD_REQUEST, f"The chat template refuses the messages: {error}") from None
        # Beyond it most models go on in nonsense without an error.
        length = self._length(model)
        if length is not None and len(ids) + request.sampling.token_limit > length:
            raise GenerationError(
                TOO_LONG,
                f"{len(ids)} tokens of prompt and {request.sampling.token_limit} of reply exceed the {length} of "
                f"{self.model!r}. Set a smaller `max_tokens`.",
            )
        return ids

    @abstractmethod
    def _read_files(self) -> tuple[Any, Any]:
        """The model and its tokenizer. Raises `EndpointError` where they cannot be loaded."""

    @abstractmethod
    def _length(self, model: Any) -> int | None:
        """The most tokens of prompt and reply; `None` for no limit."""

    @abstractmethod
    def _generate(self, batch: Sequence[Waiting]) -> Sequence[Reply]:
        """The replies of a batch, in its order."""


class TransformersGenerator(BatchingGenerator):
    """Generates with a causal language model from the Hub or a folder, whose tokenizer has a chat template.

    The random numbers of a reply depend on its request alone: neither on the batch it is in nor on the device. What a
    batch can still change are the last bits of the logits; in float32 that seldom turns a token, in bfloat16 more
    often. A folder is recorded by its name and a hash of its files. Of the further fields of a request it takes
    `chat_template_kwargs` and `max_completion_tokens`.

    Parameters:
        model: Hub id or folder.
        revision: of a Hub id; recorded with it.
        batch_size: the most rows at once; halved when memory runs out.
        device: "cuda", "mps", "cpu" or "auto" (spread over all GPUs); by default the best there is.
        dtype: of the weights; "auto" is what the model was saved in.

    Example (nothing is loaded before the first request):

    >>> generator = TransformersGenerator("org/tiny", revision="v2", batch_size=4)
    >>> generator.model, generator.concurrency
    ('org/tiny@v2', 4)
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        batch_size: int = 16,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        super().__init__(recorded_name(model, revision), batch_size)
        self._source = model
        self._revision = revision
        self._device = device
        self._dtype = dtype
        self._left_out: set[str] = set()

    def _encode(self, request: Request) -> list[int]:
        new = set(request.sampling.extra) - _READ_HERE - self._left_out
        if new:  # once a name, not once a request
            self._left_out |= new
            logger.warning("%s takes no %s: left out.", self.model, ", ".join(sorted(new)))
        return super()._encode(request)

    def _read_files(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = self._device or best
        where = {"device_map": "auto"} if device == "auto" else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._source, revision=self._revision)
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._source, revision=self._revision, dtype=self._dtype, **where
            )
        except (OSError, ValueError) as error:
            # Libraries name the folder, a path of this machine, in their messages.
            told = str(error).replace(self._source, self.model)
            raise EndpointError(f"The model {self.model!r} cannot be loaded: {told}") from None
        return (model.eval() if where else model.eval().to(device)), tokenizer

    def _length(self, model: Any) -> int | None:
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def _generate(self, batch: Sequence[Waiting]) -> list[Reply]:
        import torch

        try:
            return self._generate_at_once(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise RunStopped(f"No memory for one request to {self.model!r}. Set a smaller `max_tokens`.") from None
        half = len(batch) // 2
        # For the rest of the run: the next batch would run out of memory as well.
        self.concurrency = max(1, half)
        logger.warning("Out of memory with %d rows: going on with %d.", len(batch), half)
        torch.cuda.empty_cache()
        return self._generate(batch[:half]) + self._generate(batch[half:])

    def _generate_at_once(self, batch: Sequence[Waiting]) -> list[Reply]:
        """Prompts are padded on the left, so that every row's last token is its newest."""
        import torch
        from transformers import GenerationConfig

        model, tokenizer = self._load()
        width = max(len(waiting.prompt) for waiting in batch)
        limits = torch.tensor([waiting.request.sampling.token_limit for waiting in batch], device=model.device)
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        # A model may end its turn with a token that only one of the two names; -1 is none.
        ends = sorted(ends | ({tokenizer.eos_token_id} - {None})) or [-1]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        gaps = [width - len(waiting.prompt) for waiting in batch]
        ids = [[pad] * gap + waiting.prompt for gap, waiting in zip(gaps, batch, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        longest = int(limits.max())
        # Greedy for transformers, as `Draw` leaves one token to choose from; its own sampling shares one generator by
        # batch.
        config = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=ends, pad_token_id=pad)
        with torch.inference_mode():
            output = model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
                logits_processor=[Draw([waiting.request for waiting in batch], width, longest, model.device)],
                stopping_criteria=[lambda tokens, scores, **_: tokens.shape[1] - width >= limits],
            )
        replies = []
        for waiting, row in zip(batch, output[:, width:].tolist(), strict=True):
            # A row goes on, with padding, until the last one of the batch is done.
            row = row[: waiting.request.sampling.token_limit]
            end = next((place for place, token in enumerate(row) if token in ends), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            # The end token is counted, as servers do.
            used = len(row) if end is None else end + 1
            replies.append(Reply(text, "length" if end is None else "stop", len(waiting.prompt), used, self.model))
        return replies


class Draw:
    """A logits processor that draws each row's next token itself and leaves no other to choose from.

    Token i of a row comes from number i of a sequence that the request's key seeds: the first token, by falling
    probability, at which the cumulated probability exceeds that number times the mass that `top_p` keeps.
    """

    def __init__(self, requests: Sequence[Request], width: int, longest: int, device: "torch.device") -> None:
        import torch

        self._width = width
        # On the CPU, where the same seed gives the same numbers on every machine; the step past the end is never read.
        draws = [
            torch.rand(longest + 1, generator=torch.Generator().manual_seed(int(request.key[:15], 16)))
            for request in requests
        ]
        self._draws = torch.stack(draws).to(device)
        asked = [(request.sampling.temperature, request.sampling.top_p) for request in requests]
        # What is not set leaves the model's distribution as it is, which is what 1.0 does.
        rows = [[1.0 if value is None else value for value in pair] for pair in asked]
        self._temperature, self._top_p = torch.tensor(rows, device=device).T

    def __call__(self, tokens: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores `(rows, vocabulary)` -> 0 for the token drawn, minus infinity for all others."""
        import torch

        step = min(tokens.shape[1] - self._width, self._draws.shape[1] - 1)
        greedy = self._temperature == 0
        temperature = self._temperature.masked_fill(greedy, 1.0)[:, None]
        # Stable: equal probabilities keep the order of the vocabulary on every device.
        ordered, order = (scores.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        mass = ordered.cumsum(-1)
        # A token is kept if those before it hold less than top_p: the first always is.
        kept = (mass - ordered < self._top_p[:, None]).sum(-1, keepdim=True)
        target = self._draws[:, step, None] * mass.gather(-1, kept - 1)
        place = torch.searchsorted(mass, target, right=True).clamp(max=kept - 1).masked_fill(greedy[:, None], 0)
        return torch.full_like(scores, -torch.inf).scatter(-1, order.gather(-1, place), 0.0)


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
        fields = {name: value for name, value in sampling.extra.items() if name not in _READ_HERE}
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
        replies = []
        for output in outputs:
            written = output.outputs[0]  # one to a request, as an endpoint's, even where `n` asks for more
            used = (len(output.prompt_token_ids), len(written.token_ids))
            cached = output.num_cached_tokens or 0
            replies.append(Reply(written.text, written.finish_reason, *used, self.model, cached_tokens=cached))
        return replies


def recorded_name(model: str, revision: str | None = None) -> str:
    """Return the name of a model as it is recorded: a Hub id with its revision, a folder's last part with a hash."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision}" if revision else model
    state = hashlib.blake2b(digest_size=4)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        state.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, _STRIDE):  # of gigabytes, 64 KiB of every 16 MiB
                content.seek(start)
                state.update(content.read(_BLOCK))
    return f"{folder.resolve().name}-{state.hexdigest()}"
