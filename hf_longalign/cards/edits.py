"""Pushing a card again without losing what its readers and owners wrote into it.

A generated card is made of sections between two comments, and of metadata:

    <!-- hf_longalign:begin evaluation -->
    ...
    <!-- hf_longalign:end evaluation -->

A ledger in a last comment holds the digests of all that was generated, so that the next push can tell a hand's work
from its own:

- text outside of the sections stays where it is;
- a section that was changed by hand stays as it is, one that was deleted stays away, the others are written anew. An
  emptied section is filled again;
- the same holds for metadata, except for what must agree with the files beside the card (`REFRESHED`): that is always
  written anew. Tags are united, and licence and languages go only when others come;
- a card without any section, a user's own, is kept whole, and the sections follow it, unless TRL or PEFT wrote it and
  nobody touched it: then they take its place. What these two add to a card that is there does not stay either.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_longalign.cards.front_matter import Entry, list_items, split_card, split_entries, to_yaml
from hf_longalign.cards.templates import is_template, public_entries


logger = logging.getLogger(__name__)

# What the Hub and its clients read beside the files: stale values would show old scores, or load the wrong files.
REFRESHED = {"base_model", "configs", "datasets", "library_name", "model-index", "size_categories"}
# What is told once, to one recipe, and is true of what another one adds.
LASTING = {"license", "language"}
# The place of a repository's name in a card that is written before the repository is known.
REPOSITORY = "<this repository>"

_MARK = re.compile(r"^<!-- hf_longalign:(begin|end) ([a-z-]+) -->[ \t]*$", re.MULTILINE)
_LEDGER = re.compile(r"^<!-- hf_longalign:ledger\n(.*?)^-->[ \t]*$", re.MULTILINE | re.DOTALL)
_LEDGER_LINE = re.compile(r"^([\w.-]+:?) ([0-9a-f]{8})$", re.MULTILINE)
_LEDGER_TEXT = """\
Sections between begin and end, and the metadata named here, are written anew at every push. What you change in them or
delete stays as you leave it, and so does all text outside of them. An emptied section is filled again.
"""


@dataclass(frozen=True)
class Part:
    """A section (`name`) with the text between its marks, or the text between two sections (no name)."""

    name: str | None
    text: str


@dataclass(frozen=True)
class Card:
    """A card taken apart; `ledger` holds digests by section name, and by `key:` of the metadata."""

    entries: list[Entry]
    parts: list[Part]
    ledger: dict[str, str]


def assemble(metadata: Mapping[str, object], sections: Mapping[str, str]) -> str:
    """Return a card with its ledger; sections without text are left out.

    >>> print(assemble({"license": "mit"}, {"intro": "# Rows"}).split("<!-- hf_longalign:ledger")[0])
    ---
    license: mit
    ---
    <BLANKLINE>
    <!-- hf_longalign:begin intro -->
    <BLANKLINE>
    # Rows
    <BLANKLINE>
    <!-- hf_longalign:end intro -->
    <BLANKLINE>
    """
    entries = split_entries(to_yaml(metadata))
    # A text of the data set may hold what looks like a mark.
    texts = {
        name: text.strip("\n").replace("<!-- hf_longalign", "<!- - hf_longalign") for name, text in sections.items()
    }
    parts = [Part(name, text) for name, text in texts.items() if text.strip()]
    return _render(Card(entries, parts, _digests(entries, parts)))


def merge_card(new: str, remote: str | None) -> str:
    """Return the card to push: `new`, with what people wrote into `remote` since it was generated.

    Merging the result again changes nothing, and without edits the result is `new`.

    Args:
        new: a card of this package; another one is a person's own, and taken as it is.
        remote: the card that is published now; `None` where there is none.

    Raises:
        ValueError: a front matter, marks or a ledger that cannot be read; nothing is to be overwritten then.

    Example:

    >>> first = assemble({"license": "mit"}, {"intro": "# Rows", "size": "2 rows"})
    >>> second = assemble({"license": "mit"}, {"intro": "# Rows", "size": "3 rows"})
    >>> edited = first.replace("license: mit", "license: cc-by-4.0").replace("# Rows", "# My rows")
    >>> merged = merge_card(second, edited)
    >>> "license: cc-by-4.0" in merged, "# My rows" in merged, "3 rows" in merged
    (True, True, True)
    """
    ours = _parse(new, "new")
    if remote is None or not remote.strip() or not _LEDGER.search(new):
        return new
    theirs = _parse(remote.replace("\r\n", "\n"), "published")
    own = [part for part in theirs.parts if part.name or not is_template(part.text)]
    theirs = Card(public_entries(theirs.entries), own, theirs.ledger)
    entries = _merge_entries(ours, theirs)
    parts = _merge_parts(ours, theirs)
    names = {_name(entry) for entry in entries} | {part.name for part in parts}
    # What is gone and was not deleted by hand must be able to come back.
    kept = {name: digest for name, digest in theirs.ledger.items() if name in names or _was_deleted(name, theirs)}
    return _render(Card(entries, parts, {**kept, **ours.ledger}))


def is_own_card(card: str) -> bool:
    """Return whether a card is a person's alone: this package has no part in it, and no template is left as it was.

    >>> is_own_card("# Mine"), is_own_card(assemble({}, {"intro": "# Rows"})), is_own_card("[More Information Needed]")
    (True, False, False)
    """
    return not _LEDGER.search(card) and bool(card.strip()) and not is_template(split_card(card)[1])


def name_repository(card: str, repo_id: str) -> str:
    """Return a card with the repository's name in the places that were left open for it.

    Example:

    >>> card = assemble({}, {"use": f'load_dataset("{REPOSITORY}")'})
    >>> 'load_dataset("user/rows")' in name_repository(card, "user/rows")
    True
    """
    old = _parse(card, "new")
    entries = [Entry(entry.key, entry.text.replace(REPOSITORY, repo_id), entry.lead) for entry in old.entries]
    parts = [Part(part.name, part.text.replace(REPOSITORY, repo_id)) for part in old.parts]
    before, after = _digests(old.entries, old.parts), _digests(entries, parts)
    # A section that was edited by hand must go on differing from its digest.
    ledger = {name: after[name] if before.get(name) == value else value for name, value in old.ledger.items()}
    return _render(Card(entries, parts, ledger))


def _parse(card: str, which: str) -> Card:
    front_matter, body = split_card(card)
    found = _LEDGER.findall(body)
    if len(found) > 1:
        raise ValueError(
            f"The {which} card must hold one ledger of hf_longalign, got {len(found)}. Delete the others."
        )
    parts = _split_parts(_LEDGER.sub("", body), which)
    if not found and any(part.name for part in parts):
        raise ValueError(
            f"The {which} card has sections of hf_longalign and lost its ledger, so that nobody can tell what was "
            "edited. Put its last comment back, or delete the begin and end lines of what you want to keep."
        )
    return Card(split_entries(front_matter), parts, dict(_LEDGER_LINE.findall(found[0])) if found else {})


def _split_parts(body: str, which: str) -> list[Part]:
    parts, inside, start = [], None, 0
    for mark in _MARK.finditer(body):
        kind, name = mark.groups()
        if (kind == "end") != (inside is not None) or (kind == "end" and name != inside):
            raise ValueError(_unbalanced(which, mark[0]))
        text = body[start : mark.start()].strip("\n")
        if inside is not None or text.strip():
            parts.append(Part(inside, text))
        inside, start = (name, mark.end()) if kind == "begin" else (None, mark.end())
    names = [part.name for part in parts if part.name]
    if inside is not None or "<!-- hf_longalign:" in _MARK.sub("", body) or len(names) > len(set(names)):
        twice = next((name for name in names if names.count(name) > 1), inside)
        raise ValueError(_unbalanced(which, f"section {twice}" if twice else "a mark that is changed"))
    rest = body[start:].strip("\n")
    return [*parts, Part(None, rest)] if rest.strip() else parts


def _unbalanced(which: str, where: str) -> str:
    return (
        f"The {which} card must have each section of hf_longalign once, between one begin and one end line, got "
        f"{where} out of place. Restore the pair, or delete both lines to keep the text as yours."
    )


def _merge_entries(ours: Card, theirs: Card) -> list[Entry]:
    new: dict[str | None, Entry] = {entry.key: entry for entry in ours.entries if entry.key}
    kept: list[Entry] = []
    for entry in theirs.entries:
        mine = new.get(entry.key)
        touched = _digest(entry.text) != theirs.ledger.get(f"{entry.key}:")
        lasts = touched or entry.key in LASTING
        if entry.key is None or (mine is None and lasts and not _is_stale(entry, ours, theirs)):
            kept.append(entry)
        elif mine is not None and touched and entry.key == "tags":
            kept.append(_united(entry, mine))
        elif mine is not None and touched and entry.key not in REFRESHED and not _was_edited(mine, ours):
            kept.append(entry)
        elif mine is not None:
            kept.append(Entry(entry.key, mine.text, entry.lead))
    present = {entry.key for entry in kept}
    for place, entry in enumerate(ours.entries):
        deleted = f"{entry.key}:" in theirs.ledger and entry.key not in REFRESHED
        if entry.key and entry.key not in present and not deleted:
            before = [other.key for other in ours.entries[:place]]
            kept.insert(_after([other.key for other in kept], before), entry)
    return kept


def _is_stale(entry: Entry, ours: Card, theirs: Card) -> bool:
    """Whether metadata that is not generated now describes files that are gone."""
    if entry.key == "dataset_info":  # written by `Dataset.push_to_hub`; with other files it makes loading fail
        return any(mine.key == "configs" for mine in ours.entries)
    return entry.key in REFRESHED and f"{entry.key}:" in theirs.ledger


def _united(entry: Entry, mine: Entry) -> Entry:
    words = list_items(entry)
    missing = [word for word in list_items(mine) if word not in words]
    return Entry(entry.key, to_yaml({"tags": [*words, *missing]}), entry.lead) if missing else entry


def _merge_parts(ours: Card, theirs: Card) -> list[Part]:
    new: dict[str | None, Part] = {part.name: part for part in ours.parts if part.name}
    kept: list[Part] = []
    for part in theirs.parts:
        mine = new.get(part.name)
        touched = part.text.strip() and _digest(part.text) != theirs.ledger.get(part.name or "")
        if part.name is None or (touched and not (mine and _was_edited(mine, ours))):
            kept.append(part)
            if part.name:
                logger.warning("Section %s of the card was edited by hand and stays. Empty it to renew it.", part.name)
        elif mine is not None:
            kept.append(mine)
    names = [part.name for part in kept if part.name]
    for place, part in enumerate(ours.parts):
        known = part.name in names or part.name in theirs.ledger if part.name else _holds(kept, part)
        if not known:
            before = [other.name for other in ours.parts[:place] if other.name]
            kept.insert(_after([other.name for other in kept], before), part)
    return kept


def _holds(parts: Sequence[Part], text: Part) -> bool:
    return any(text.text.strip() in part.text for part in parts if part.name is None)


def _after(names: Sequence[str | None], before: Sequence[str | None]) -> int:
    """The place after the last of the names that stand before; the end, if none of them is there and none follows."""
    places = [names.index(name) for name in before if name in names]
    if places:
        return max(places) + 1
    return 0 if not before and any(names) else len(names)


def _was_edited(mine: Entry | Part, card: Card) -> bool:
    return _digest(mine.text) != card.ledger.get(_name(mine))


def _was_deleted(name: str, card: Card) -> bool:
    present = {_name(entry) for entry in card.entries} | {part.name for part in card.parts}
    return name not in present


def _name(item: Entry | Part) -> str:
    return f"{item.key}:" if isinstance(item, Entry) else item.name or ""


def _digests(entries: Sequence[Entry], parts: Sequence[Part]) -> dict[str, str]:
    named: list[Entry | Part] = [entry for entry in entries if entry.key]
    named += [part for part in parts if part.name]
    return {_name(item): _digest(item.text) for item in named}


def _digest(text: str) -> str:
    """A digest that blank lines at the ends and blanks at the ends of lines do not change: editors touch them."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _render(card: Card) -> str:
    front_matter = "".join(entry.lead + entry.text for entry in card.entries)
    blocks = [f"---\n{front_matter}---"] if front_matter else []
    for part in card.parts:
        begin, end = (f"<!-- hf_longalign:{kind} {part.name} -->" for kind in ("begin", "end"))
        blocks.append(f"{begin}\n\n{part.text}\n\n{end}" if part.name else part.text)
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(card.ledger.items()))
    return "\n\n".join([*blocks, f"<!-- hf_longalign:ledger\n{_LEDGER_TEXT}{lines}-->"]) + "\n"
