"""Replies from OpenAI-compatible endpoints: vLLM, SGLang, TGI, `transformers serve`, hosted ones; several at once."""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Sequence
from typing import Any

from hf_longalign.synthesis.extras import require
from hf_longalign.synthesis.generators.base import (
    EndpointError,
    Fault,
    GenerationError,
    NoReplyError,
    Notify,
    Reply,
    Request,
    RunStopped,
    ignore,
)
from hf_longalign.synthesis.generators.completions import (
    AttemptError,
    Refusal,
    body_of,
    most,
    read_reply,
    read_status,
)
from hf_longalign.synthesis.generators.endpoint import Endpoint, recorded_name
from hf_longalign.synthesis.generators.pool import AWAY, Lane, Pool
from hf_longalign.synthesis.limiter import AdaptiveLimiter
from hf_longalign.synthesis.redact import redact
from hf_longalign.synthesis.waiting import backoff


logger = logging.getLogger(__name__)

# The server is busy or away, and the request is none the worse for it: not one of its attempts.
_NOT_ITS_FAULT = AWAY | {"rate_limit", "overloaded"}
# So many requests refused as bad before the first reply, and the settings are at fault, not the prompts.
_BAD_REQUESTS = 8
_WRONG_MODELS = 3
_CHECK_SECONDS = 20.0
_CONNECT_SECONDS = 10.0
# Errors of the connection that end an attempt before the request was sent (httpx and httpx2 name them alike).
_NOT_SENT = frozenset(("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"))
# What an error that ends the run means, and what to set.
_MEANING = {
    "key": "the key is refused. Set it in the variable that `api_key_env` names",
    "quota": "the account has no quota left. Top it up and run again",
    "not_found": "no such model or route. Set `model` to one it serves, and the URL to its base (mostly …/v1)",
}


