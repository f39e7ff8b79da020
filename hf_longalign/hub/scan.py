"""Looking through everything that is about to be pushed for what must not be published.

First what is looked for in a text (tokens, keys, passwords, paths, addresses, what tells of this machine), then where:
every kind of file that is pushed.
"""

import getpass
import json
import os
import re
import socket
import string
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_longalign.rows import text_arrays


_BATCH_ROWS = 256
_SHOWN = 5
# Vocabularies hold any word and path of their training data: only what is this machine's own is searched for.
_VOCABULARY = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
# Kind -> pattern. Long enough, and checked below for looking random, so that prose and code do not match. Without
# look-around: RE2, which reads the Parquet columns, has none.
SECRETS = {
    "a Hub token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[opsur]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a bearer token": r"\b[Bb]earer [A-Za-z0-9._~+/-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a URL with a password": r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>{}]+:[^\s/@\"'<>{}]+@[\w.-]+",
    "a URL with a key": r"[?&](?:api[_-]?key|access_token|token|sig|X-Amz-Signature)=[A-Za-z0-9%._~+/-]{20,}",
}
RANDOM = {"an API key", "a bearer token", "a Hub token"}
# Passwords that teach: "http://user:password@host".
_EXAMPLE = re.compile(r"(?i)://[^:]*:(?:pass\w*|pw|pwd|secret|token|key|test|1234\w*|x+|\*+|\.+|\$\w+|%s)@")
# In texts about the run, and not in rows, which may tell of any computer.
PATHS = {
    "an absolute path": (
        r"(?:^|[\s\"'`(\[=:,<>]|file://)(/(?:home|homes|Users|root|mnt|media|data|scratch|tmp|var|srv|opt|work|workspace|"
        r"content|kaggle|gpfs|lustre|nfs|fsx|private|Volumes|export|cluster|storage|shared|net|afs)/[^\s\"'`<>|:;,)\]}]+)"
    ),
    "a path in a home folder": r"(?:^|[\s\"'`(\[=:,<>])(~[\w.-]*/[^\s\"'`<>|:;,)\]}]+)",
    "a Windows path": r"\b([A-Za-z]:\\(?:[^\s\\/:\"'<>|*?]+\\)+[^\s\\/:\"'<>|*?]*)",
    "a password": (
        r"(?i)\b((?:api[_-]?key|secret[_-]?key|password|passwd|auth[_-]?token|access[_-]?token)[\"']?\s*[:=]\s*"
        r"[\"']?[A-Za-z0-9_~+/-]{8,})"
    ),
    "a private address": (
        r"\b(10(?:\.\d{1,3}){3}|192\.168(?:\.\d{1,3}){2}|172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2}|"
        r"169\.254(?:\.\d{1,3}){2}|f[cd][0-9a-f]{2}(?::[0-9a-f]{0,4}){2,7})\b"
    ),
    "an e-mail address": r"\b([A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,})\b",
}
# Of a path, what is allowed allows what lies in it too.
_PATH_KINDS = {
    *("an absolute path", "a path in a home folder", "a Windows path", "a folder of this machine"),
    "a path of this machine",
}
# What every machine has, and addresses that belong to nobody.
_NOBODYS = re.compile(r"~/\.cache/.*|git@.*|.*@(?:.*\.)?example(?:\.\w+)?")
_LOCAL = re.compile(r"(?:^|[\s\"'`(\[=:,<>])((?:/[\w.@+-]+){2,})")
_SYSTEM = {"usr", "bin", "sbin", "lib", "lib64", "etc", "dev", "proc", "sys"}
# Names that many machines share; they tell nothing and are words.
_COMMON = {"root", "user", "admin", "ubuntu", "debian", "jovyan", "runner", "ec2-user", "data", "localhost", "nobody"}
_SECRET_NAME = re.compile(r"(?:^|_)(?:KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|PAT)$")


class Find(NamedTuple):
    """What was found: its kind, and the text itself, of which `shown` gives what a message may tell."""

    kind: str
    text: str

    @property
    def shown(self) -> str:
        """The text, a secret without its end.

        >>> Find("a Hub token", "hf_abcdef").shown, Find("an absolute path", "/home/me/x").shown
        ('hf_a***', '/home/me/x')
        """
        secret = self.kind in SECRETS or self.kind in ("a password", "a secret of this machine")
        return f"{self.text[:4]}***" if secret else self.text


