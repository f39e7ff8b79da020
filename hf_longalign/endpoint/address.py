"""Where a model is served, with its key, and how keys, logins and paths are kept out of whatever is written down."""

import base64
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hf_longalign.lazy import require
from hf_longalign.records.training import is_local_path


_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=*-]+")
_OPENAI_KEY = re.compile(r"\bsk-[\w*.-]+")
# An absolute path of at least two parts, which no URL leads into.
_PATH = re.compile(r"(?<![\w:/.@-])(?:[A-Za-z]:\\|~?/)(?:[^\s/\\'\"`:,;()<>]+[/\\])+([^\s/\\'\"`:,;()<>]+)")


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without `secrets`, keys and logins, and with the last part of a local path alone.

    >>> redact("no /home/me/models/tiny at http://me:pw@host/v1/models with Bearer abc", ["pw"])
    'no tiny at http://host/v1/models with Bearer ***'
    """
    # The longest first: a password may be part of a login.
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _LOGIN.sub("", text)
    text = _BEARER.sub(r"\1 ***", text)
    text = _OPENAI_KEY.sub("***", text)
    return _PATH.sub(r"\1", text)


def recorded_name(model: str) -> str:
    """The name of a model in keys, rows and the journal: a local path by its last part and a hash of the whole.

    >>> recorded_name("org/tiny"), recorded_name("/models/tiny")
    ('org/tiny', 'tiny-7bda4981')
    """
    if not is_local_path(model):
        return model
    # The hash tells apart two models in folders of one name; the path itself would be in every published row.
    return f"{PurePath(model).name}-{hashlib.blake2b(model.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Endpoint:
    """One base URL and the key it takes. A login in the URL is sent as HTTP basic authentication and never shown.

    Raises:
        ValueError: no such URL, or a login beside a key.

    >>> Endpoint("http://me:secret@host:8000")
    Endpoint(name='http://host:8000/v1')
    """

    url: str = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            shown = redact(self.url.split("?")[0])
            raise ValueError(
                f"`endpoint` must be a URL such as http://localhost:8000/v1, got {shown!r}. Set no query."
            )
        if self.api_key and parts.username:
            raise ValueError("`endpoint` must hold a login or come with a key, got both. Set one of them.")
        # Not `parts.hostname`, which drops the port and the brackets of an IPv6 address.
        host = parts.netloc.rpartition("@")[2]
        name = urlunsplit((parts.scheme, host, parts.path.rstrip("/") or "/v1", "", ""))
        object.__setattr__(self, "name", name)

    @property
    def login(self) -> str | None:
        """User and password of the URL, as sent."""
        parts = urlsplit(self.url)
        if not parts.username:
            return None
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return base64.b64encode(login.encode()).decode()

    def client(self, **options: Any) -> Any:
        """An `openai.AsyncOpenAI` for it, which sends each request once: retries are counted and paced here."""
        return require("openai", "endpoint").AsyncOpenAI(
            base_url=self.name,
            # Refused without a key; and OPENAI_API_KEY, whosever it is, is read where none is given.
            api_key=self.api_key or "none",
            default_headers={"Authorization": f"Basic {self.login}"} if self.login else {},
            max_retries=0,
            **options,
        )

    @property
    def secrets(self) -> list[str]:
        """What must not be written down."""
        password = urlsplit(self.url).password
        return [secret for secret in (self.api_key, password, unquote(password or ""), self.login) if secret]

    @classmethod
    def with_key_of(cls, endpoint: "str | Endpoint", variable: str) -> "Endpoint":
        """The endpoint at a URL with the key that the environment variable holds, if it is set and no login is."""
        if isinstance(endpoint, Endpoint):
            return endpoint
        return cls(endpoint, None if urlsplit(endpoint).username else os.environ.get(variable) or None)
