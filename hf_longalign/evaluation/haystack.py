"""The text a needle is hidden in: texts from anywhere, cut into sentences between which needles go."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


# Characters of scripts that are written without blanks between words, or whose endings stick to the word: Thai, Lao,
# Myanmar, Khmer, Hangul, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
PARAGRAPH = "\n\n"

# More would be measured for nothing: about a million tokens of English.
_MOST_CHARACTERS = 4_000_000
# A text without full stops still needs places for needles.
_LONGEST_SENTENCE = 600
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?= )|[。！？｡]+[\"”’」』）]*")
_LAST_WORD = re.compile(r"([^\W\d_]+|\b\d{1,2})\.$")
_SHORT_FORMS = "al cf ch co dr ed eds etc fig inc jr lt ltd mr mrs ms no nos pp prof sr st vol vs"
_ABBREVIATIONS = frozenset(_SHORT_FORMS.split())
_UNIT = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]{{1,30}})")


def load_texts(source: str) -> Iterable[str]:
    """Return the texts of a file or folder, see [`read_texts`], or of a data set, read as they are needed.

    Args:
        source: path, or a data set on the Hub, `user/name[:config][@split]` (default: train); its texts are the column
            text, or context.

    Raises:
        ValueError: a path to nothing, or no such column.
        ConnectionError: the data set cannot be had.
    """
    if (
        Path(source).exists()
        or Path(source).suffix == ".txt"
        or source.count("/") > 1
        or source.startswith((".", "~", "/"))
    ):
        return read_texts(source)
    from datasets import load_dataset

    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the Hub's, the network's, the format's
        raise ConnectionError(
            f"`haystack` must be a text file, a folder or a data set, got {source!r}: there is no such path, and as a "
            f"data set it cannot be had ({type(error).__name__}: {error}). Correct it, or leave it out."
        ) from error
    return _texts(rows, source)


def _texts(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[str]:
    for row in rows:
        column = next((name for name in ("text", "context") if name in row), None)
        if column is None:
            raise ValueError(
                f"`haystack` must be a data set with a column text or context, got {source!r} with {', '.join(row)}. "
                "Save its texts as .txt files."
            )
        yield row[column]


def read_texts(path: str | Path) -> list[str]:
    """Return the text of a file, or of every `.txt` file of a folder, sorted by name.

    Args:
        path: file or folder; the files are UTF-8.

    Raises:
        ValueError: there is no such file, no `.txt` file in the folder, or a file is empty or not UTF-8; the message
            names the file.
    """
    path = Path(path)
    files = sorted(file for file in path.glob("*.txt") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"`haystack` must be a folder with .txt files, got none in {str(path)!r}. Put some there.")
    return [_read(file) for file in files]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"`haystack` must be a text file or a folder, got {str(file)!r}, which is not there. Correct the path."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`haystack` must be UTF-8, got a file that is not: {str(file)!r}, byte {error.start}. Convert it."
        ) from None
    if not text.strip():
        raise ValueError(f"`haystack` must hold text, got an empty file: {str(file)!r}. Fill it or take it away.")
    return text


def sentences_of(texts: Iterable[str]) -> list[str]:
    """Return the sentences of texts, in order, each with the blank or the empty line that stands before it.

    Texts are read until they hold 4 million characters: a data set may be larger than any haystack.

    Args:
        texts: a column of a data set, files, the built-in [`noise`].

    Raises:
        ValueError: something is no text, or there is no sentence in them.

    Example:

    >>> sentences_of(["Mr. Fox came in. He sat down.\\n\\nIt rained."])
    ['\\n\\nMr. Fox came in.', ' He sat down.', '\\n\\nIt rained.']
    """
    sentences: list[str] = []
    characters = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"`haystack` must be texts, got {type(text).__name__} at row {index}. Choose another column."
            )
        sentences += split_sentences(text)
        characters += len(text)
        if characters >= _MOST_CHARACTERS:
            break
    if not sentences:
        raise ValueError("`haystack` must hold at least one sentence, got none. Give it texts.")
    return sentences


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with what stands before it: an empty line, a blank or nothing.

    Line breaks and runs of blanks become one blank, empty lines stay. A sentence ends at a full stop, question or
    exclamation mark that no small letter follows and that does not belong to an abbreviation; beyond 600 characters it
    is cut at a blank.

    Example:

    >>> split_sentences("It was 5 p.m. and late.  Who\\ncame? 他来了。然后走了。")
    ['\\n\\nIt was 5 p.m. and late.', ' Who came?', ' 他来了。', '然后走了。']
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        starts = [0, *_sentence_ends(line)]
        parts = [line[start:end] for start, end in zip(starts, [*starts[1:], len(line)], strict=True)]
        cut = [piece for part in parts for piece in _pieces(part)]
        sentences += [PARAGRAPH + cut[0], *cut[1:]] if cut else []
    return sentences


def split_units(sentence: str) -> list[str]:
    """Return the smallest parts a sentence may be cut into: words, single characters of scripts without blanks.

    Example:

    >>> split_units(" Who came? 他来")
    [' Who', ' came?', ' 他', '来']
    """
    return _UNIT.findall(sentence)


def _sentence_ends(line: str) -> list[int]:
    ends = []
    for match in _END.finditer(line):
        end = match.end()
        follower = line[end : end + 2].strip()[:1]
        if follower and not follower.islower() and not _is_abbreviation(line[max(0, end - 12) : end]):
            ends.append(end)
    return ends


def _is_abbreviation(before: str) -> bool:
    """Whether the full stop belongs to a short form, an initial or the number of a list."""
    match = _LAST_WORD.search(before)
    return match is not None and (len(match[1]) == 1 or match[1].isdigit() or match[1].lower() in _ABBREVIATIONS)


def _pieces(sentence: str) -> list[str]:
    pieces = []
    while len(sentence) > _LONGEST_SENTENCE:
        blank = sentence.rfind(" ", 1, _LONGEST_SENTENCE)
        end = blank if blank > 0 else _LONGEST_SENTENCE
        pieces.append(sentence[:end])
        sentence = sentence[end:]
    return [*pieces, sentence] if sentence else pieces
