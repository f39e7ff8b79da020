"""Finding in a text what must not be published: tokens, keys, URLs with passwords, paths and names of this machine.

Pure functions over text. Every pattern is written for both Python's `re` and RE2, which reads the Parquet columns: no
look-around. What identifies this machine comes in as a `Machine`.
"""

import getpass
import os
import re
import socket
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple


# Kind -> pattern. Long enough, and checked below for looking random, so that prose and code do not match.
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
    "a Windows path": r"\b([A-Za-z]:\\(?:[^\s\\/:\"'<>|*?]+\\)+[^\s\\/:\"'<>|*?]*)",
    "a password": (
        r"(?i)\b((?:api[_-]?key|secret[_-]?key|password|passwd|auth[_-]?token|access[_-]?token)[\"']?\s*[:=]\s*"
        r"[\"']?[A-Za-z0-9_~+/-]{8,})"
    ),
}
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
    """What would tell of this machine.

    Args:
        secrets: values of its environment that are secrets by their name.
        folders: searched for with what they hold.
        names: searched for as words. A name of letters alone is a word like any other, so only names with digits or
            signs are here; the other names are found in paths and addresses.
        hosts: searched for in addresses.
        looks_at_disk: whether a path that exists here is a find.
    """

    secrets: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    looks_at_disk: bool = False

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
        names = {host, host.split(".")[0], user}
        return cls(
            secrets=tuple(sorted(filter(_is_secret, {*secrets, token or ""}))),
            folders=tuple(sorted({str(path) for path in (Path.home(), Path.cwd()) if len(path.parts) > 2})),
            names=tuple(sorted(name for name in names if _is_telling(name) and name.lower() not in shown)),
            hosts=(host,) if len(host) >= 4 and host.lower() not in _COMMON else (),
            looks_at_disk=True,
        )

    def patterns(self) -> dict[str, str]:
        """Kind -> pattern, of what is worth searching for."""
        kinds = {
            "a secret of this machine": (self.secrets, r"(%s)"),
            "a folder of this machine": (self.folders, r"(?:^|[^\w.:-])((?:%s)(?:[/\\][^\s\"'`<>|:;,)\]}]*|\b))"),
            "a name of this machine": (self.names, r"\b(%s)\b"),
            "this host": (self.hosts, r"(?://|\w@)(%s)\b"),
        }
        return {kind: frame % "|".join(map(re.escape, words)) for kind, (words, frame) in kinds.items() if words}


def _is_secret(value: str) -> bool:
    return len(value) >= 8 and not value.isdigit() and not (value.isalpha() and len(value) < 16)


def _is_telling(name: str) -> bool:
    """Whether a name stands out among words: one with digits or signs, and nobody else's.

    >>> [_is_telling(name) for name in ("gpu-node-17", "j.doe", "anna", "ec2-user", "root")]
    [True, True, False, False, False]
    """
    return len(name) >= 4 and name.lower() not in _COMMON and not name.isalpha()


def row_patterns(machine: Machine) -> dict[str, str]:
    """What is searched for everywhere, in the rows of a data set too: secrets, and this machine's own."""
    return {**SECRETS, **machine.patterns()}


def find_private(text: str, patterns: Mapping[str, str], allow: Collection[str] = ()) -> Iterator[Find]:
    """Yield what the patterns find in a text, examples and what is in `allow` apart.

    >>> [find.kind for find in find_private("http://jo:tr0ub4dor@host/v1, not http://user:password@host", SECRETS)]
    ['a URL with a password']
    """
    for kind, pattern in patterns.items():
        for match in re.finditer(pattern, text, re.ASCII):
            found = match[match.lastindex or 0]
            if not _is_allowed(found, allow) and _is_meant(kind, found):
                yield Find(kind, found)


def find_in_text(text: str, machine: Machine, allow: Collection[str] = ()) -> Iterator[Find]:
    """Yield what must not be published in a text about the run: a card, a configuration, a file's metadata.

    >>> machine = Machine(names=("gpu-node-17",))
    >>> [find.shown for find in find_in_text("run on gpu-node-17 from /home/me/llama in a/b", machine)]
    ['gpu-node-17', '/home/me/llama']
    """
    seen: list[str] = []
    for find in chain(find_private(text, {**row_patterns(machine), **PATHS}, allow), _find_here(text, machine, allow)):
        if not any(find.text in other or other in find.text for other in seen):  # one thing, under its first kind
            seen.append(find.text)
            yield find


def _find_here(text: str, machine: Machine, allow: Collection[str]) -> Iterator[Find]:
    for match in _LOCAL.finditer(text) if machine.looks_at_disk else ():
        if not _is_allowed(match[1], allow) and _is_here(match[1]):
            yield Find("a path of this machine", match[1])


def _is_allowed(found: str, allow: Collection[str]) -> bool:
    return any(found in text for text in allow)


def _is_meant(kind: str, found: str) -> bool:
    if kind == "a URL with a password":
        return not _EXAMPLE.search(found)
    if kind in RANDOM:
        classes = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
        return sum(any(char in letters for char in found[4:]) for letters in classes) >= (2 if "Hub" in kind else 3)
    return True


def _is_here(path: str) -> bool:
    first, second = path.split("/")[1:3]
    return first not in _SYSTEM and Path("/", first, second).exists()
