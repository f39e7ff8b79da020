"""Greedy answers of a local model: a beginning that prompts share is read once, answers are written in batches.

With transformers every answer is the one that `generate(do_sample=False)` gives for the prompt alone, token for token
up to rounding. Prompts are read one at a time in the order in which they share most, each from where it leaves the one
before it; what was read waits for others of its length and is answered with them. vLLM does as much by itself.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_longalign.evaluation.prefix_cache import (
    PrefixCache,
    Row,
    branch_points,
    forget_longer_texts,
    join_rows,
    reading_order,
    reuse_problem,
    shared_lengths,
)
from hf_longalign.evaluation.prompt import Completion, Prompt, cut_at, encode_text
from hf_longalign.lazy import require
from hf_longalign.probe import eval_mode
from hf_longalign.records.report import Speed
from hf_longalign.rope import check_range


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Tokens of one forward after a beginning that is held. There attention needs a mask, and under a mask a kernel
# computes what lies behind each token too: half a chunk more per token. Small chunks waste less (on a CPU 1.12 against
# 1.01 times one prompt after another at 4,096 tokens); on a GPU they must fill it, and the mask of 4,096 tokens over
# 128k (512 MiB) must stay small. Where nothing is held and no layer has a window no mask is needed, and a prompt is
# read as a whole, as `generate` does, while there is memory for that.
_CHUNK_ON_CPU, _CHUNK, _LEAST_CHUNK = 512, 4096, 256
# Prompts of one call of vLLM, which ends with its longest answer: what is answered by then is on disk after a kill.
_VLLM_PROMPTS = 256


class _Encoded(NamedTuple):
    """A prompt and its tokens, int32 `(tokens,)`."""

    prompt: Prompt
    ids: np.ndarray

    @property
    def tokens(self) -> int:
        """Room it needs, its answer included."""
        return self.ids.size + self.prompt.max_new_tokens


class _Waiting(NamedTuple):
    """A prompt that was read: the first token of its answer, and what is kept of it (`None`: nothing)."""

    number: int
    encoded: _Encoded
    cached: int
    first: torch.Tensor
    row: Row | None


class Pools(Generic[T]):
    """Prompts that were read and wait to be answered together with others of about their length.

    All that wait may take `batch_tokens`, padding included.

    >>> pools = Pools(1000)
    >>> pools.add("a", 400), pools.add("b", 410), pools.add("c", 100), pools.add("d", 400)
    ([], [], [], [['a', 'b']])
    >>> pools.empty()
    [['d'], ['c']]
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._pools: dict[int, list[tuple[T, int]]] = defaultdict(list)

    def add(self, item: T, tokens: int) -> list[list[T]]:
        """Let an item of so many tokens wait, and return the batches that must be answered first to make room."""
        name = round(4 * math.log2(tokens))  # lengths of one pool differ by at most a fifth: little of it is padding
        leaving = []
        while self._pools:
            others = sum(_cost(pool) for other, pool in self._pools.items() if other != name)
            if others + _cost([*self._pools.get(name, []), (None, tokens)]) <= self.batch_tokens:
                break
            leaving.append(self._pop())
        self._pools[name].append((item, tokens))
        return leaving

    def empty(self) -> list[list[T]]:
        """Return all batches that wait, the largest first."""
        return [self._pop() for _ in range(len(self._pools))]

    def _pop(self) -> list[T]:
        largest = max(self._pools, key=lambda name: _cost(self._pools[name]))
        return [item for item, _ in self._pools.pop(largest)]


def _cost(pool: Sequence[tuple[Any, int]]) -> int:
    return len(pool) * max(tokens for _, tokens in pool)


