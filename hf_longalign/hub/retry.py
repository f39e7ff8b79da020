"""Repeating a push over failures that pass, and saying what to do about those that do not."""

import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from httpx2 import HTTPError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers


logger = logging.getLogger(__name__)

ATTEMPTS = 6  # about a minute of waiting, on top of the client's own repetitions of uploads
# A request that came too late, another push that was first (409, 412), too many requests.
PASSING = {408, 409, 412, 429}
REMEDIES = {
    401: "The token is not valid. Log in with `hf auth login` or set `token`.",
    402: "Its owner's plan does not cover it. Ask the owner, or set `private=False`.",
    403: "The token has no right to write there. Take one that has (`hf auth login`), or set `create_pr=True`.",
    404: "It does not exist, or the token may not see it. Correct `repo_id`, or take another token.",
}
Result = TypeVar("Result")


class PublishError(RuntimeError):
    """A push that is not complete; the message says how to go on."""


def repeat(push: Callable[[], Result], repo_id: str, resume_command: str | None = None) -> Result:
    """Run a push until it succeeds, waiting longer each time; what cannot pass by itself is raised at once.

    Args:
        push: changes nothing where its work is done already; a ValueError of it is the caller's to mend.
        repo_id: named in messages.
        resume_command: the command that goes on; `None`: the call itself.

    Raises:
        PublishError: the push failed for good or too often.

    Example:

    >>> repeat(lambda: "done", "user/rows")
    'done'
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return push()
        except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
            cause = _cause(error)
            if not _passes(cause) or attempt == ATTEMPTS:
                raise PublishError(_message(cause, repo_id, resume_command)) from error
            wait = _seconds(cause, attempt)
            logger.warning("Push to %s failed (%s); again in %.0f s.", repo_id, _line(cause), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    """What lies under the client's "Error while uploading …"."""
    while isinstance(error, RuntimeError) and not isinstance(error, PublishError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passes(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in PASSING
    if isinstance(error, OSError):
        return isinstance(error, (ConnectionError, TimeoutError))  # and no file that is missing or may not be read
    return True


def _seconds(error: BaseException, attempt: int) -> float:
    """Seconds to wait: what the Hub asks for, else exponentially longer with jitter."""
    headers: Any = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return random.uniform(0.5, 1.0) * 2**attempt


def _message(error: BaseException, repo_id: str, resume_command: str | None) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    remedy = REMEDIES.get(status, "") if status else ""
    if isinstance(error, OfflineModeIsEnabled):
        remedy = "Unset `HF_HUB_OFFLINE`."
    go_on = f"To go on, run: {resume_command}" if resume_command else "Call it again to go on."
    parts = (
        f"The push to {repo_id} is not complete: {_line(error)}.",
        remedy,
        "What readers see is as it was or complete, never half.",
        go_on,
    )
    return " ".join(part for part in parts if part)


def _line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "what the Hub answered is not JSON"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
