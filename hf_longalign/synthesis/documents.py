"""Documents: texts without instructions, as distractors or as the source of instruction synthesis."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np

from hf_longalign.synthesis.rows import BadRowError, read_rows
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.tokens import ControlTokens
from hf_longalign.text import clean, digest


COLUMNS = ("text", "context")


@dataclass(frozen=True)
class Document:
    """A text, its title where it has one, and where it was read (file name and line, never a path).

    `neutralised` says how many marks of chat templates were made plain words of.
    """

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
    """Read documents.

    Args:
        sources: text files (one document each) or patterns such as `essays/*.txt`; JSONL, CSV, Parquet or Hub data
            sets with a column `text` or `context`, and a `title` where there is one.
        control: the marks of chat templates to look for; `None` to leave them in.
        on_control_tokens: "neutralise" makes plain words of them, "reject" refuses the document.

    Raises:
        BadRowError: a row without a text.
        ValueError: no such file, a text file that is empty or not UTF-8, or a refused document.
    """
    found = (document for source in sources for path in _expand(source) for document in _read(path))
    if control is not None:
        found = (_controlled(document, control, on_control_tokens) for document in found)
    return list({document.document_id: document for document in found}.values())


def _controlled(document: Document, control: ControlTokens, on_control_tokens: str) -> Document:
    texts = f"{document.title or ''}\n{document.text}"
    found = control.find(texts)
    if not found:
        return document
    if on_control_tokens == "reject":
        raise ValueError(
            f"{document.origin}: a document must hold no mark of a chat template, got {found[0]!r}. Take it out, or "
            "set `on_control_tokens` to 'neutralise'."
        )
    text, title = control.neutralise(document.text)[0], document.title and control.neutralise(document.title)[0]
    return replace(document, text=text, title=title, neutralised=len(found))


def _expand(source: str) -> list[str]:
    if not any(char in source for char in "*?["):
        return [source]
    paths = sorted(glob(source, recursive=True))
    if not paths:
        raise ValueError(f"`documents` must name files, got {source!r}, which matches none.")
    return paths


def _read(source: str) -> Iterator[Document]:
    if Path(source).suffix in (".txt", ".md") and Path(source).is_file():
        try:
            text = clean(Path(source).read_text(encoding="utf-8-sig")).strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 at byte {error.start + 1}. Save it as UTF-8.") from None
        if not text:
            raise ValueError(f"{source} is empty. Leave it out of `documents`.")
        yield Document(text, clean(Path(source).name))
        return
    for row in read_rows(source):
        if row.fault:
            raise row.fault
        value = next((row.values[column] for column in COLUMNS if row.values.get(column)), None)
        if not isinstance(value, str) or not value.strip():
            raise BadRowError(row, "no text", f"Fill in one of the columns {', '.join(COLUMNS)}.")
        title = row.values.get("title")
        if title is not None and not isinstance(title, str):
            raise BadRowError(row, f"not a string but {type(title).__name__}", "Write text.", "title")
        yield Document(value.strip(), row.origin, (title or "").strip() or None)


def draw_chunks(documents: Sequence[Document], words: int, per_document: int, seed: int) -> list[Seed]:
    """Return random contiguous chunks as seeds whose instruction and answer are still to be written.

    Instruction synthesis takes 3,000 words (https://arxiv.org/abs/2502.15592). A chunk begins and ends at a word; the
    blanks between its words stay as they are.

    Example:

    >>> draw_chunks([Document("one two  three", "a.txt")], 2, 1, seed=0)[0].context in ("one two", "two  three")
    True
    """
    chunks = {}
    for document in documents:
        starts = _word_starts(document.text)
        for number in range(per_document):
            rng = np.random.default_rng(int(digest("chunk", str(seed), document.document_id, str(number)), 16))
            first = int(rng.integers(max(1, len(starts) - words + 1)))
            after = starts[first + words] if first + words < len(starts) else len(document.text)
            text = document.text[starts[first] : after].rstrip()
            seed_id = digest(text)
            chunk = Seed(seed_id, "general", "", "", text, document.title, document.origin, document.neutralised)
            chunks[chunk.seed_id] = chunk
    return list(chunks.values())


def _word_starts(text: str) -> list[int]:
    return [
        place for place, char in enumerate(text) if not char.isspace() and (place == 0 or text[place - 1].isspace())
    ]
