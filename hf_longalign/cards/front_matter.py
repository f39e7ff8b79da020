"""The YAML at the top of a card: written from plain values, and taken apart by key without a YAML library.

Written is only what the Hub's metadata needs: mappings, lists, strings, numbers, booleans and null, in block style.
Taken apart is any front matter with one key per line at the margin; what belongs to a key is kept as text, so that a
user's own metadata comes through byte for byte.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


# Starts like a word and holds nothing YAML could read otherwise; the sizes of the Hub start with a figure.
_PLAIN = re.compile(r"[A-Za-z]([\w ./<>*()+-]*[\w./<>*()+])?|\d+[KMBT]<n<\d+[KMBT]", re.ASCII)
# The language code of Norwegian is one of them.
_TAKEN = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_PRINTABLE = re.compile(r"[ !#-\[\]-~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_KEY = re.compile(r"""("[^"\\]+"|'[^']+'|[A-Za-z_][\w.-]*)[ ]*:(?=\s|$)""", re.ASCII)
_OPEN, _CLOSE = re.compile(r"---[ \t]*\n"), re.compile(r"^---[ \t]*(\n|\Z)", re.MULTILINE)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML in block style, keys in their order.

    Args:
        values: mappings, lists or tuples, strings, integers, floats, booleans and `None`, nested as wanted.

    Raises:
        TypeError: another type.

    Example:

    >>> print(to_yaml({"language": ["en", "no"], "configs": [{"config_name": "chat", "default": True}]}), end="")
    language:
    - en
    - "no"
    configs:
    - config_name: chat
      default: true
    """
    return "".join(f"{line}\n" for line in _lines(values))


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _entry(_quoted(key), item)]
    lines = []
    for item in value:
        first, *others = _lines(item) if _is_block(item) else [_scalar(item)]
        lines += [f"- {first}", *(f"  {other}" for other in others)]
    return lines


def _entry(key: str, value: Any) -> list[str]:
    if not _is_block(value):
        return [f"{key}: {_scalar(value)}"]
    indent = "  " if isinstance(value, Mapping) else ""
    return [f"{key}:", *(indent + line for line in _lines(value))]


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and len(value) > 0


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping | list | tuple):
        return "{}" if isinstance(value, Mapping) else "[]"
    raise TypeError(f"`values` must hold plain values, got {type(value).__name__}. Convert it first.")


def _number(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    # Without a point YAML 1.1 takes 1e-05 for a string.
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _quoted(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _TAKEN:
        return text
    return f'"{"".join(char if _PRINTABLE.match(char) else _escaped(char) for char in text)}"'


def _escaped(char: str) -> str:
    code = ord(char)
    if char in '"\\':
        return f"\\{char}"
    if char == "\n":
        return "\\n"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@dataclass(frozen=True)
class Entry:
    """One key of a front matter with its text, which ends with a line break.

    `lead` is what stands before it at the margin: comments and blank lines. A last entry without a key holds those
    that end the front matter.
    """

    key: str | None
    text: str
    lead: str = ""


def split_card(card: str) -> tuple[str, str]:
    """Return the front matter of a card, without its fences, and its body.

    Raises:
        ValueError: a front matter that is not closed.

    Example:

    >>> split_card("---\\nlicense: mit\\n---\\n# Title\\n")
    ('license: mit\\n', '# Title\\n')
    >>> split_card("# Title\\n")
    ('', '# Title\\n')
    """
    opening = _OPEN.match(card)
    if not opening:
        return "", card
    closing = _CLOSE.search(card, opening.end())
    if not closing:
        raise ValueError("The card's front matter must end with a line `---`, got none. Add it after the last key.")
    return card[opening.end() : closing.start()], card[closing.end() :]


def split_entries(front_matter: str) -> list[Entry]:
    """Return the entries of a front matter, in order; their `lead` and `text`, joined, give it back.

    Raises:
        ValueError: a line that belongs to no key, or a key that stands there twice.

    Example:

    >>> split_entries("# mine\\nlicense: mit\\ntags:\\n- a\\n")
    [Entry(key='license', text='license: mit\\n', lead='# mine\\n'), Entry(key='tags', text='tags:\\n- a\\n', lead='')]
    """
    entries: list[Entry] = []
    pending = ""
    for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+", front_matter), 2):
        found = _KEY.match(line)
        if found:
            entries.append(Entry(found[1].strip("\"'"), line, pending))
        elif (line.startswith(" ") and line.strip()) or re.match(r"-(\s|$)", line):
            if not entries:
                raise ValueError(_broken(number, line))
            last = entries[-1]
            entries[-1] = Entry(last.key, last.text + pending + line, last.lead)
        elif not line.strip() or line.startswith("#"):
            pending += line
            continue
        else:
            raise ValueError(_broken(number, line))
        pending = ""
    keys = [entry.key for entry in entries]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"The card's front matter must hold `{key}` once, got it twice. Delete one of them.")
    return [*entries, Entry(None, "", pending)] if pending else entries


def _broken(number: int, line: str) -> str:
    return (
        f"The card's front matter must be YAML with one key per line, got line {number}: {line.strip()!r}. Mend it, "
        "or indent it if it goes on from the line before."
    )


def list_items(entry: Entry) -> list[str]:
    """Return the strings of an entry that is a list of words, in block or flow style.

    Raises:
        ValueError: the entry is something else.

    Example:

    >>> list_items(Entry("tags", "tags: [a, b]\\n")), list_items(Entry("tags", "tags:\\n  - a # mine\\n"))
    (['a', 'b'], ['a'])
    """
    head, *lines = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in entry.text.splitlines())
    rest = head.split(":", 1)[1].strip()
    lines = [line.strip() for line in lines if line.strip()]
    if rest.startswith("[") and (" ".join([rest, *lines])).endswith("]"):
        items: Sequence[str] = " ".join([rest, *lines])[1:-1].split(",")
    elif rest and not lines:
        items = [rest]
    else:
        items = [line[1:] for line in lines if line.startswith("- ")]
        if rest or len(items) != len(lines):
            items = ["{"]
    words = [item.strip().strip("\"'") for item in items if item.strip()]
    if any(re.search(r"""["'{}\[\]&*|>]|: """, word) for word in words):
        raise ValueError(f"`{entry.key}` of the card must be a list of words, got {entry.text!r}. Write one per line.")
    return words