@dataclass(frozen=True)
class Machine:
    """What would tell of this machine."""

    secrets: tuple[str, ...] = ()  # values of its environment that are secrets by their name
    folders: tuple[str, ...] = ()  # searched for with what they hold
    # Words with digits or signs; the other names are words like any other and are found in paths and addresses.
    names: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # searched for in addresses
    looks_at_disk: bool = False  # whether a path that exists here is a find

    @classmethod
    def here(cls, *public: str | None, token: str | None = None) -> "Machine":
        """This machine. Names that are part of a `public` text, a repository's id, are nothing to hide."""
        secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
        shown = " ".join(filter(None, public)).lower()
        host = socket.gethostname()
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a user without a name, in a container
            user = ""
        names = {name for name in (host, host.split(".")[0], user) if len(name) >= 4 and not name.isalpha()}
        return cls(
            # Short values and plain words ("true", "12345678") would be found everywhere.
            secrets=tuple(
                sorted(
                    value
                    for value in {*secrets, token or ""}
                    if len(value) >= 8 and not value.isdigit() and not (value.isalpha() and len(value) < 16)
                )
            ),
            # Not `/` or `/root`, which stand in texts of any machine.
            folders=tuple(sorted({str(path) for path in (Path.home(), Path.cwd()) if len(path.parts) > 2})),
            names=tuple(sorted(n for n in names if n.lower() not in _COMMON and n.lower() not in shown)),
            hosts=(host,) if len(host) >= 4 and host.lower() not in _COMMON else (),
            looks_at_disk=True,
        )

    def patterns(self) -> dict[str, str]:
        """Kind -> pattern, of what is searched for everywhere, in vocabularies and pictures too."""
        kinds = {
            "a secret of this machine": (self.secrets, r"(%s)"),
            "a folder of this machine": (self.folders, r"(?:^|[^\w.:-])((?:%s)(?:[/\\][^\s\"'`<>|:;,)\]}]*|\b))"),
            "a name of this machine": (self.names, r"\b(%s)\b"),
            "this host": (self.hosts, r"(?://|\w@)(%s)\b"),
        }
        return {kind: frame % "|".join(map(re.escape, words)) for kind, (words, frame) in kinds.items() if words}


def find_private(text: str, patterns: Mapping[str, str], allow: Collection[str] = ()) -> Iterator[Find]:
    """Yield what the patterns find in a text, examples and what is in `allow` apart.

    >>> [find.kind for find in find_private("http://jo:tr0ub4dor@host/v1, not http://user:password@host", SECRETS)]
    ['a URL with a password']
    """
    for kind, pattern in patterns.items():
        # ASCII, as RE2 does it in the columns: both searches must find the same.
        for match in re.finditer(pattern, text, re.ASCII):
            found = match[match.lastindex or 0]
            if _is_meant(kind, found) and not _is_allowed(kind, found, allow):
                yield Find(kind, found)


def find_in_text(text: str, machine: Machine, allow: Collection[str] = ()) -> Iterator[Find]:
    """Yield what must not be published in a text about the run: a card, a configuration, a file's metadata.

    >>> machine = Machine(names=("gpu-node-17",))
    >>> [find.shown for find in find_in_text("run on gpu-node-17 from /home/me/llama in a/b", machine)]
    ['gpu-node-17', '/home/me/llama']
    """
    seen: list[str] = []
    finds = list(find_private(text, {**SECRETS, **machine.patterns(), **PATHS}, allow))
    for match in _LOCAL.finditer(text) if machine.looks_at_disk else ():
        first, second = match[1].split("/")[1:3]
        # Two parts that exist here: a path such as /v1/models of an API does not.
        here = first not in _SYSTEM and Path("/", first, second).exists()
        if here and not _is_allowed("a path of this machine", match[1], allow):
            finds.append(Find("a path of this machine", match[1]))
    for find in finds:
        if not any(find.text in other or other in find.text for other in seen):  # one thing, under its first kind
            seen.append(find.text)
            yield find


def _is_allowed(kind: str, found: str, allow: Collection[str]) -> bool:
    folders = [text.rstrip("/\\") for text in allow] if kind in _PATH_KINDS else []
    within = tuple(f"{folder}{slash}" for folder in folders if folder for slash in "/\\")
    return found.startswith(within) or any(found in text for text in allow)


def _is_meant(kind: str, found: str) -> bool:
    if kind == "a URL with a password":
        return not _EXAMPLE.search(found)
    if kind in ("a path in a home folder", "an e-mail address"):
        return not _NOBODYS.fullmatch(found)
    if kind in RANDOM:
        classes = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
        # Keys mix cases and digits; `sk-` in prose is followed by words of one case.
        return sum(any(char in letters for char in found[4:]) for letters in classes) >= (2 if "Hub" in kind else 3)
    return True


