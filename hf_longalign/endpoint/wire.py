"""The OpenAI formats: bodies of requests, replies in bodies or streams, meanings of errors. No network."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import PurePath
from typing import Any

from hf_longalign.endpoint.protocol import BAD_REQUEST, CONTENT_FILTER, TOO_LONG, Fault, Reply, Request
from hf_longalign.records.training import is_local_path


# The endpoint has no room: fewer requests at once will do better.
CONGESTION = frozenset(("rate_limit", "overloaded", "timeout"))
# The endpoint as a whole is away: no fault of the request.
AWAY = "unreachable"
# What a server appends to the name it was asked for: a date, a revision, a quantization.
_SUFFIX = re.compile(r"(-\d{4}.*|[@:].+)?")
_TOO_LONG = re.compile(
    r"context.?(?:length|window|size)|(?:prompt|input|request)\b.{0,40}\b(?:too long|longer than|too many tokens)|"
    r"max_new_tokens`? must be",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"['\"`](\w+)['\"`]")
_BARE_OPTION = re.compile(r"\b(stream_options|max_tokens|temperature|top_p|seed)\b")
_STREAM_ONLY = re.compile(
    r"\b(?:only|must|requires?|enable|non)\b.{0,40}\bstream|\bstream\w*\b.{0,40}\b(?:must|required|true)\b",
    re.IGNORECASE,
)
_TITLE = re.compile(rb"<title[^>]*>\s*(.*?)\s*</title>", re.DOTALL | re.IGNORECASE)
_LONGEST_TOLD = 500


class AttemptError(Exception):
    """One attempt failed; another may do better after `wait` seconds, else `reply` is taken if there is one."""

    def __init__(self, fault: Fault, told: str = "", wait: float | None = None, reply: Reply | None = None) -> None:
        super().__init__(f"{fault.kind}: {told}" if told else fault.kind)
        self.fault = fault
        self.wait = wait
        self.reply = reply


class Refusal(Exception):  # noqa: N818 - it is an answer
    """What an error status means where the same attempt again would not help.

    `kind` is "content_filter", "too_long" or "bad_request" (this request alone), "option" (every request that sets
    `option`), "key", "quota" or "not_found" (every request). `told` is what the server said.
    """

    def __init__(self, kind: str, told: str, option: str = "") -> None:
        super().__init__(told)
        self.kind = kind
        self.told = told
        self.option = option


def body_of(request: Request, served_model: str, habits: Collection[str] = ()) -> dict[str, Any]:
    """The request as a JSON body; what is None is left out.

    `habits` are how this endpoint wants to be asked: "max_completion_tokens" in place of `max_tokens`, "stream", and
    "no_stream_options" with it (see `habit_for`).
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": served_model,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if request.chat:
        body["messages"] = [{"role": role, "content": content} for role, content in request.messages]
    else:
        ((_, body["prompt"]),) = request.messages
    body = {name: value for name, value in body.items() if value is not None} | dict(sampling.extra)
    if "max_completion_tokens" in habits or "max_completion_tokens" in body:
        body.setdefault("max_completion_tokens", body.pop("max_tokens"))
    if "stream" in habits:
        body["stream"] = True
    if "no_stream_options" in habits:
        body.pop("stream_options", None)
    elif body.get("stream"):
        # Without it a stream does not say what was used.
        body.setdefault("stream_options", {"include_usage": True})
    return body


def habit_for(refusal: Refusal, body: Mapping[str, Any]) -> str | None:
    """How to ask for the same in another form, where the one in `body` was refused; None where there is none."""
    if refusal.option == "max_tokens" and "max_tokens" in body and "max_completion_tokens" in refusal.told:
        return "max_completion_tokens"
    if refusal.option == "stream" and not body.get("stream"):
        return "stream"
    if refusal.option == "stream_options" and "stream_options" in body:
        return "no_stream_options"
    return None


def same_model(asked: str, got: str) -> bool:
    """Whether a reply's model is the one asked for: servers shorten paths and add dates and revisions.

    >>> same_model("gpt-4o", "gpt-4o-2024-08-06"), same_model("/models/tiny", "tiny@main")
    (True, True)
    >>> same_model("gpt-4o", "gpt-4o-mini")
    False
    """
    asked, got = asked.rstrip("/").split("/")[-1].lower(), got.rstrip("/").split("/")[-1].lower()
    # A server that gives no name is believed.
    return not got or (got.startswith(asked) and _SUFFIX.fullmatch(got[len(asked) :]) is not None)


