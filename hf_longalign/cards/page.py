"""What every card has in common: templates, front matter, the two marks, keeping what people wrote, and Markdown.

A card is a front matter, and a page between two marks:

    <!-- hf_longalign:begin ... -->
    ...
    <!-- hf_longalign:end -->

The rule is one: what stands between the marks is written anew at every push, all other text is its authors' and stays.
So do the keys of the front matter that this package does not set.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK


CARD = "README.md"
# The place of a repository's name in a card that is written before the repository is known.
REPOSITORY = "<this repository>"
# By which results of this package are told from others' in a model-index.
SOURCE = "hf_longalign"
BEGIN = (
    "<!-- hf_longalign:begin. The text from here to the end mark is written anew at every push. Write your own above "
    "or below: it stays. -->"
)
END = "<!-- hf_longalign:end -->"

_FOLDER = Path(__file__).parent
_BEGIN = re.compile(r"<!-- hf_longalign:begin\b[^>]*-->")
# Metadata that tells of files; what is not written anew with them would tell of files that are gone.
_OF_FILES = ("configs", "dataset_info", "model-index")
# Tags that this package gives; one that is no longer given goes.
_OWN_TAGS = {"long-context", "skipalign", "pose", "randpos", "cream", "context-synthesis", "synthetic", "lora"}


def render(template: str, data: CardData, values: Mapping[str, Any]) -> str:
    """Return a card: its front matter, and a template beside this module with the values it shows."""
    # Parts of a template that have nothing to show leave their empty lines.
    page = re.sub(r"\n{3,}", "\n\n", _TEMPLATES.get_template(template).render(values)).strip()
    # A text of the data may hold what looks like a mark.
    page = page.replace("<!-- hf_longalign", "<!- - hf_longalign")
    return f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n{page}\n\n{END}\n"


def merge_card(new: str, old: str | None) -> str:
    """Return a new card with what people wrote into the one that is there.

    Merging the result again changes nothing. An old card without marks is its author's: the page follows it. Only
    PEFT's template, of which nobody filled in a line, goes.

    Args:
        new: what is about to be written; a card without marks is a person's own and taken as it is.
        old: what is there; `None`: nothing.

    Raises:
        ValueError: an old card whose front matter or marks cannot be read; nothing is to be overwritten then.

    Example:

    >>> new = f"---\\nlicense: mit\\n---\\n\\n{BEGIN}\\n\\n# Rows\\n\\n{END}\\n"
    >>> old = f"---\\nmine: 1\\n---\\n\\n{BEGIN}\\n\\n# Old rows\\n\\n{END}\\n\\nMy notes.\\n"
    >>> print(merge_card(new, old).replace(BEGIN, "(begin)").replace(END, "(end)"), end="")
    ---
    license: mit
    mine: 1
    ---
    <BLANKLINE>
    (begin)
    <BLANKLINE>
    # Rows
    <BLANKLINE>
    (end)
    <BLANKLINE>
    My notes.
    """
    if old is None or not old.strip() or not is_ours(new):
        return new
    old = old.replace("\r\n", "\n")  # written on Windows
    (ours, body), (theirs, old_body) = _split(new), _split(old)
    if is_template(old):
        return new
    before, page, after = _parts(body)
    if is_ours(old):
        old_before, _, old_after = _parts(old_body)
    else:
        old_before, old_after = old_body.strip(), ""
    # What stands beside the new page and not in the old card was written since.
    before, after = ("" if text in old_body else text for text in (before, after))
    data = _merge_data(ours, theirs)
    # Keys keep their order, or authors would see changes in lines that nobody changed.
    front = f"---\n{CardData(**data).to_yaml(original_order=list(data))}\n---\n\n" if data else ""
    return front + "\n\n".join(filter(None, [before, old_before, page, old_after, after])) + "\n"


def is_ours(card: str) -> bool:
    """Return whether a card has marks of this package.

    >>> is_ours("# Mine"), is_ours(BEGIN + END)
    (False, True)
    """
    return "<!-- hf_longalign:" in card


def is_template(card: str) -> bool:
    """Return whether a card is PEFT's template as `save_pretrained` writes it, with nothing filled in.

    >>> is_template("# Mine"), is_template(str(ModelCard.from_template(ModelCardData())))
    (False, True)
    """
    if "[More Information Needed]" not in card:
        return False
    _, body = _split(card)
    known = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    rest = (line.strip() for line in body.splitlines() if line not in known)
    return all(not line or line == "### Framework versions" or line.startswith("- PEFT ") for line in rest)


def cite(keys: Iterable[str]) -> str:
    """Return entries of `citations.bib` as a block of code.

    >>> cite(["zhu2023pose"]).splitlines()[1]
    '@article{zhu2023pose,'
    """
    entries = (_FOLDER / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
    by_key = {entry.split("{", 1)[1].split(",", 1)[0]: entry for entry in entries}
    return fenced("bibtex", "\n\n".join(by_key[key] for key in keys))


def check_license(**licenses: str | None) -> None:
    """Refuse before the work a licence that the Hub would refuse after it.

    Raises:
        ValueError: not an id of the Hub's form (https://huggingface.co/docs/hub/repositories-licenses).

    Example:

    >>> check_license(license="cc-by-4.0", seeds_license=None)
    >>> check_license(license="CC BY 4.0")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: `license` must be an id of the Hub such as 'apache-2.0' or 'other', got 'CC BY 4.0'. Set ...
    """
    for name, value in licenses.items():
        if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
            likely = re.sub(r"[^a-z0-9.+]+", "-", value.lower()).strip("-")
            raise ValueError(
                f"`{name}` must be an id of the Hub such as 'apache-2.0' or 'other', got {value!r}. Set {likely!r}, "
                "if that is the one (https://huggingface.co/docs/hub/repositories-licenses)."
            )


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        return {}, card
    try:
        data = yaml.safe_load(found[2]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The front matter of the card must be YAML, got {error}. Mend it.") from error
    if not isinstance(data, dict):
        raise ValueError(f"The front matter of the card must hold keys, got {type(data).__name__}. Mend it.")
    return data, card[found.end() :]


def _parts(body: str) -> tuple[str, str, str]:
    """What stands before the page, the page with its marks, and what follows it."""
    begins = list(_BEGIN.finditer(body))
    if len(begins) != 1 or body.count(END) != 1 or body.index(END) < begins[0].end():
        raise ValueError(
            "The card must hold the marks of hf_longalign once, a begin and after it an end, got "
            f"{len(begins)} and {body.count(END)}. Restore the pair, or delete all of them to keep the text as yours."
        )
    end = body.index(END)
    return body[: begins[0].start()].strip(), body[begins[0].start() : end] + END, body[end + len(END) :].strip()


def _merge_data(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in theirs.items() if key not in ours and key not in _OF_FILES}
    merged = {**ours, **kept}
    if "tags" in ours and "tags" in theirs:
        tags = [theirs["tags"]] if isinstance(theirs["tags"], str) else theirs["tags"]
        merged["tags"] = [*ours["tags"], *(tag for tag in tags if tag not in {*ours["tags"], *_OWN_TAGS})]
    # Scores that others measured stay; ours belonged to the weights of then.
    index = (ours.get("model-index") or theirs.get("model-index") or [{}])[0]
    results = index["results"] if "model-index" in ours else []
    for result in (result for entry in theirs.get("model-index") or [] for result in entry.get("results") or []):
        if (result.get("source") or {}).get("name") != SOURCE and result not in results:
            results = [*results, result]
    return {**merged, "model-index": [{**index, "results": results}]} if results else merged


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    r"""Return a table; `right` are the columns aligned to the right. Empty text without rows.

    >>> print(table(("a", "b"), [(1, "x|y")], right=[0]))
    | a | b |
    | ---: | --- |
    | 1 | x\|y |
    """
    body = [tuple(row) for row in rows]
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    lines = [head, rule, *body] if body else []
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: Any) -> str:
    """Return a value as a cell of a table shows it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return " ".join(str(value).replace("|", "\\|").split())


def plain(text: Any) -> str:
    """Return text on one line that Markdown and HTML show as it is.

    >>> plain("a_b <!-- x -->")
    'a\\\\_b &lt;!-- x --&gt;'
    """
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]])", r"\\\1", line)


def code(text: Any) -> str:
    """Return text as inline code.

    >>> code("a`b")
    '``a`b``'
    """
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def fenced(language: str, text: str) -> str:
    """Return a block of code, in a fence longer than any inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,  # else a misspelt name would show nothing, silently
)
_TEMPLATES.filters.update(code=code, plain=plain, listed=listed, cell=cell, commas="{:,}".format)
_TEMPLATES.globals.update(table=table, fenced=fenced, cite=cite)
