"""Takes out of a text what must not be written down: keys, passwords in URLs, paths of this machine."""

import re
from collections.abc import Iterable
from pathlib import PurePath


_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=*-]+")
_OPENAI_KEY = re.compile(r"\bsk-[\w*.-]+")
# An absolute path of at least two parts, which no URL leads into.
_PATH = re.compile(r"(?<![\w:/.@-])(?:[A-Za-z]:\\|~?/)(?:[^\s/\\'\"`:,;()<>]+[/\\])+([^\s/\\'\"`:,;()<>]+)")


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without `secrets`, keys and URL passwords, and with the last part of a local path alone.

    >>> redact("no /home/me/models/tiny at http://me:pw@host/v1/models with Bearer abc", ["pw"])
    'no tiny at http://host/v1/models with Bearer ***'
    """
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _LOGIN.sub("", text)
    text = _BEARER.sub(r"\1 ***", text)
    text = _OPENAI_KEY.sub("***", text)
    return _PATH.sub(r"\1", text)


def is_local_path(name: str) -> bool:
    """Whether a model's name is a path of this machine and no Hub id.

    >>> is_local_path("/models/tiny"), is_local_path("./tiny"), is_local_path("org/tiny")
    (True, True, False)
    """
    return (
        name.startswith(("/", "./", "../", "~", ".\\", "..\\")) or PurePath(name).is_absolute() or name[1:3] == ":\\"
    )
