"""What is read: seeds (instruction-answer pairs) and documents (texts alone), each row checked as it is read."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from typing import Any

import numpy as np

from hf_longalign.rows import BadRowError, Row, read_rows, read_texts
from hf_longalign.synthesis.tasks import find_task
from hf_longalign.synthesis.tokens import ControlTokens
from hf_longalign.text import digest


# At most so many beginnings of seeds tell the language of all.
_SAMPLE = 200
_TASK_PREFIX = re.compile(r"^(?P<task>\w+)=(?P<source>.+)$")


@dataclass(frozen=True)
class Seed:
    """One instruction-answer pair.

    Attributes:
        seed_id: the row's own id, or a digest of its content.
        task: LongBench's name of the task, or "general".
        answer: the target: given, never written by the package.
        context: the text the pair was written for, where it is given, and its `title`.
        origin: file name and line, for messages and for the `rejected` rows; never a path.
        neutralised: how many marks of chat templates were made plain words of, in all its texts.
    """

    seed_id: str
    task: str
    instruction: str
    answer: str
    context: str | None = None
    title: str | None = None
    origin: str = ""
    neutralised: int = 0


@dataclass
class SeedSet:
    """What reading gave; of a shard, its own seeds alone are kept, so that a million cost it little memory.

    Attributes:
        part: index and number of the parts. Seeds are dealt out in turns: those of one task stand together, and each
            machine should get some of every task. What follows the seeds is of all parts.
        skipped: how many rows were skipped, by reason.
        neutralised: in how many seeds marks of chat templates were made plain words of.
        total: how many seeds there are.
        sample: beginnings of some seeds, evenly spread over all.
    """

    part: tuple[int, int] = (0, 1)
    seeds: list[Seed] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    neutralised: int = 0
    total: int = 0
    sample: list[str] = field(default_factory=list)
    _stride: int = 1

    def add(self, seed: Seed) -> None:
        """Count a seed, and keep it if it belongs to the part."""
        index, count = self.part
        if self.total % count == index:
            self.seeds.append(seed)
        if self.total % self._stride == 0:
            self.sample.append(f"{seed.instruction} {seed.answer} {(seed.context or '')[:200]}")
            # How many there will be is not known: one of two goes, and from here on half as many are taken.
            if len(self.sample) == _SAMPLE:
                self.sample, self._stride = self.sample[::2], 2 * self._stride
        self.neutralised += seed.neutralised > 0
        self.total += 1


def read_seeds(
    sources: Any,
    *,
    contexts: Sequence[str] = (),
    on_bad_seed: str = "raise",
    per_task: int | None = None,
    control: ControlTokens | None = None,
    on_control_tokens: str = "neutralise",
    part: tuple[int, int] = (0, 1),
) -> SeedSet:
    """Read and check seeds, each row once, and keep those of a part; the options are those of `SynthesisOptions`.

    A row that stands there twice, word for word and without an id, is dropped and counted: published seeds have some.

    Args:
        sources: one or several names that `read_rows` takes, each with an optional `task=` in front, or rows in
            memory.
        control: the marks of chat templates to look for; `None` to leave them in.
        part: index and number of the parts. All rows are read for any of them.

    Raises:
        BadRowError: a bad row, named by file, line and column.
        ValueError: an unknown task, no good row at all, or fewer contexts than seeds.

    >>> read_seeds([{"instruction": "Who?", "answer": "Ada"}]).seeds[0].task
    'general'
    """
    given = {task: _read_contexts(task, source) for task, source in map(_split_source, contexts)}
    # A list of dicts is one source, a list of names are several.
    many = isinstance(sources, (list, tuple)) and all(isinstance(source, str) for source in sources)
    named = list(map(_split_source, sources if many else [sources]))
    tasks = Counter(task for task, _ in named)
    for task in given:
        if tasks[task] > 1:  # line k of one file of contexts cannot belong to two files of seeds
            raise ValueError(f"`contexts` of {task} must belong to one file of seeds, got {tasks[task]}. Join them.")
    found = SeedSet(part)
    first_seen: dict[str, tuple[str, int, str]] = {}
    kept: Counter[str] = Counter()
    for task, row in ((task, row) for task, source in named for row in read_rows(source)):
        try:
            seed = _to_seed(row, task, given)
            if control is not None:
                seed, mark, column = _without_marks(seed, ("instruction", "answer", "context", "title"), control)
                if mark and on_control_tokens == "reject":
                    remedy = f"Take {mark!r} out, or set `on_control_tokens` to 'neutralise'."
                    raise BadRowError(row, "a mark of a chat template", remedy, column)
            # By the row it was read from, not by the file: the same pair may stand in two. Its place alone is kept.
            place = (row.file, row.number, row.unit)
            first = first_seen.setdefault(seed.seed_id, place)
            if first is not place and row.values.get("id") is not None:
                remedy = f"{seed.seed_id!r} stands at {first[2]} {first[1]} of {first[0]} already. Rename one."
                raise BadRowError(row, "duplicate id", remedy, "id")
        except BadRowError as error:
            if on_bad_seed == "raise":
                raise
            found.skipped[error.reason] += 1
            continue
        if first is not place:
            found.skipped["the same row twice"] += 1
        # Counted after bad and repeated rows are gone: the first so many good ones.
        elif per_task is None or kept[seed.task] < per_task:
            kept[seed.task] += 1
            found.add(seed)
    if not found.total:
        raise ValueError(f"`seeds` must hold at least one good row, got none and {found.skipped.total()} bad ones.")
    return found


def _split_source(source: Any) -> tuple[str | None, Any]:
    """`"hotpotqa=seeds.jsonl"` -> `("hotpotqa", "seeds.jsonl")`; a source without a task has None in its place."""
    match = _TASK_PREFIX.match(source) if isinstance(source, str) else None
    return (find_task(match["task"]).name, match["source"]) if match else (None, source)


def _read_contexts(task: str | None, source: str) -> dict[int, str]:
    """Line number -> context. A bad line is an error under "skip" too: its seed is good and would lose it."""
    if task is None:
        raise ValueError(f"`contexts` must be written task=path, got {source!r}.")
    # By number and not in a list: a blank line is skipped here as it is among the seeds.
    return {row.number: _text(row, "context", required=True) for row in read_rows(source, "contexts")}


def _to_seed(row: Row, task: str | None, given: dict[str | None, dict[int, str]]) -> Seed:
    instruction, answer = _text(row, "instruction", required=True), _text(row, "answer", required=True)
    try:
        name = task or find_task(_text(row, "task") or "general").name
    except ValueError as error:
        raise BadRowError(row, "unknown task", str(error), "task") from None
    context = _text(row, "context")
    if name in given:
        context = given[name].get(row.number)
        if context is None:
            remedy = f"Give as many contexts as seeds: `contexts` for {name} ends at {max(given[name], default=0)}."
            raise BadRowError(row, "no context on the same line", remedy)
    own_id = row.values.get("id")
    return Seed(
        # The id goes into every draw that is made for the row: by content, so that moving rows or files changes none.
        seed_id=digest(name, instruction, answer, context or "") if own_id is None else str(own_id),
        task=name,
        instruction=instruction,
        answer=answer,
        context=None if context is None else find_task(name).clean(context).strip(),
        title=_text(row, "title"),
        origin=row.origin,
    )


def _without_marks(read: Any, columns: Sequence[str], control: ControlTokens) -> tuple[Any, str, str]:
    """A seed or document with plain words for marks of chat templates, and the first mark with its column."""
    found = {column: control.find(text) for column in columns if (text := getattr(read, column))}
    marked = [column for column, marks in found.items() if marks]
    if not marked:
        return read, "", ""
    plain = {column: control.neutralise(getattr(read, column))[0] for column in marked}
    number = sum(len(found[column]) for column in marked)
    return replace(read, neutralised=number, **plain), found[marked[0]][0], marked[0]


def _text(row: Row, column: str, required: bool = False) -> Any:
    value = row.values.get(column)
    if column not in row.values and required:
        columns = ", ".join(map(str, row.values)) or "none"
        raise BadRowError(row, "missing", f"Columns here: {columns}. Rename one to `{column}`.", column)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise BadRowError(row, f"not a string but {type(value).__name__}", "Write text.", column)
    if not value.strip():
        if required:
            raise BadRowError(row, "empty", "Fill it in or delete the row.", column)
        return None
    return value.strip()


@dataclass(frozen=True)
class Document:
    """A text that distracts, or that a pair is written for; its other fields are those of a `Seed`."""

    text: str
    origin: str
    title: str | None = None
    neutralised: int = 0

    @property
    def document_id(self) -> str:
        """A digest of the text."""
        return "doc-" + digest(self.text)


def read_documents(
    sources: Sequence[str], *, control: ControlTokens | None = None, on_control_tokens: str = "neutralise"
) -> list[Document]:
    """Read documents, each text once.

    `sources` are what `read_texts` takes, with a column `title` where there is one, or patterns such as
    `essays/*.txt`. Raises a BadRowError for a row without a text, a ValueError for no such file, or one that is empty,
    not UTF-8 or refused.
    """
    paths: list[str] = []
    for source in sources:
        matched = sorted(glob(source, recursive=True)) if any(char in source for char in "*?[") else [source]
        paths += matched
        if not matched:
            raise ValueError(f"`documents` must name files, got {source!r}, which matches none.")
    kept: dict[str, Document] = {}
    for text, row in (found for path in paths for found in read_texts(path, "documents")):
        if not text.strip():
            raise BadRowError(row, "no text", "Fill it in or delete the row.")
        document = Document(text.strip(), row.origin, _text(row, "title"))
        if control is not None:
            document, mark, _ = _without_marks(document, ("title", "text"), control)
            if mark and on_control_tokens == "reject":
                raise ValueError(
                    f"{document.origin}: a document must hold no mark of a chat template, got {mark!r}. Take it out, "
                    "or set `on_control_tokens` to 'neutralise'."
                )
        # Each text once: patterns overlap, and a document that stands twice would distract from itself.
        kept[document.document_id] = document
    return list(kept.values())


def draw_chunks(documents: Sequence[Document], words: int, per_document: int, seed: int) -> list[Seed]:
    """Return random contiguous chunks of so many words as seeds whose instruction and answer are yet to be written."""
    chunks = {}
    for document in documents:
        starts = [word.start() for word in re.finditer(r"\S+", document.text)]
        for number in range(per_document):
            # One generator a chunk, by the document's content: adding a document moves no other one's chunks.
            rng = np.random.default_rng(int(digest("chunk", str(seed), document.document_id, str(number)), 16))
            first = int(rng.integers(max(1, len(starts) - words + 1)))
            after = starts[first + words] if first + words < len(starts) else len(document.text)
            text = document.text[starts[first] : after].rstrip()
            seed_id = digest(text)
            # By id, so that a short document which gives the same chunk twice is asked about once.
            chunks[seed_id] = Seed(
                seed_id, "general", "", "", text, document.title, document.origin, document.neutralised
            )
    return list(chunks.values())
