"""What a study asks and trains on: pairs with their gold passages, texts with many questions about each, and rows.

One long text serves all questions about it, so that it is read once:

    Read the passages. Special magic numbers are hidden in them; memorize them.
    passage ... needle ... gold passage ... needle ... passage          <- fits a length in tokens
    one of: the number of one key | the numbers of four keys | a question that one of the gold passages answers

The rows of training are composed of pairs, or written for them by a language model.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from hf_longalign import ContextSynthesisBuilder
from hf_longalign.evaluation.needles import ONE, SEVERAL, NeedleTask, Pools, Wording, draw_needles
from hf_longalign.evaluation.prompt import Prompt


HUB_DATA = "hotpotqa/hotpot_qa:distractor"
TASKS = ("hotpotqa", "2wikiqa", "musique")
HEAD = (
    "Read the following passages. Special magic numbers are hidden within them: memorize them, I will quiz you about "
    "them afterwards.\n\n"
)
ASK = (  # what LongBench's prompt, which the rows of training have, says behind the passages
    "\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words."
    "\n\nQuestion: {question}\nAnswer:"
)
# The shorter texts hold fewer needles: one per so many tokens.
NEEDLE_EVERY = 128
# Of a text that serves only to draw a question.
SHORTEST_TEXT = 768
ROOM = {"multi_key": 12, "passages": 24}  # of a question for several needles, that of one for each
# How likely the next passage is a gold one, while there are any.
GOLD_SHARE = 0.5


@dataclass(frozen=True)
class Pair:
    """A question with a short answer, the passages that it needs, and others that came with it."""

    task: str
    question: str
    answer: str
    gold: tuple[str, ...]
    others: tuple[str, ...]


def read_pairs(source: str, *, most: int | None = None) -> list[Pair]:
    """Read pairs whose gold passages hold the answer.

    Args:
        source: a folder with `seed_instruction/<task>.jsonl` and, line by line, `seed_context/<task>.jsonl`; or a data
            set with HotpotQA's columns, as a folder or `user/name[:config]`.
        most: read at most so many rows of a data set.

    Raises:
        ValueError: there is no usable pair.
    """
    if (Path(source) / "seed_instruction").is_dir():
        pairs = [pair for task in TASKS for pair in _read_lines(Path(source), task)]
    else:
        name, _, config = source.partition(":")
        rows = load_dataset(name, config or None, split="train")
        pairs = [pair_of(row) for row in (rows.select(range(min(most, len(rows)))) if most else rows)]
    usable = [pair for pair in pairs if pair.answer.lower() in "\n".join(pair.gold).lower() and len(pair.answer) > 2]
    if not usable:
        raise ValueError(f"`seeds` must hold pairs whose passages hold the answer, got none in {source!r}.")
    return list({pair.question: pair for pair in usable}.values())


def pair_of(row: dict[str, Any]) -> Pair:
    """Return a row of HotpotQA ("distractor") as a pair: the paragraphs of its supporting facts are gold.

    Example:

    >>> context = {"title": ["Ada", "Dam"], "sentences": [["Ada wrote.", " She was born in 1815."], ["A dam."]]}
    >>> pair_of({"question": "When?", "answer": "1815", "context": context, "supporting_facts": {"title": ["Ada"]}})
    Pair(task='hotpotqa', question='When?', answer='1815', gold=('Ada\\nAda wrote. She was born in 1815.',), \
others=('Dam\\nA dam.',))
    """
    gold, others = [], []
    for title, sentences in zip(row["context"]["title"], row["context"]["sentences"], strict=True):
        text = f"{title}\n{''.join(sentences).strip()}"
        (gold if title in row["supporting_facts"]["title"] else others).append(text)
    return Pair("hotpotqa", row["question"], row["answer"], tuple(gold), tuple(others))


def _read_lines(folder: Path, task: str) -> Iterator[Pair]:
    """Pairs of a folder that does not say which passages are gold: those with the answer, or named in the question."""
    asked, contexts = (
        [json.loads(line) for line in (folder / kind / f"{task}.jsonl").open(encoding="utf-8")]
        for kind in ("seed_instruction", "seed_context")
    )
    for row, context in zip(asked, contexts, strict=True):
        question, answer = row["instruction"], row["answer"]
        gold, others = [], []
        for passage in (part.strip() for part in context["context"].split("\n\n") if part.strip()):
            named = passage.partition("\n")[0].lower() in question.lower()
            (gold if named or answer.lower() in passage.lower() else others).append(passage)
        yield Pair(task, question, answer, tuple(gold), tuple(others))


def split_pairs(
    pairs: Sequence[Pair], count: Callable[[str], int], *, rows: int, gold_tokens: int
) -> dict[str, list[Pair]]:
    """Deal pairs out to `train`, `development` (a quarter of the rest) and `report`; none share a gold passage.

    Args:
        pairs: of all tasks.
        count: tokens of a text.
        rows: pairs to train on.
        gold_tokens: the most that the gold passages of a pair to train on may take; of one that is asked, twice that.

    Raises:
        ValueError: nothing is left to ask.
    """
    order = [pairs[index] for index in np.random.default_rng(0).permutation(len(pairs))]
    sizes = {pair: count("\n\n".join(pair.gold)) for pair in order}
    train = [pair for pair in order if sizes[pair] <= gold_tokens][:rows]
    seen = {passage for pair in train for passage in pair.gold}
    rest = []
    for pair in order:
        if sizes[pair] <= 2 * gold_tokens and not seen & set(pair.gold):
            seen.update(pair.gold)
            rest.append(pair)
    if len(rest) < 4:
        raise ValueError(f"`rows` must leave pairs to ask about, got {rows} of {len(pairs)}. Set less.")
    return {"train": train, "development": rest[: len(rest) // 4], "report": rest[len(rest) // 4 :]}


def questions(
    pairs: Sequence[Pair],
    count: Callable[[str], int],
    *,
    length: int,
    text: int,
    seed: int,
    needles: int = 16,
    keys_at_once: int = 4,
    most_golds: int = 24,
) -> list[Prompt]:
    """Return all questions about one text; the same for the same arguments on every machine.

    Args:
        pairs: whose gold passages and others make the text, and whose questions are asked.
        count: tokens a model is given for a text, chat template included.
        length: of the longest prompt with its answer, in tokens.
        text: number of the text.
        seed: of everything that is drawn.
        needles: in the text; a multiple of `keys_at_once`.
        keys_at_once: keys of a multi_query question.
        most_golds: the most gold passages, and so questions about passages.

    Returns:
        Prompts of the tasks multi_key (exact match), multi_query (share of values) and passages (F1). `parts` names
        what their scores go together with: needles that are asked for together, or the pair.
    """
    rng = np.random.default_rng([seed, length, text])
    number = min(needles, length // NEEDLE_EVERY) // keys_at_once * keys_at_once
    hidden = _needles(max(keys_at_once, number), rng)
    # Texts of one length begin with other pairs, so that each asks its own as long as there are any.
    order = [
        pairs[index] for index in np.roll(np.random.default_rng(seed).permutation(len(pairs)), -text * most_golds)
    ]
    others = list(dict.fromkeys(passage for pair in order for passage in pair.others))
    others = [others[index] for index in rng.permutation(len(others))]
    keys = SEVERAL.join(sorted((key for key, _ in hidden), key=len)[-keys_at_once:])
    tails = [ASK.format(question=max((pair.question for pair in pairs), key=len))]
    tails.append(SEVERAL.question.format(keys=keys) + SEVERAL.answer.format(keys=keys))
    budget = length - max(*ROOM.values(), keys_at_once * ROOM["multi_key"]) - max(count(HEAD + tail) for tail in tails)
    budget -= sum(count(f" {_sentence(*needle)}") - count("") for needle in hidden)
    golds: list[Pair] = []
    passages: list[tuple[str, Pair | None]] = []
    waiting, fillers = iter(order), iter(others)
    while True:
        pair = next(waiting, None) if len(golds) < most_golds and (not golds or rng.random() < GOLD_SHARE) else None
        added = [(passage, pair) for passage in pair.gold] if pair else [(next(fillers, ""), None)]
        tokens = sum(count(f"\n\n{passage}") - count("") for passage, _ in added)
        if pair and not golds and tokens > budget:
            continue  # a shorter one may fit
        budget -= tokens
        if budget < 0 or not added[0][0]:
            break
        passages += added
        golds += [pair] if pair else []
    if not golds:
        raise ValueError(f"`cells` must have room for needles and the passages of a pair, got {length}. Set more.")
    passages = [passages[index] for index in rng.permutation(len(passages))]
    while True:
        asked = _ask(passages, golds, hidden, keys_at_once, length, text)
        longest = max(asked, key=lambda prompt: len(prompt.text) + len(prompt.prefix) + 4 * prompt.max_new_tokens)
        if count(longest.text + longest.prefix) + longest.max_new_tokens <= length:
            return asked
        # Tokens of pieces do not quite add up to those of the whole: a passage that nobody asks for goes.
        passages.pop(next(index for index, (_, pair) in enumerate(passages) if pair is None))


def _needles(number: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Keys and values, drawn as the needle tasks draw them."""
    plain = Wording(header="", needle="{key}\t{value}", question="{keys}", answer="{keys}")
    drawn = draw_needles(NeedleTask("keys", queries=number), plain, Pools(), rng)
    return [(key, value) for key, value in (line.split("\t") for line in drawn.asked)]