def check_private(files: Mapping[str, Path | bytes], machine: Machine, allow: Collection[str] = ()) -> None:
    """Raise unless nothing private is in the files.

    Raises:
        ValueError: names the first finds with file, place and kind; secrets are masked.

    >>> check_private({"README.md": b"# Rows"}, Machine())
    >>> check_private({"README.md": b"# Rows" + b"\\n" + b"from /home/me/rows"}, Machine())
    Traceback (most recent call last):
    ...
    ValueError: What is published must not be private, got an absolute path in README.md, line 2: /home/me/rows. Take
    it out, or name what may be seen by everyone in `allow`.
    """
    found = list(islice(scan(files, machine, allow), _SHOWN + 1))
    if found:
        texts = [f"{find.kind} in {file}, {where}: {find.shown}" for file, where, find in found[:_SHOWN]]
        more = "; and more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"What is published must not be private, got {'; '.join(texts)}{more}. Take it out, or name what "
            "may be seen by everyone in `allow`."
        )


def scan(
    files: Mapping[str, Path | bytes], machine: Machine, allow: Collection[str] = ()
) -> Iterator[tuple[str, str, Find]]:
    """Yield file, place and find: in names, texts, JSON, headers of safetensors, Parquet footers and columns."""
    for name, content in sorted(files.items()):
        for find in find_in_text(name, machine, allow):
            yield name, "its name", find
        if name.endswith(".parquet"):
            places = _in_parquet(content, machine, allow)
        elif name.endswith(".safetensors"):
            # 8 bytes of its length, then JSON (https://github.com/huggingface/safetensors#format).
            with _opened(content) as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            places = _in_json(header, machine, allow)
        else:
            with _opened(content) as file:
                places = _in_file(name, file.read(), machine, allow)
        yield from ((name, where, find) for where, find in places)


def _opened(content: Path | bytes) -> BinaryIO:
    return BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _in_file(name: str, data: bytes, machine: Machine, allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    own = partial(find_private, patterns=machine.patterns(), allow=allow)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        # Every byte is a character of latin-1, so a picture or a model file can be searched like a text.
        yield from (("its bytes", find) for find in own(data.decode("latin-1")))
        return
    if name in _VOCABULARY:
        yield from (("its vocabulary", find) for find in own(text))
        return
    value = None
    if name.endswith(".json"):
        with suppress(json.JSONDecodeError):  # one that is broken is a text
            value = json.loads(text)
    if value is not None:
        yield from _in_json(value, machine, allow)
        return
    for number, line in enumerate(text.splitlines(), 1):
        for find in find_in_text(line, machine, allow):
            yield f"line {number}", find


def _in_json(value: Any, machine: Machine, allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    """By decoded string, so that an escaped line break is no Windows path."""
    for key, text in _strings(value):
        # The key belongs to it: "password" alone says nothing, nor does its value.
        last = key.rpartition(".")[2]
        for find in find_in_text(f'{last}: "{text}"' if last else text, machine, allow):
            yield f"key {key}" if key else "its value", find


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, name
            yield from _strings(item, f"{key}.{name}" if key else name)
    elif isinstance(value, (list, tuple)):  # a map's items are tuples
        for item in value:
            yield from _strings(item, key)


def _in_parquet(content: Path | bytes, machine: Machine, allow: Collection[str]) -> Iterator[tuple[str, Find]]:
    # A path and no open file: Arrow reads it without a call of Python for each piece.
    source = pa.BufferReader(content) if isinstance(content, bytes) else content
    with pq.ParquetFile(source) as file:
        for key, value in (file.metadata.metadata or {}).items():
            if key != b"ARROW:schema":  # the same again, in base64
                for find in find_in_text(value.decode("utf-8", "replace"), machine, allow):
                    yield f"footer {key.decode('utf-8', 'replace')}", find
        for name in file.schema_arrow.names:
            for find in find_in_text(name, machine, allow):
                yield "a column's name", find
        patterns, first = {**SECRETS, **machine.patterns()}, 0
        # RE2 tells at some hundred MB a second which columns to look at. One pattern for all kinds: each pass over a
        # column costs the same, however much is looked for.
        anything = "|".join(f"(?:{pattern})" for pattern in patterns.values())
        for batch in file.iter_batches(_BATCH_ROWS):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                hits = (pc.any(pc.match_substring_regex(texts, anything)).as_py() for texts in text_arrays(column))
                for row, value in enumerate(column.to_pylist()) if any(hits) else ():
                    for _, text in _strings(value):
                        for find in find_private(text, patterns, allow):
                            yield f"column {name}, row {first + row}", find
            first += batch.num_rows
