"""The OpenAI chat-completion format: bodies of requests, replies in bodies, meanings of errors. No network."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf_longalign.synthesis.generators.base import CONTENT_FILTER, Fault, Reply, Request
from hf_longalign.synthesis.redact import is_local_path
from hf_longalign.synthesis.waiting import retry_after


# The endpoint has no room: fewer requests at once will do better.
CONGESTION = frozenset(("rate_limit", "overloaded", "timeout"))
# What a server appends to the name it was asked for: a date, a revision, a quantization.
_SUFFIX = re.compile(r"(-\d{4}.*|[@:].+)?")


class AttemptError(Exception):
    """One attempt failed and another may do better. `wait` is what the server asked for, in seconds."""

    def __init__(self, fault: Fault, wait: float | None = None) -> None:
        super().__init__(fault.kind)
        self.fault = fault
        self.wait = wait


@dataclass(frozen=True)
class Refusal:
    """What an error status means where another attempt would not help.

    `kind` is "content_filter" or "bad_request" (this request alone), "key", "quota" or "not_found" (every request).
    """

    kind: str
    message: str


def body_of(request: Request, served_model: str) -> dict[str, Any]:
    """The request as a chat-completion body; what is None is left out.

    >>> body_of(Request((("user", "Hi"),), "tiny"), "tiny")["messages"]
    [{'role': 'user', 'content': 'Hi'}]
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": served_model,
        "messages": [{"role": role, "content": content} for role, content in request.messages],
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if "max_completion_tokens" in sampling.extra:
        del body["max_tokens"]
    return {name: value for name, value in body.items() if value is not None} | dict(sampling.extra)


def same_model(asked: str, got: str) -> bool:
    """Whether a reply's model is the one asked for: servers shorten paths and add dates and revisions.

    >>> same_model("gpt-4o", "gpt-4o-2024-08-06"), same_model("/models/tiny", "tiny@main")
    (True, True)
    >>> same_model("gpt-4o", "gpt-4o-mini")
    False
    """
    asked, got = asked.rstrip("/").split("/")[-1].lower(), got.rstrip("/").split("/")[-1].lower()
    return not got or (got.startswith(asked) and _SUFFIX.fullmatch(got[len(asked) :]) is not None)


def most(request: Request, kind: str) -> Fault:
    """A fault of which nobody said what it cost: counted as the most it can be."""
    return Fault(kind, request.most_prompt_tokens, request.sampling.token_limit, confirmed=False)


def read_reply(body: bytes, request: Request, accepted: tuple[str, ...]) -> Reply:
    """The reply in a body with status 200. `accepted` are the models it may come from.

    An empty text is a reply like any other: it was paid for, and verification judges it. Raises `AttemptError` for a
    body that is cut short ("bad_body") or from another model ("wrong_model").
    """
    try:
        data = json.loads(body)
    except ValueError:
        raise AttemptError(most(request, "bad_body")) from None
    if isinstance(data, dict) and not data.get("choices") and data.get("error"):
        raise AttemptError(Fault("server_error"))
    try:
        choice, usage, model = data["choices"][0], data.get("usage") or {}, data.get("model") or ""
        message = choice["message"]
        text = _text(message.get("content")) or message.get("refusal") or ""
        # A server that tells no usage: one token a byte is the most it can have been.
        prompt = _number(usage.get("prompt_tokens"), request.most_prompt_tokens)
        completion = _number(
            usage.get("completion_tokens"), min(len(text.encode("utf-8", "replace")), request.sampling.token_limit)
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise AttemptError(most(request, "bad_body")) from None
    if not any(same_model(asked, model) for asked in accepted):
        raise AttemptError(Fault("wrong_model", prompt, completion))
    recorded = PurePath(model).name if is_local_path(model) else model
    return Reply(text, choice.get("finish_reason"), prompt, completion, recorded or request.model)


def read_status(status: int, headers: Mapping[str, str], body: Any) -> AttemptError | Refusal:
    """What a status of 400 and above means, with the error object of its body where there is one."""
    error = body.get("error", body) if isinstance(body, dict) else {}
    code = str(error.get("code") or "") if isinstance(error, dict) else str(error)
    told = _message(error) or f"HTTP {status}"
    wait = retry_after(headers)
    filtered = "content_filter" in code or "content_policy" in code or "moderation" in told.lower()
    if status == 402 or "insufficient_quota" in code:
        return Refusal("quota", told)
    if status == 429:
        return AttemptError(Fault("rate_limit"), wait)
    if status in (400, 403, 413, 422) and filtered:
        return Refusal(CONTENT_FILTER, told)
    if status in (401, 403):
        return Refusal("key", told)
    if status in (404, 405, 501):
        return Refusal("not_found", told)
    if status in (408, 503, 504, 529):
        return AttemptError(Fault("overloaded"), wait)
    if status >= 500 or status in (409, 425):
        return AttemptError(Fault("server_error"), wait)
    return Refusal("bad_request", told)


def _text(content: Any) -> str:
    """The text of a message; some servers give it in parts, with thoughts between."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def _number(value: Any, otherwise: int) -> int:
    return int(value) if isinstance(value, (int, float)) else otherwise


def _message(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return str(error)[:300]
