"""Perplexity by position as a suite of an evaluation: each document once per model, shared among processes."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_longalign.evaluation.generation import check_range
from hf_longalign.evaluation.perplexity import PositionLoss, document_loss, position_edges
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.records.report import PerplexityResult


# Enough for a steady curve: 20 documents of 32k tokens are 640k predictions.
MAX_DOCUMENTS = 20


class PerplexitySuite:
    """Long documents, read in windows that overlap by half.

    Args:
        model: what all examinees share.
        tokenizer: the model's.
        texts: joined until they are as long as a window; what is left over is not used, nor are more than 20 such
            documents.
        window: tokens of a window.

    Raises:
        ValueError: the texts together are shorter than the window, or it is beyond the model's range.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, window: int) -> None:
        check_range(model.config, window, "perplexity_window")  # before other suites take their hours
        self.model, self.window, self.edges = model, window, position_edges(window)
        # Llama, Gemma and others were trained with this token before every text, and read badly without it.
        first = tokenizer("a")["input_ids"][0]
        self.bos = tokenizer.bos_token_id if first == tokenizer.bos_token_id else None
        self.documents = join_texts(texts, tokenizer, window)

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


def join_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, window: int) -> list[np.ndarray]:
    """Return the token ids of at most 20 documents of at least `window` tokens, int64 `(tokens,)` each.

    Raises:
        ValueError: the texts together are shorter.
    """
    documents: list[np.ndarray] = []
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= window:
            documents.append(np.array(ids, dtype=np.int64))
            ids = []
        if len(documents) == MAX_DOCUMENTS:
            break
    if not documents:
        raise ValueError(
            f"`perplexity_documents` must hold at least a window of {window:,} tokens, got {len(ids):,} in all. Add "
            "texts, or set a smaller `perplexity_window`."
        )
    return documents
