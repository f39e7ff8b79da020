"""Keys and values of what was read: a beginning that prompts share is computed once.

Prompts are read one at a time, which needs neither padding nor a padding mask; what was read is then answered in
batches, padded on the left. Both are what `generate` computes for a prompt alone, up to rounding.
"""

import inspect
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_longalign.attention.support import ATTENTION_NAME, layer_kinds
from hf_longalign.rope import rope_record


ATTENTIONS = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", ATTENTION_NAME})
_KINDS = frozenset({"full_attention", "sliding_attention"})
# They change layers, each token by itself; prompt learning, X-LoRA and activated LoRA look at the text.
_ADAPTERS = frozenset({"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "VERA", "LN_TUNING"})
_ARGUMENTS = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"})

Pair = tuple[torch.Tensor, ...]  # keys and values
State = list[Pair]


def reading_order(prompts: Sequence[np.ndarray]) -> list[int]:
    """Return the order in which each prompt, int `(tokens,)`, follows the one it shares its longest beginning with.

    >>> reading_order([np.array([7, 8, 9]), np.array([1, 2]), np.array([7, 8, 300]), np.array([7, 8])])
    [1, 3, 0, 2]
    """
    # Sorted as words are, what shares a beginning stands together, and every shared token is read once.
    words = [ids.astype(">u4").tobytes() for ids in prompts]  # big-endian bytes sort as the numbers do
    return sorted(range(len(words)), key=words.__getitem__)


def shared_lengths(ordered: Sequence[np.ndarray]) -> list[int]:
    """Return how many tokens each prompt shares with the one before it, at most all but its last token.

    >>> shared_lengths([np.array([1, 2]), np.array([7, 8]), np.array([7, 8, 9]), np.array([7, 8, 9])])
    [0, 0, 2, 2]
    """
    # The last token is always read anew: its logits give the first token of the answer.
    lengths = [0] if len(ordered) else []
    for before, ids in pairwise(ordered):
        most = min(before.size, ids.size - 1)
        parts = np.flatnonzero(before[:most] != ids[:most])
        lengths.append(int(parts[0]) if parts.size else most)
    return lengths


def branch_points(shared: Sequence[int], index: int) -> set[int]:
    """Return the lengths at which prompts after `index` leave what it has in common with them.

    >>> sorted(branch_points([0, 6, 8, 3, 5, 0, 9], 0))
    [3, 6]
    """
    return {int(length) for length in takewhile(bool, accumulate(shared[index + 1 :], min))}


class Row(NamedTuple):
    """A copy of what is held of one prompt: keys and values `(1, heads, tokens, width)` by layer, and its length."""

    state: State
    length: int


class PrefixCache:
    """What was read last, of which the next prompt keeps the beginning they share."""

    def __init__(self, config: PretrainedConfig) -> None:
        # Of the config, so that layers with a sliding window come as such.
        self.cache = DynamicCache(config=config)
        # These layers forget what has left the window, so their state is put aside at the lengths to go back to.
        self._windows = {
            index: layer.sliding_window
            for index, layer in enumerate(self.cache.layers)
            if isinstance(layer, DynamicSlidingWindowLayer)
        }
        self._marks: dict[int, State] = {}
        self._length = 0

    def read(
        self,
        model: PreTrainedModel | PeftModel,
        ids: np.ndarray,
        *,
        keep: int,
        marks: Iterable[int],
        chunk: int,
        whole: bool,
    ) -> torch.Tensor:
        """Read a prompt, int `(tokens,)`, and return the logits after it, `(vocabulary,)`.

        Its first `keep` tokens are those of the prompt before it, 0 or one of that one's `marks`: the lengths to which
        later prompts go back. What follows a beginning that is held is read in pieces of `chunk` tokens, and a prompt
        of which nothing is held as a `whole`, where no layer has a window, or in such pieces too.
        """
        self._marks = {mark: state for mark, state in self._marks.items() if mark <= keep}
        layer: Any
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :keep], layer.values[:, :, :keep]
        for number, (index, window) in enumerate(self._windows.items()):
            self.cache.layers[index] = DynamicSlidingWindowLayer(window)  # it cannot be made shorter, only filled anew
            if keep:
                _fill(self.cache.layers[index], self._marks[keep][number], keep)
        marks = set(marks) if self._windows else set()
        # Pieces end at every mark: the state there must be seen before the next token pushes a part of it out.
        cuts = sorted({keep, ids.size, *(mark for mark in marks if keep < mark < ids.size)})
        pieces = [
            (at, min(at + size, stop))
            for cut, stop in pairwise(cuts)
            for size in [stop if whole and not cut and not self._windows else chunk]
            for at in range(cut, stop, size)
        ]
        for start, end in pieces:
            positions = torch.arange(start, end, device=model.device)[None]
            logits = model(
                input_ids=torch.as_tensor(ids[start:end], dtype=torch.long, device=model.device)[None],
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            if end in marks:
                self._marks[end] = [_copy(self.cache.layers[index]) for index in self._windows]
        self._length = ids.size
        return logits[0, -1]

    def copy_row(self) -> Row:
        """Return a copy of what is held, to be answered later."""
        return Row([_copy(layer) for layer in self.cache.layers], self._length)


def join_rows(config: PretrainedConfig, rows: Sequence[Row]) -> tuple[DynamicCache, torch.Tensor | None]:
    """Join prompts that were read into one batch, padded on the left; the rows' states are used up.

    Returns:
        The cache, and the mask, int64 `(rows, tokens)` with 0 on padding, `None` where nothing is padded.
    """
    cache = DynamicCache(config=config)
    lengths = [row.length for row in rows]
    most = max(lengths)
    for layer in cache.layers:
        states = [row.state.pop(0) for row in rows]  # so that memory holds one layer twice, not all of them
        held = min(most, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else most
        # Zeros, and nothing uninitialised: a masked value still counts as 0 times itself, and 0 * nan is nan.
        pair = tuple(first.new_zeros(len(states), first.shape[1], held, first.shape[-1]) for first in states[0])
        for row, state in enumerate(states):
            for joined, own in zip(pair, state, strict=True):
                joined[row, :, held - own.shape[-2] :] = own[0]
        _fill(layer, pair, most)
    if min(lengths) == most:
        return cache, None
    columns = torch.arange(most)
    return cache, torch.stack([columns >= most - length for length in lengths]).long()


def _copy(layer: Any) -> Pair:
    # A window is a view, which would keep all that was read with it.
    return layer.keys.clone(), layer.values.clone()


def _fill(layer: Any, pair: Pair, length: int) -> None:
    """Give an empty layer what a layer that has seen so many tokens holds."""
    layer.update(*pair)
    # It was given what is left of many tokens, and would take the next one for the second.
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def forget_longer_texts(model: PreTrainedModel | PeftModel) -> None:
    """Make "dynamic" RoPE forget the longest text so far."""
    # It keeps the angles of the longest text so far; a short one sets them back.
    if any(rope.get("rope_type") == "dynamic" for rope in rope_record(model.config).parts):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def reuse_problem(model: PreTrainedModel | PeftModel) -> str | None:
    """Say why what a model has read cannot be kept for another prompt or joined into a batch; `None` where it can.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    >>> reuse_problem(LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=1, rope_parameters=dynamic)))
    'the angles of its RoPE ("dynamic") depend on the length of the text'
    """
    # Only what is known to be exact: adapters that look at one token at a time, transformers' own model code,
    # attention over everything or over a window, rotary positions whose angles do not depend on the text's length.
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            adapter = model.peft_config[name]
            if adapter.peft_type not in _ADAPTERS or getattr(adapter, "alora_invocation_tokens", None):
                return f"its adapter ({adapter.peft_type}) is not known to look at one token at a time"
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not type(base).__module__.startswith("transformers."):
        return f"{type(base).__name__} is not transformers' own code"
    missing = sorted(_ARGUMENTS - set(inspect.signature(base.forward).parameters))
    if missing:
        return f"{type(base).__name__} takes no {', '.join(missing)}"
    config = base.config
    text = config.get_text_config(decoder=True)
    if text is not config:
        return "it is a multimodal model"
    if config._attn_implementation not in ATTENTIONS:
        return f'its attention "{config._attn_implementation}" is not one of {", ".join(sorted(ATTENTIONS))}'
    foreign = sorted(layer_kinds(config) - _KINDS)
    if foreign:
        return f"it has {', '.join(foreign)} layers"
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=text).layers):
        return "some of its layers keep another kind of state than keys and values"
    if not getattr(text, "rope_parameters", None) or getattr(text, "alibi", False):
        return "its positions are not rotary"
    for rope in rope_record(config).parts:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return f'the angles of its RoPE ("{rope["rope_type"]}") depend on the length of the text'
    return None
