"""Perplexity by position: how well a model predicts a token from so many tokens before it.

Documents are cut into windows, and each window is read alone, from position 0; one that is shorter than a window is
read whole. The token at place i of a window is predicted from the i tokens before it, so its loss counts at position
i. With a stride below the window the same text is scored at several positions, and the curve compares positions, not
texts.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_longalign.evaluation.prefix_cache import forget_longer_texts, reuse_problem
from hf_longalign.evaluation.runner import Examinee, ResultStore
from hf_longalign.probe import eval_mode
from hf_longalign.records.report import PerplexityResult
from hf_longalign.rope import check_range


logger = logging.getLogger(__name__)

# Enough for a steady curve: 20 documents of 32k tokens are 640k predictions.
DOCUMENTS = 20
# Logits of so many tokens exist at once in the model's precision, of so many in float32: with 150,000 words of
# vocabulary, 256 rows of float32 are 150 MB, and those of a whole window of 32k would be 20 GB.
_CHUNK, _ROWS = 2048, 256


class PositionLoss(NamedTuple):
    """Losses by position, float64 and int64 `(bins,)`: of [`position_edges`], bin i holds edge i up to the next."""

    sums: np.ndarray  # of the negative log-likelihoods, in nats
    counts: np.ndarray  # tokens predicted

    @property
    def perplexity(self) -> np.ndarray:
        """Exponential of the mean, float64 `(bins,)`; NaN where nothing was predicted."""
        mean = np.full(self.sums.shape, np.nan)
        return np.exp(np.divide(self.sums, self.counts, out=mean, where=self.counts > 0))


def position_edges(window: int) -> list[int]:
    """Return edges of up to eight bins that double in width, over positions 0 to `window - 1`.

    >>> position_edges(131072)
    [0, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    >>> position_edges(6)
    [0, 3, 6]
    """
    return sorted({0, *(window >> halvings for halvings in range(8))} - {1})


def perplexity_by_position(
    model: PreTrainedModel | PeftModel,
    documents: Sequence[ArrayLike],
    *,
    window: int,
    stride: int,
    bos_token_id: int | None = None,
) -> PositionLoss:
    """Return the losses of documents by position, computed in float32.

    Windows begin at token 0, `stride`, 2 `stride` … as long as they are whole; the only one of a shorter document ends
    with it.

    Args:
        model: a causal language model; an adapter that is turned off stays off.
        documents: token ids, int `(tokens,)` each, of any lengths, without special tokens.
        window: tokens of a window, the one `bos_token_id` adds included.
        stride: tokens from one window to the next, at most the window.
        bos_token_id: token that begins every window, for models that were trained so.

    Raises:
        ValueError: no documents, a window beyond the model's range, a bad stride.
    """
    if not len(documents):
        raise ValueError("`documents` must hold at least one, got none. Give token ids of texts.")
    if window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, got {window!r}. Set the longest length you evaluate.")
    if not 1 <= stride <= window:
        raise ValueError(f"`stride` must be from 1 to the window, {window}, got {stride!r}. Set half of the window.")
    check_range(model.config, window, "window")
    text, bounds = window - (bos_token_id is not None), np.array(position_edges(window))
    sums, counts = np.zeros(bounds.size - 1), np.zeros(bounds.size - 1, dtype=np.int64)
    # Models whose state cannot be kept exactly read a window at once, whose logits then exist all together.
    pieces = _CHUNK if reuse_problem(model) is None else window
    with eval_mode(model):
        for ids in map(np.asarray, documents):
            for start in range(0, max(1, ids.size - text + 1), stride):
                content = ids[start : start + text]
                tokens = content if bos_token_id is None else np.append(bos_token_id, content)
                if tokens.size > 1:  # else there is nothing to predict, or nothing to predict it from
                    bins = np.searchsorted(bounds, np.arange(1, tokens.size), side="right") - 1
                    sums += np.bincount(bins, _losses(model, tokens, pieces), minlength=sums.size)
                    counts += np.bincount(bins, minlength=sums.size)
    return PositionLoss(sums, counts)


@torch.inference_mode()
def _losses(model: PreTrainedModel | PeftModel, ids: np.ndarray, pieces: int) -> np.ndarray:
    """Negative log-likelihood of every token but the first, float64 `(tokens - 1,)`, read in pieces of so many."""
    tokens = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    losses: list[torch.Tensor] = []
    # In eval mode "dynamic" RoPE would read this window by the angles of a longer one before it.
    forget_longer_texts(model)
    cache = DynamicCache(config=model.config) if pieces < tokens.numel() else None
    for start in range(0, tokens.numel(), pieces):
        piece = tokens[start : start + pieces]
        known: dict[str, Any] = {}
        if cache is not None:
            places = torch.arange(start, start + piece.numel(), device=model.device)
            known = {"position_ids": places[None], "past_key_values": cache}
        logits = model(input_ids=piece[None], use_cache=cache is not None, **known).logits[0]
        # The last token of a piece is judged by the first of the next, which is not read yet.
        targets = tokens[start + 1 : start + 1 + piece.numel()].to(logits.device)
        for some, wanted in zip(logits[: targets.numel()].split(_ROWS), targets.split(_ROWS), strict=True):
            losses.append(torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none").cpu())
    return torch.cat(losses).double().numpy()


class PerplexitySuite:
    """Documents, read in windows that overlap by half: each once per model, shared among processes.

    Texts may have any length, as short ones are joined; the first `limit` documents are read.

    Raises:
        ValueError: no text, or a window beyond the model's range.
    """

    name = "perplexity"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        *,
        window: int,
        limit: int | None = DOCUMENTS,
    ) -> None:
        check_range(model.config, window, "perplexity_window")  # before other suites take their hours
        self.model, self.window, self.edges = model, window, position_edges(window)
        # Llama, Gemma and others were trained with this token before every text, and read badly without it.
        first = tokenizer("a")["input_ids"][0]
        self.bos = tokenizer.bos_token_id if first == tokenizer.bos_token_id else None
        self.documents = list(islice(join_texts(texts, tokenizer, window), limit))
        if not self.documents:
            raise ValueError(
                "`perplexity_documents` must hold texts, got none with a token to predict. Set it to a file or a data "
                "set with longer ones."
            )
        if len(self.documents) == limit:
            logger.info("Perplexity is read of the first %d documents. Set `limit` for more.", limit)

    def work(self, examinees: Sequence[Examinee], store: ResultStore) -> None:
        """Have each model read the documents that no other process is at."""
        how: dict[str, Any] = {"window": self.window, "stride": max(1, self.window // 2), "bos_token_id": self.bos}
        for examinee in examinees:
            documents = {self._key(examinee, ids): ids for ids in self.documents}
            title = f"{examinee.label}, perplexity"
            for keys in store.open_keys([[key] for key in documents]):
                with examinee.active():
                    for key in tqdm(keys, desc=title, unit="document", disable=not store.is_main):
                        loss = perplexity_by_position(self.model, [documents[key]], **how)
                        store.add(key, {"sums": loss.sums.tolist(), "counts": loss.counts.tolist()})

    def keys(self, examinees: Sequence[Examinee]) -> list[str]:
        """Return the keys of all results."""
        return [self._key(examinee, ids) for examinee in examinees for ids in self.documents]

    def asked(self) -> list[str]:
        """Return what tells the documents and how they are read."""
        return [self._unit(ids) for ids in self.documents]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> PerplexityResult:
        """Return the perplexity per bin by label."""
        curves = {}
        for examinee in examinees:
            found = [store.get(key) for key in self.keys([examinee])]
            sums, counts = (np.sum([one[name] for one in found], axis=0) for name in ("sums", "counts"))
            values = PositionLoss(sums, counts).perplexity
            curves[examinee.label] = [None if np.isnan(value) else float(value) for value in values]
        return PerplexityResult(list(self.edges), self.window, len(self.documents), curves)

    def _key(self, examinee: Examinee, ids: np.ndarray) -> str:
        return examinee.key(self._unit(ids))

    def _unit(self, ids: np.ndarray) -> str:
        return f"perplexity/{self.window}/{self.bos}/{hashlib.sha256(ids.tobytes()).hexdigest()}"


def join_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, window: int) -> Iterator[np.ndarray]:
    """Yield documents, int64 `(tokens,)` each: texts joined by blank lines until they are as long as a window.

    The last one may be shorter; it then tells of the positions that it reaches.
    """
    ids: list[int] = []
    for text in texts:
        # Without `verbose`, tokenizers warn of texts beyond a range in which they are not going to be read.
        ids += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= window:
            yield np.array(ids, dtype=np.int64)
            ids = []
    if len(ids) > 1:
        yield np.array(ids, dtype=np.int64)
