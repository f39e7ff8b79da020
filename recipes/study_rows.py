"""The rows that a study trains on: composed of its pairs, or written for them by a language model."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from study_data import ASK, SHORTEST_TEXT, Pair, questions

from hf_longalign import ContextSynthesisBuilder


def compose_rows(pairs: Sequence[Pair], folder: Path, *, tokenizer: str, tokens: int) -> None:
    """Compose pairs to rows of at most so many tokens, gold among distractors, `parts` recorded; no LLM is asked.

    The data set, with its card, goes into `folder / "dataset"`, from which it can be pushed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / "distractors.jsonl"
    lines = dict.fromkeys(passage for pair in pairs for passage in pair.others)
    documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    builder = ContextSynthesisBuilder(
        cache_dir=folder / "cache",
        seeds=[
            {"task": pair.task, "instruction": pair.question, "answer": pair.answer, "context": "\n\n".join(pair.gold)}
            for pair in pairs
        ],
        documents=[str(documents)],
        distractor_sources=["documents", "same_task"],
        target_tokens=tokens,
        tokenizer=tokenizer,
        checks=["support"],
        show_progress=False,
    )
    builder.export(folder / "dataset")


def composed_rows(folder: Path, *, parts: bool = True) -> Dataset:
    """Return what [`compose_rows`] or [`compose_pilot`] has composed."""
    files = str(folder / "dataset" / "chat" / "train-*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return rows.select_columns(["messages", "parts"] if parts else ["messages"])


def compose_pilot(
    pairs: Sequence[Pair],
    folder: Path,
    count: Callable[[str], int],
    *,
    kind: str,
    tokens: int,
    general: str | None = None,
) -> None:
    """Make the rows of an arm of the pilot study: general chats, and as many rows that ask for a needle.

    Args:
        pairs: to train on.
        folder: of the rows.
        count: tokens a model is given for a text.
        kind: `general` (no needles), `needles_bare` (the question alone), `needles_short` or `needles_long`.
        tokens: of a text around needles.
        general: Hub id of chats with a column `messages`; unset, pairs with their gold passages serve.
    """
    chats = general_chats(pairs, general)
    for text in range(0 if kind == "general" else len(pairs)):
        length = min(tokens, SHORTEST_TEXT) if kind == "needles_bare" else tokens
        # Drawn by another seed than what is asked.
        drawn = questions(pairs, count, length=length, text=text, seed=3, needles=4, keys_at_once=2, most_golds=1)
        needles = [prompt for prompt in drawn if prompt.task == "multi_key"]
        one = needles[text % len(needles)]
        question = one.text.rpartition("\n\n")[2] if kind == "needles_bare" else one.text
        chats.append(_chat(question, f"{one.prefix} {one.answers[0]}."))
    write_chats(chats, folder)


def compose_written(
    pairs: Sequence[Pair], folder: Path, generator: Any, *, kind: str, contexts: int, words: int, general: str | None
) -> None:
    """Make the rows of an arm that has them written: general chats, and a row for each pair or its passages.

    Args:
        pairs: to train on.
        folder: of the rows; replies are kept beside it, so that another number of contexts asks for nothing.
        generator: as of `ContextSynthesisBuilder`.
        kind: `contexts` (for the pair) or `instructions` (a pair for its gold passages, the paper's baseline).
        contexts: in a row, the gold one among them.
        words: of a written context.
        general: see `compose_pilot`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "contexts":
        seeds = [{"task": pair.task, "instruction": pair.question, "answer": pair.answer} for pair in pairs]
        given: dict[str, Any] = {"seeds": seeds, "context_words": words, "min_words": words // 2}
    else:
        documents = folder / "documents.jsonl"
        lines = dict.fromkeys("\n\n".join(pair.gold) for pair in pairs)
        documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
        given = {"method": "instruction", "documents": [str(documents)], "min_words": 1}
    builder = ContextSynthesisBuilder(
        generator=generator,
        cache_dir=folder.parent / "cache",
        journal=folder.parent / f"{kind}.sqlite",
        n_distractors=contexts - 1,
        distractor_sources=["same_task", "other_tasks"],
        **given,
    )
    builder.download_and_prepare()
    write_chats([*general_chats(pairs, general), *builder.as_dataset(split="train")["messages"]], folder)


def general_chats(pairs: Sequence[Pair], general: str | None) -> list[list[dict[str, str]]]:
    """Return as many chats of a data set as there are pairs, or these with their gold passages."""
    if general is not None:
        return list(load_dataset(general, split=f"train[:{len(pairs)}]")["messages"])
    return [_chat("\n\n".join(pair.gold) + ASK.format(question=pair.question), pair.answer) for pair in pairs]


def write_chats(chats: Iterable[list[dict[str, str]]], folder: Path) -> None:
    """Put chats where `composed_rows` finds them."""
    place = folder / "dataset" / "chat"
    place.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": messages} for messages in chats]
    Dataset.from_list(rows).to_parquet(place / "train-00000.parquet")


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