class OpenAIGenerator:
    """Asks one or several endpoints that serve the same model, each with an adaptive number of requests at once.

    Parameters:
        model: the name the endpoints serve. A local path is recorded by its last part and a hash of the whole.
        endpoints: base URLs or `Endpoint`s; a URL without a path gets /v1.
        api_key_env: the environment variable with the key. Without the variable no key is sent.
        max_concurrency: the most requests at once to one endpoint.
        timeout: seconds for one attempt.
        max_attempts: attempts at one request; waiting for a busy or absent server is none.
        patience: seconds without any answer after which the run stops.
        accept_models: other names under which the endpoints may answer.

    Example (no request is sent):

    >>> generator = OpenAIGenerator("tiny", ["http://localhost:8000", "http://localhost:8001"], max_concurrency=32)
    >>> generator.model, generator.concurrency
    ('tiny', 64)
    """

    remote = True

    def __init__(
        self,
        model: str,
        endpoints: str | Endpoint | Sequence[str | Endpoint],
        *,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 64,
        timeout: float = 600.0,
        max_attempts: int = 8,
        patience: float = 600.0,
        accept_models: Sequence[str] = (),
    ) -> None:
        if isinstance(endpoints, (str, Endpoint)):
            endpoints = [endpoints]
        if not endpoints:
            raise ValueError("`endpoints` must hold at least one URL, got none. Set http://localhost:8000/v1.")
        self.endpoints = [
            Endpoint.with_key_of(endpoint, api_key_env) if isinstance(endpoint, str) else endpoint
            for endpoint in endpoints
        ]
        self.served_model = model
        self.model = recorded_name(model)
        self.concurrency = max_concurrency * len(self.endpoints)
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.patience = patience
        self._accepted = (model, self.model, *accept_models)
        self._secrets = [secret for endpoint in self.endpoints for secret in endpoint.secrets]
        self._pool: Pool | None = None
        self._any_reply = False
        self._bad_requests = 0
        self._rng = random.Random()
        AdaptiveLimiter(max_concurrency)  # raises for a bad value before anything is sent

    async def check(self) -> None:
        """Raise `EndpointError` where an endpoint is out of reach, refuses the key or lacks the model; for nothing."""
        await asyncio.gather(*(self._check(lane) for lane in self._open().lanes))

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """The reply of the first free endpoint, after as many attempts as it takes. See `Generator.reply`."""
        attempts = wrong_models = failures = 0
        while True:
            error = await self._attempt(request)
            if isinstance(error, Reply):
                return error
            await notify(error.fault)
            kind = error.fault.kind
            failures += 1
            attempts += kind not in _NOT_ITS_FAULT
            wrong_models += kind == "wrong_model"
            if wrong_models >= _WRONG_MODELS and not self._any_reply:
                raise EndpointError(
                    f"The endpoint answers with another model than {self.model!r}. Set `model` to the one it serves, "
                    "or name it in `accept_models`."
                )
            if attempts >= self.max_attempts:
                raise NoReplyError(kind, f"No reply to request {request.key} in {attempts} attempts: {kind}.")
            # The endpoint waits for what it asked for as a whole; a little spread keeps the rest from one burst.
            wait = self._rng.uniform(0, 0.1 * error.wait) if error.wait else backoff(failures, self._rng)
            if kind not in AWAY:
                await self._open().sleep(wait)

    def drain(self) -> None:
        """Send nothing more: waiting requests raise `RunStopped`, replies on their way still arrive."""
        if self._pool is not None:
            self._pool.stop(RunStopped("The run is stopping."))

    async def close(self) -> None:
        """Close the connections; the next request opens new ones, on any event loop."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.gather(*(lane.client.close() for lane in pool.lanes))

    async def _attempt(self, request: Request) -> Reply | AttemptError:
        """One attempt. Raises `GenerationError` or `RunStopped` where another would not help."""
        pool = self._open()
        lane, ticket = await pool.slot()
        try:
            reply = await self._send(lane, request)
        except AttemptError as error:
            pool.failed(lane, ticket, error)
            return error
        except BaseException:
            pool.left(lane, ticket)
            raise
        self._any_reply = True
        pool.replied(lane, ticket)
        return reply

    async def _send(self, lane: Lane, request: Request) -> Reply:
        openai = require("openai")
        body = body_of(request, self.served_model)
        try:
            content = await asyncio.wait_for(_post(lane, body), self.timeout)
        except openai.APIStatusError as error:
            meaning = read_status(error.status_code, error.response.headers, error.body)
            raise self._refused(lane, request, meaning) from None
        except asyncio.TimeoutError:
            raise AttemptError(most(request, "timeout")) from None
        except openai.APIConnectionError as error:
            raise AttemptError(_connection_fault(error, request)) from None
        return read_reply(content, request, self._accepted)

    def _refused(self, lane: Lane, request: Request, meaning: AttemptError | Refusal) -> Exception:
        if isinstance(meaning, AttemptError):
            return meaning
        if meaning.kind in _MEANING:
            return self._run_error(lane, meaning)
        told = redact(meaning.message, self._secrets)
        if meaning.kind == "bad_request" and not self._any_reply:
            self._bad_requests += 1
            if self._bad_requests >= _BAD_REQUESTS:
                return EndpointError(f"{lane.name} refuses every request. It says: {told}")
        return GenerationError(meaning.kind, f"{lane.name} refuses request {request.key}: {told}")

    def _run_error(self, lane: Lane, meaning: Refusal, served: str = "") -> EndpointError:
        told = redact(meaning.message, self._secrets)
        return EndpointError(f"{lane.name}: {_MEANING[meaning.kind]}. It says: {told}.{served}")

    async def _check(self, lane: Lane) -> None:
        listed = await self._ask_freely(lane, lane.client.models.with_raw_response.list(timeout=_CHECK_SECONDS))
        if isinstance(listed, Refusal) and listed.kind == "key":
            raise self._run_error(lane, listed)
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [str(entry["id"]) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
        if self.served_model in names:
            return
        # No such route, or another list: a request without messages is refused, for nothing, and tells as much.
        body = {"model": self.served_model, "messages": []}
        probe = await self._ask_freely(lane, _post(lane, body, timeout=_CHECK_SECONDS))
        if isinstance(probe, Refusal) and probe.kind == "bad_request" and self.served_model in probe.message:
            probe = Refusal("not_found", probe.message)  # some servers say 400 for an unknown model
        if isinstance(probe, Refusal) and probe.kind in _MEANING:
            raise self._run_error(lane, probe, f" It serves: {', '.join(names[:10])}." if names else "")
        if names:
            logger.warning("%s does not list the model %r.", lane.name, self.model)

    async def _ask_freely(self, lane: Lane, call: Awaitable[Any]) -> Any:
        """What a call that costs nothing is answered: JSON, a `Refusal`, or None where that says nothing."""
        openai = require("openai")
        try:
            answer = await call
            return json.loads(answer if isinstance(answer, bytes) else answer.content)
        except openai.APIStatusError as error:
            meaning = read_status(error.status_code, error.response.headers, error.body)
            return meaning if isinstance(meaning, Refusal) else None
        except openai.APIConnectionError as error:
            cause = redact(str(error.__cause__ or error), self._secrets)
            message = f"{lane.name} cannot be reached: {cause}. Is the server running, and the URL right?"
            raise EndpointError(message) from None
        except ValueError:
            return None

    def _open(self) -> Pool:
        """The pool of this event loop, opened at the first use."""
        if self._pool is None:
            openai = require("openai")
            lanes = []
            for endpoint in self.endpoints:
                headers = {"Authorization": f"Basic {endpoint.login}"} if endpoint.login else {}
                client = openai.AsyncOpenAI(
                    base_url=endpoint.name,
                    api_key=endpoint.api_key or "none",
                    default_headers=headers,
                    timeout=openai.Timeout(self.timeout, connect=_CONNECT_SECONDS),
                    max_retries=0,  # retries are counted and paced here
                )
                lanes.append(Lane(endpoint.name, client, AdaptiveLimiter(self.max_concurrency)))
            self._pool = Pool(lanes, patience=self.patience)
        return self._pool


async def _post(lane: Lane, body: dict[str, Any], **options: Any) -> bytes:
    """Send a chat completion; the body of the answer as it came."""
    rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
    response = await lane.client.chat.completions.with_raw_response.create(
        model=body["model"], messages=body["messages"], extra_body=rest, **options
    )
    return bytes(response.content)


def _connection_fault(error: Exception, request: Request) -> Fault:
    """What a lost connection may have cost: nothing where the request never left."""
    cause = type(error.__cause__).__name__
    if cause in _NOT_SENT:
        return Fault("unreachable")
    return most(request, "timeout" if "Timeout" in cause else "reset")