def _sentence(key: str, value: str) -> str:
    return ONE.needle.format(key=key, value=value)


def _ask(
    passages: Sequence[tuple[str, Pair | None]],
    golds: Sequence[Pair],
    needles: Sequence[tuple[str, str]],
    keys_at_once: int,
    length: int,
    text: int,
) -> list[Prompt]:
    """Hide the needles at the ends of passages, evenly spread by characters, and put the questions behind."""
    ends = np.cumsum([len(passage) for passage, _ in passages])
    depths = (np.arange(len(needles)) + 0.5) / len(needles)
    places = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth in depths]
    pieces = [
        passage + "".join(f" {_sentence(*needle)}" for needle, at in zip(needles, places, strict=True) if at == number)
        for number, (passage, _) in enumerate(passages)
    ]
    body = HEAD + "\n\n".join(pieces)
    stride = len(needles) // keys_at_once
    groups = [range(first, len(needles), stride) for first in range(stride)]

    def prompt(task: str, index: int, question: str, answers: Sequence[str], sample: str, **more: Any) -> Prompt:
        room = ROOM.get(task, keys_at_once * ROOM["multi_key"])
        return Prompt(
            "study", task, index, body + question, tuple(answers), room, length=length, parts=(sample,), **more
        )

    asked = []
    for number, group in enumerate(groups):
        sample = f"{length}/{text}/{number}"
        keys = SEVERAL.join([needles[index][0] for index in group])
        values = [needles[index][1] for index in group]
        begin = SEVERAL.answer.format(keys=keys)
        query = f"\n\n{SEVERAL.question.format(keys=keys)}"
        asked.append(prompt("multi_query", number, query, values, sample, prefix=begin))
        for index in group:
            key, value = needles[index]
            begin = ONE.answer.format(keys=key)
            query, depth = f"\n\n{ONE.question.format(keys=key)}", float(depths[index])
            asked.append(prompt("multi_key", index, query, [value], sample, prefix=begin, depth=depth))
    for number, pair in enumerate(golds):
        asked.append(prompt("passages", number, ASK.format(question=pair.question), [pair.answer], pair.question))
    return asked


def documents(pairs: Sequence[Pair]) -> list[str]:
    """Return the passages of pairs, gold or not, each once."""
    return list(dict.fromkeys(passage for pair in pairs for passage in (*pair.gold, *pair.others)))


def read_documents(folder: str) -> list[str]:
    """Return the text files of a folder."""
    return [re.sub(r"\s+", " ", path.read_text("utf-8")) for path in sorted(Path(folder).glob("*.txt"))]


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