def most(request: Request, kind: str) -> Fault:
    """A fault of which nobody said what it cost: counted as the most it can be."""
    return Fault(kind, request.most_prompt_tokens, request.sampling.token_limit, confirmed=False)


def read_reply(body: bytes, request: Request, accepted: tuple[str, ...]) -> Reply:
    """The reply in a body with status 200, as JSON or as a stream. `accepted` are the models it may come from.

    A paid text is a reply, whatever it says: verification judges it. An error in place of a text is none.

    Raises:
        AttemptError: an error told by the server ("server_error"), a page for browsers ("web_page"), a body that is
            cut short or holds no choice ("bad_body"), no text and no token ("empty"), another model ("wrong_model").
        Refusal: an error with the status of one.
    """
    data = _completion(body, request)
    usage: dict[str, Any] = data["usage"] if isinstance(data.get("usage"), dict) else {}
    try:
        choice = data["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        text = _text(message.get("content")) or message.get("refusal") or ""
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise AttemptError(_used(usage, request, "", "bad_body") if usage else most(request, "bad_body")) from None
    used = _used(usage, request, text, "server_error")
    if finish == "error" or choice.get("error"):
        raise AttemptError(used if usage or text else Fault("server_error"), _error_of(choice)[0])
    model = data.get("model") or ""
    if not any(same_model(asked, model) for asked in accepted):
        raise AttemptError(replace(used, kind="wrong_model"), f"{model!r} answers")
    recorded = (PurePath(model).name if is_local_path(model) else model) or request.model
    details = usage.get("prompt_tokens_details")
    cached = _number(details, "cached_tokens", 0) if isinstance(details, dict) else 0
    reply = Reply(text, finish, used.prompt_tokens, used.completion_tokens, recorded, cached, used.confirmed)
    # Gateways answer so while the server behind them is away. A greedy model that ends at once would do so for ever.
    silent = not text and not reply.completion_tokens and finish in (None, "", "stop")
    if silent and (request.sampling.temperature != 0 or finish != "stop"):
        raise AttemptError(replace(used, kind="empty"), reply=reply)
    return reply


def read_status(
    status: int, headers: Mapping[str, str], body: bytes, sent: Collection[str] = ()
) -> AttemptError | Refusal:
    """What a status of 400 and above means, with what its body says. `sent` are the fields of the request."""
    told, code, option = _error_of(body)
    told = told or f"HTTP {status}"
    wait = retry_after(headers)
    filtered = "content_filter" in code or "content_policy" in code or "moderation" in told.lower()
    # Before 429, with which OpenAI tells of an empty account: waiting would not fill it.
    if status == 402 or "insufficient_quota" in code:
        return Refusal("quota", told)
    if status == 429:
        return AttemptError(Fault("rate_limit"), told, wait)
    # Before 403, which otherwise means the key.
    if status in (400, 403, 413, 422) and filtered:
        return Refusal(CONTENT_FILTER, told)
    if status in (401, 403):
        return Refusal("key", told)
    if status in (404, 405, 501):
        return Refusal("not_found", told)
    if status in (408, 503, 504, 529):
        return AttemptError(Fault("overloaded"), told, wait)
    if status >= 500 or status in (409, 425):
        return AttemptError(Fault("server_error"), told, wait)
    # A context that is too long is told in terms of max_tokens too, and is no fault of the option.
    if "context_length" in code or _TOO_LONG.search(told):
        return Refusal(TOO_LONG, told)
    if "stream" not in sent and _STREAM_ONLY.search(told):
        return Refusal("option", told, "stream")
    names = (option, *_QUOTED.findall(told), *_BARE_OPTION.findall(told))
    option = next((name for name in names if name in sent), "")
    if option in ("", "model", "messages", "prompt"):
        return Refusal(BAD_REQUEST, told)
    return Refusal("option", told, option)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds the server asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as an HTTP date; else None.

    >>> retry_after({"retry-after": "1.5"}), retry_after({"retry-after-ms": "20"})
    (1.5, 0.02)
    >>> now = datetime(2026, 10, 21, 7, 28, tzinfo=timezone.utc)
    >>> retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:05 GMT"}, now)
    5.0
    """
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / scale
        except ValueError:
            continue
        return seconds if 0 <= seconds < math.inf else None
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - (now or datetime.now(timezone.utc))).total_seconds())


def _completion(body: bytes, request: Request) -> dict[str, Any]:
    """The completion that a body holds, whole or as a stream. Raises what `read_reply` raises."""
    start = body.lstrip()[:1]
    if start == b"<":
        title = _TITLE.search(body)
        raise AttemptError(Fault("web_page"), f"a page {_plain(title[1])!r}" if title else "a page for browsers")
    try:
        data = json.loads(body) if start in (b"{", b"[") else _merged_stream(body)
    except ValueError:
        raise AttemptError(most(request, "bad_body")) from None
    data = data if isinstance(data, dict) else {}
    if data.get("error") and not data.get("choices"):
        told, code, _ = _error_of(data)
        status = code.partition(" ")[0]
        # An error with a status means what that status means.
        if status.isdecimal() and 400 <= int(status) < 600:
            raise read_status(int(status), {}, json.dumps(data).encode())
        raise AttemptError(Fault("server_error"), told)
    return data


def _merged_stream(body: bytes) -> dict[str, Any]:
    """The completion that a stream of server-sent events adds up to. Raises `ValueError` where its end is missing."""
    text, finish, whole = [], None, {}
    for line in body.split(b"\n"):
        name, _, value = line.strip().partition(b":")
        # A line without a name is a comment that keeps the connection open.
        if name != b"data" or value.strip() == b"[DONE]":
            continue
        chunk = json.loads(value)
        if not isinstance(chunk, dict):
            raise ValueError("a chunk of the stream is no object")
        if chunk.get("error"):
            return {"error": chunk["error"]}
        whole.update({name: chunk[name] for name in ("model", "usage") if chunk.get(name)})
        for choice in chunk.get("choices") or ():
            text.append(_text((choice.get("delta") or {}).get("content")) or choice.get("text") or "")
            finish = choice.get("finish_reason") or finish
    if finish is None:
        raise ValueError("the stream has no end")
    return {**whole, "choices": [{"finish_reason": finish, "message": {"content": "".join(text)}}]}


def _error_of(body: bytes | Mapping[str, Any]) -> tuple[str, str, str]:
    """What an error says, its code and type, and the option it is about; empty where they are not told."""
    data: Any = body
    if isinstance(body, bytes):
        try:
            data = json.loads(body)
        except ValueError:
            return _plain(body), "", ""
    if isinstance(data, list) and data:  # Gemini's
        data = data[0]
    error = data.get("error") or data if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return str(error)[:_LONGEST_TOLD], "", ""
    told, option = error.get("message") or error.get("detail") or "", error.get("param") or ""
    if isinstance(told, list):  # FastAPI's: [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
        found = [((one.get("loc") or [""])[-1], one.get("msg")) for one in told if isinstance(one, dict)]
        option = found[0][0] if found else ""
        told = "; ".join(f"{place}: {message}" for place, message in found)
    metadata = error.get("metadata")  # OpenRouter's, with the words of the server behind it
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    told = f"{told} {raw}" if raw else str(told)
    code = " ".join(str(error[name]) for name in ("code", "type") if error.get(name))
    return told[:_LONGEST_TOLD], code, str(option)


def _plain(page: bytes) -> str:
    """The words of a page without its tags."""
    return " ".join(re.sub(r"<[^>]*>", " ", page.decode("utf-8", "replace")).split())[:_LONGEST_TOLD]


def _used(usage: Mapping[str, Any], request: Request, text: str, kind: str) -> Fault:
    """The tokens that `usage` tells. Where it tells none: one token a byte is the most it can have been."""
    limit = min(len(text.encode("utf-8", "replace")), request.sampling.token_limit)
    told = [_number(usage, name, -1) for name in ("prompt_tokens", "completion_tokens")]
    if text:
        # A text for nothing: some gateways fill in zeros, with which no budget would ever end.
        told = [one or -1 for one in told]
    bounds = (request.most_prompt_tokens, limit)
    prompt, completion = (bound if one < 0 else one for one, bound in zip(told, bounds, strict=True))
    return Fault(kind, prompt, completion, confirmed=min(told) >= 0)


def _number(told: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = told.get(name)
    # json reads NaN and Infinity too.
    if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
        return int(value)
    return otherwise


def _text(content: Any) -> str:
    """The text of a message; some servers give it in parts, with thoughts between."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""