class LocalGenerator:
    """Answers prompts greedily with a loaded model.

    Models whose state cannot be shared or batched exactly (see [`reuse_problem`]) answer one prompt after another
    through `generate`, which is logged.

    Args:
        model: on its device or devices; an adapter that is turned off stays off.
        tokenizer: the model's.
        batch_tokens: of the prompts and answers that are kept to be answered together, beside the prompt being read;
            lowered where memory has no room for them.

    Example:

    ```python
    for prompt, completion in LocalGenerator(model, tokenizer).generate(prompts):
        store.add(prompt.key, completion.text)
    ```
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int = 65_536
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.stats = Speed()
        self.on_read: Callable[[Prompt], None] = lambda prompt: None
        self._whole = model.config._attn_implementation != "eager"  # which writes out all scores
        self._chunk = _CHUNK_ON_CPU if model.device.type == "cpu" else _CHUNK
        self._end_ids = end_ids(model, tokenizer)

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its answer as soon as that is there, in the order that shares most.

        Raises:
            ValueError: a prompt beyond the model's range or without a token, before anything is generated.
            torch.OutOfMemoryError: a single prompt does not fit.
        """
        encoded = []
        for prompt in prompts:
            ids = np.array(encode_text(self.tokenizer, prompt.text, chat=prompt.chat, prefix=prompt.prefix), np.int32)
            if not ids.size or prompt.max_new_tokens < 1:
                raise ValueError(
                    f"A prompt must have a token and room for an answer, got {ids.size} tokens and `max_new_tokens` "
                    f"{prompt.max_new_tokens!r} for {prompt.text[:50]!r}. Leave it out or set its room."
                )
            encoded.append(_Encoded(prompt, ids))
        if not encoded:
            return
        check_range(self.model.config, max(one.tokens for one in encoded), "length")
        problem = reuse_problem(self.model)
        if problem is not None:
            logger.warning("Prompts are answered one after another, without a shared cache: %s.", problem)
        start = time.perf_counter()
        with eval_mode(self.model):
            for one, tokens in self._one_by_one(encoded) if problem else self._together(encoded):
                self.stats.prompt_tokens += one.ids.size
                self.stats.generated_tokens += len(tokens)
                self.stats.seconds += time.perf_counter() - start
                ended = tokens[-1] in self._end_ids
                text = self._decoded(tokens[:-1] if ended else tokens)
                cut = not ended and not any(stop in text for stop in one.prompt.stop)
                yield one.prompt, Completion(cut_at(text, one.prompt.stop), len(tokens), cut)
                start = time.perf_counter()

    def _together(self, encoded: list[_Encoded]) -> Iterator[tuple[_Encoded, list[int]]]:
        """Answer all, in rounds: one that runs out of memory is followed by one that asks for less."""
        order = reading_order([one.ids for one in encoded])
        left = dict(enumerate(encoded[number] for number in order))
        while left:
            failure = None
            try:
                for number, tokens in self._round(list(left.items())):
                    yield left.pop(number), tokens
            except torch.OutOfMemoryError as error:
                failure = str(error)
            if failure is None:
                continue
            # Only now that the exception is gone, so is what its frames held.
            torch.cuda.empty_cache()
            sizes = [one.tokens for one in left.values()]
            # First no prompt is read as a whole, then batches are halved, and once each is alone, the pieces too.
            if not self._whole and self.batch_tokens >= 2 * min(sizes):
                self.batch_tokens = min(self.batch_tokens, sum(sizes)) // 2
                logger.warning("Out of memory: going on with `batch_tokens=%d`.", self.batch_tokens)
            elif self._whole or self._chunk > _LEAST_CHUNK:
                self._whole, self._chunk = False, self._chunk if self._whole else self._chunk // 2
                logger.warning("Out of memory: going on with prompts read in pieces of %d tokens.", self._chunk)
            else:
                raise torch.OutOfMemoryError(
                    f"A prompt must fit into memory alone, got one of up to {max(sizes):,} tokens that does not. Set "
                    f"shorter lengths, `load_in_4bit`, or `device_map` for several GPUs. ({failure})"
                )

    @torch.inference_mode()
    def _round(self, numbered: list[tuple[int, _Encoded]]) -> Iterator[tuple[int, list[int]]]:
        """Read prompts in the order given and answer them, each as soon as its batch is full."""
        shared = shared_lengths([one.ids for _, one in numbered])
        memory = PrefixCache(self.model.config)
        pools: Pools[_Waiting] = Pools(self.batch_tokens)
        for index, (number, one) in enumerate(numbered):
            # One prompt at a time, for padded rows would be computed too, and reading is where the time goes.
            marks = branch_points(shared, index)  # where later prompts go back to
            logits = memory.read(
                self.model, one.ids, keep=shared[index], marks=marks, chunk=self._chunk, whole=self._whole
            )
            self.on_read(one.prompt)
            first = logits.argmax(-1)
            if 2 * one.tokens > self.batch_tokens:  # no other would fit beside it: no need for a copy
                yield from self._decode(memory.cache, None, [_Waiting(number, one, shared[index], first, None)])
                continue
            waiting = _Waiting(number, one, shared[index], first, memory.copy_row())
            for batch in pools.add(waiting, one.tokens):
                yield from self._answer(batch)
        for batch in pools.empty():
            yield from self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> Iterator[tuple[int, list[int]]]:
        cache, mask = join_rows(self.model.config, [one.row for one in batch if one.row is not None])
        yield from self._decode(cache, mask, batch)

    def _decode(self, cache: Any, mask: torch.Tensor | None, batch: list[_Waiting]) -> Iterator[tuple[int, list[int]]]:
        """Write the answers of a batch; yields the number of each prompt with its tokens as it ends.

        `cache` holds `(batch, …, tokens, …)`, padded on the left; `mask` is int64 `(batch, tokens)`, or `None`.
        """
        device = self.model.device
        rows = list(range(len(batch)))  # which prompts the rows of the cache belong to
        answers: list[list[int]] = [[] for _ in batch]
        open_rows = set(rows)
        tokens = torch.stack([one.first for one in batch]).to(device)
        positions = torch.tensor([one.encoded.ids.size for one in batch], device=device)
        mask = None if mask is None else mask.to(device)
        while True:
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row in open_rows:
                    answers[row].append(token)
                    if self._ended(batch[row].encoded.prompt, answers[row]):
                        open_rows.remove(row)
                        self.stats.cached_tokens += batch[row].cached
                        yield batch[row].number, answers[row]
            if not open_rows:
                return
            # Rows that have ended are computed along until they are half: each removal copies the whole cache.
            if 2 * len(open_rows) <= len(rows):
                kept = torch.tensor([index for index, row in enumerate(rows) if row in open_rows], device=device)
                rows = [row for row in rows if row in open_rows]
                tokens, positions = tokens[kept], positions[kept]
                mask = None if mask is None else mask[kept]
                cache.batch_select_indices(kept)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            # Without positions the model would count the padding on the left as text.
            logits = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            tokens, positions = logits[:, -1].argmax(-1).to(device), positions + 1

    def _ended(self, prompt: Prompt, tokens: list[int]) -> bool:
        if tokens[-1] in self._end_ids or len(tokens) >= prompt.max_new_tokens:
            return True
        # The whole text each time: a stop text may begin inside a token, and tokens join into other characters.
        return bool(prompt.stop) and cut_at(text := self._decoded(tokens), prompt.stop) != text

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def _one_by_one(self, encoded: list[_Encoded]) -> Iterator[tuple[_Encoded, list[int]]]:
        """Answer through `generate`, which knows every model."""
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        pad = self.tokenizer.pad_token_id
        own = base.generation_config
        for one in encoded:

            def stopped(ids: torch.Tensor, scores: Any, one: _Encoded = one, **kwargs: Any) -> torch.Tensor:
                ended = self._ended(one.prompt, ids[0, one.ids.size :].tolist())
                return torch.tensor([ended], device=ids.device)

            # What `generate` is not given it takes from the model's own config, penalties included.
            base.generation_config = GenerationConfig(eos_token_id=sorted(self._end_ids) or None)
            try:
                ids = torch.as_tensor(one.ids, dtype=torch.long, device=base.device)[None]
                model: Any = self.model
                forget_longer_texts(self.model)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=one.prompt.max_new_tokens,
                    pad_token_id=pad if pad is not None else 0,
                    stopping_criteria=[stopped],
                )
            finally:
                base.generation_config = own
            yield one, output[0, one.ids.size :].tolist()


def end_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # Chat models often end a turn with a token that only their generation config names (Llama 3: three of them).
    ids = base.generation_config.eos_token_id if base.generation_config is not None else None
    listed = ids if isinstance(ids, list | tuple) else [ids]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)


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
        for first in range(0, len(encoded), _VLLM_PROMPTS):
            batch, start = encoded[first : first + _VLLM_PROMPTS], time.perf_counter()
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
