"""Which seeds and contexts go into the data: by difficulty, without near-duplicates, without evaluation data."""

import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np

from hf_longalign.lazy import require
from hf_longalign.rows import read_rows
from hf_longalign.synthesis.prompts import answer_prompt
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.synthesis.tokens import batches_by_length, load_model
from hf_longalign.text import UNSPACED, digest, normalise


USES = ("record", "select", "stratify", "weight")
_STRATA = 4


def answer_losses(seeds: Sequence[Seed], model_name: str) -> list[float]:
    """Return the mean loss per answer token, in nats, of each answer given its instruction alone."""
    tokenizer, model = load_model("AutoModelForCausalLM", model_name)
    rows = []
    for seed in seeds:
        content: Any = answer_prompt(seed, find_task(seed.task))[0][1]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": content}]
            content = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # A template has written the special tokens already.
        prompt = tokenizer(content, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        rows.append((prompt, tokenizer(seed.answer, add_special_tokens=False)["input_ids"]))
    losses = np.zeros(len(rows))
    for numbers in batches_by_length([len(prompt) + len(answer) for prompt, answer in rows], 8):
        losses[numbers] = _batch_losses(model, [rows[number] for number in numbers])
    return losses.tolist()


def _batch_losses(model: Any, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, (prompt, answer) in enumerate(rows):
        whole = torch.tensor(prompt + answer)
        ids[number, : len(whole)], mask[number, : len(whole)] = whole, 1
        # The answer alone: a long instruction would otherwise drown what is measured.
        labels[number, len(prompt) : len(whole)] = whole[len(prompt) :]
    with torch.inference_mode():
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
    wanted = labels[:, 1:].to(model.device)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none")
    return (losses.sum(1) / (wanted != -100).sum(1).clamp(min=1)).cpu().numpy()


def choose_seeds(seeds: Sequence[Seed], hardness: Sequence[float], use: str, share: float, seed: int = 0) -> list[int]:
    """Return the indices of the seeds to keep, in order, the same `share` of every task.

    Args:
        hardness: how hard each seed is; higher is harder.
        use: "record" keeps all; "select" keeps the hardest; "stratify" keeps the same number from each quarter of the
            hardness; "weight" draws, the hardest three times as likely as the easiest.
        seed: seed of the draw.
    """
    if use == "record":
        return list(range(len(seeds)))
    tasks = defaultdict(list)
    for number, pair in enumerate(seeds):
        tasks[pair.task].append(number)
    kept: list[int] = []
    for members in tasks.values():
        ranked = sorted(members, key=lambda number: (-hardness[number], number))
        count = round(share * len(ranked))
        # Uniform in (0, 1), by the pair's id alone: another pair in the data changes no draw of this one.
        ids = [seeds[number].seed_id for number in ranked]
        draws = [(int(digest("difficulty", str(seed), seed_id), 16) + 1) / (2**64 + 1) for seed_id in ids]
        if use == "select":
            kept += ranked[:count]
        elif use == "weight":
            # Weighted sampling without replacement by sorting u^(1/w) (Efraimidis and Spirakis, 2006).
            weights = np.linspace(3, 1, len(ranked))
            keys = [draw ** (1 / weight) for draw, weight in zip(draws, weights, strict=True)]
            kept += [ranked[place] for place in np.argsort(-np.array(keys), kind="stable")[:count]]
        else:
            drawn = list(zip(draws, ranked, strict=True))
            borders = [part * len(ranked) // _STRATA for part in range(_STRATA + 1)]
            # Differences of rounded sums, which add up to `count` exactly.
            quotas = [(part + 1) * count // _STRATA - part * count // _STRATA for part in range(_STRATA)]
            for (start, end), quota in zip(pairwise(borders), quotas, strict=True):
                kept += [number for _, number in sorted(drawn[start:end])[:quota]]
    return sorted(kept)


# The share of common 5-grams (estimated Jaccard similarity) from which two texts count as the same.
_SAME = 0.8
_SHINGLE = 5
_PERMUTATIONS = 128
# Texts that share one of 21 bands of so many rows are compared, which misses (1 - 0.8^6)^21 = 0.2 % of the pairs at
# the threshold. (The bands that datasketch's own index would choose miss 60 %: it weighs a look in vain as heavily.)
_ROWS = 6
_BANDS = _PERMUTATIONS // _ROWS
# A process takes a second to start, in which 2,000 texts are sketched.
_PARALLEL_FROM = 8000
_CHUNK = 1000
_UNSPACED = re.compile(f"[{UNSPACED}]")


class Duplicates:
    """Finds near-duplicates by MinHash over word 5-grams (datasketch), and remembers the sketches of texts."""

    def __init__(self) -> None:
        self._known: dict[str, np.ndarray] = {}

    def find(self, texts: Sequence[str]) -> dict[int, int]:
        """Return, for each text that nearly repeats an earlier one, its index and the index of that earlier one.

        A text is compared with those before it that repeat none themselves.
        """
        sketches = self._sketched(texts)
        wide = sketches[:, : _BANDS * _ROWS].reshape(len(sketches), _BANDS, _ROWS)
        # Fixed factors, odd so that no bit of a row is lost in the product modulo 2^64.
        factors = np.random.default_rng(0).integers(1, 2**63, _ROWS, dtype=np.uint64) | np.uint64(1)
        bands = [(wide[:, band] * factors).sum(1, dtype=np.uint64) for band in range(_BANDS)]
        # Only hashes that two texts share can name a pair: the tables of all others would fill the memory.
        shared = []
        for band in bands:
            _, inverse, counts = np.unique(band, return_inverse=True, return_counts=True)
            shared.append(np.flatnonzero(counts[inverse] > 1))
        candidates = np.unique(np.concatenate([np.empty(0, np.int64), *shared]))
        tables: list[dict[int, list[int]]] = [{} for _ in bands]
        found: dict[int, int] = {}
        for number in candidates.tolist():
            hashes = [int(band[number]) for band in bands]
            near = {other for table, key in zip(tables, hashes, strict=True) for other in table.get(key, ())}
            same = (other for other in sorted(near) if np.mean(sketches[other] == sketches[number]) >= _SAME)
            earlier = next(same, None)
            if earlier is not None:
                found[number] = earlier
                continue
            for table, key in zip(tables, hashes, strict=True):
                table.setdefault(key, []).append(number)
        return found

    def _sketched(self, texts: Sequence[str]) -> np.ndarray:
        """The sketches of all texts, uint32 `(texts, permutations)`; those of texts seen before are not made again."""
        keys = [digest(text) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        chunks = [list(new.values())[start : start + _CHUNK] for start in range(0, len(new), _CHUNK)]
        if len(new) >= _PARALLEL_FROM:
            # Forked where that is safe, as `datasets` does: a spawned process would run the user's script once more,
            # which fails where the script has no guard against that.
            method = "fork" if sys.platform == "linux" else "spawn"
            with ProcessPoolExecutor(mp_context=get_context(method)) as pool:
                made = list(pool.map(sketch, chunks))
        else:
            made = list(map(sketch, chunks))
        self._known |= dict(zip(new, (row for rows in made for row in rows), strict=True))
        return np.stack([self._known[key] for key in keys]) if keys else np.empty((0, _PERMUTATIONS), np.uint32)


def sketch(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHash sketches of texts over every 5 words in a row, uint32 `(texts, 128)`."""
    rows = np.empty((len(texts), _PERMUTATIONS), np.uint32)
    made = require("datasketch", "synthesis").MinHash(num_perm=_PERMUTATIONS, hashfunc=int, scheme="affine32")
    for number, text in enumerate(texts):
        made.clear()  # and not another one, whose permutations would take longer to draw than the text to sketch
        words = np.array([zlib.crc32(word.encode()) for word in normalise(text).split()] or [0], np.uint64)
        words = np.pad(words, (0, max(0, _SHINGLE - len(words))))  # fewer words than that are one shingle
        mixed = np.zeros(len(words) - _SHINGLE + 1, np.uint64)
        for place in range(_SHINGLE):
            # A polynomial in an odd number, whose high bits depend on every word.
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[place : place + len(mixed)]
        made.update_batch(np.unique(mixed >> np.uint64(32)))
        rows[number] = made.hashvalues
    return rows


class Contamination:
    """The n-grams of evaluation data.

    Args:
        sources: evaluation files or Hub data sets, read as `read_rows` does; every string of every row counts, also
            inside lists and dicts.
        ngram: words in a row that make an overlap; 13 by default, as in GPT-3 (https://arxiv.org/abs/2005.14165). A
            string with fewer words, but at least 6, counts as a whole: most questions are shorter.

    >>> known = Contamination([[{"input": "Who finished the dam below Thornwick in 1912?"}]])
    >>> known.overlap("who finished the dam, below Thornwick, in 1912")
    ('who finished dam below thornwick in 1912', 'seeds:1')
    >>> known.overlap("Who finished the dam?") is None
    True
    """

    def __init__(self, sources: Iterable[Any], ngram: int = 13):
        # Every n-gram opens with this many words: where no opening stands in a text, nothing else is looked up. What
        # has fewer overlaps with nothing: "yes" and "in 1912" contaminate nobody.
        self._opening = min(ngram, 6)
        self._openings: set[str] = set()
        self._lengths: set[int] = set()
        self._grams: dict[str, str] = {}
        for source in sources:
            for row in read_rows(source, "decontaminate_against"):
                for text in _strings(row.values):
                    words = normalise(text).split()
                    # Where no blanks divide words, `normalise` makes a word of every character: two of them are one.
                    scale = 2 if 2 * len(_UNSPACED.findall(text)) > len(words) else 1
                    length = min(scale * ngram, len(words))
                    if length < self._opening * scale:
                        continue
                    self._lengths.add(length)
                    for start in range(len(words) - length + 1):
                        self._openings.add(" ".join(words[start : start + self._opening]))
                        self._grams.setdefault(" ".join(words[start : start + length]), row.origin)

    def __len__(self) -> int:
        return len(self._grams)

    def overlap(self, text: str) -> tuple[str, str] | None:
        """Return the first shared n-gram and where it stands in the evaluation data, or `None`."""
        words = normalise(text).split()
        for start in range(len(words) - self._opening + 1):
            if " ".join(words[start : start + self._opening]) not in self._openings:
                continue
            for length in sorted(self._lengths):
                gram = " ".join(words[start : start + length])
                place = self._grams.get(gram)
                if place is not None:
                    return gram, place
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
