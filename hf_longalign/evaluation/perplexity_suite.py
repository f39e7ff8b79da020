"""Perplexity by position as a suite of an evaluation: each document once per model, shared among processes."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_longalign.evaluation.generation import check_range
from hf_longalign.evaluation.perplexity import PositionLoss, document_loss, position_edges
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.records.report import PerplexityResult


logger = logging.getLogger(__name__)

# Enough for a steady curve: 20 documents of 32k tokens are 640k predictions.
DOCUMENTS = 20


class PerplexitySuite:
    """Documents, read in windows that overlap by half.

    Args:
        model: what all examinees share.
        tokenizer: the model's.
        texts: of any lengths; short ones are joined, see [`join_texts`].
        window: tokens of a window.
        limit: documents to read, the first ones; `None`: all, which ends for finite texts alone.

    Raises:
        ValueError: no text, or a window beyond the model's range.
    """

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
            logger.info("Perplexity is read of the first %d documents. Set `perplexity_limit` for more.", limit)

    def work(self, examinees: Sequence[Examinee], store: ResultStore, *, rank: int, processes: int) -> None:
        """Have each model read this process's share of the documents."""
        for examinee in examinees:
            mine = self.documents[rank::processes]
            with examinee.active():
                for ids in tqdm(mine, desc=f"{examinee.label}, perplexity", unit="document", disable=rank != 0):
                    if self._key(examinee, ids) not in store:
                        loss = document_loss(
                            self.model, ids, window=self.window, stride=max(1, self.window // 2), bos_token_id=self.bos
                        )
                        value = {"sums": loss.sums.tolist(), "counts": loss.counts.tolist()}
                        store.add(self._key(examinee, ids), value)

    def asked(self) -> list[str]:
        """Return what tells the documents and how they are read."""
        return [self._unit(ids) for ids in self.documents]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> PerplexityResult:
        """Return the perplexity per bin by label."""
        curves = {}
        for examinee in examinees:
            keys = [self._key(examinee, ids) for ids in self.documents]
            store.wait_for(keys)
            losses = [self._loss(store.get(key)) for key in keys]
            values = sum(losses[1:], start=losses[0]).perplexity
            curves[examinee.label] = [None if np.isnan(value) else float(value) for value in values]
        return PerplexityResult(list(self.edges), self.window, len(self.documents), curves)

    def _loss(self, value: dict[str, list]) -> PositionLoss:
        return PositionLoss(np.array(self.edges), np.array(value["sums"]), np.array(value["counts"]))

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
