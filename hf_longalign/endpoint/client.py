"""The client of OpenAI-compatible endpoints: vLLM, SGLang, TGI, `transformers serve`, hosted ones; several at once."""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Collection, Sequence
from typing import Any

from hf_longalign.endpoint.address import Endpoint, recorded_name, redact
from hf_longalign.endpoint.pacing import AdaptiveLimiter, Lane, Pool, backoff
from hf_longalign.endpoint.protocol import (
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
from hf_longalign.endpoint.wire import (
    AWAY,
    AttemptError,
    Refusal,
    body_of,
    habit_for,
    most,
    read_reply,
    read_status,
)
from hf_longalign.lazy import require


logger = logging.getLogger(__name__)

# The server is busy or away, and the request is none the worse for it: not one of its attempts.
_NOT_ITS_FAULT = {AWAY, "rate_limit", "overloaded"}
_WRONG_MODELS = 3
_CHECK_SECONDS = 20.0
_CONNECT_SECONDS = 10.0
# Errors of the connection that end an attempt before the request was sent (httpx and httpx2 name them alike).
_NOT_SENT = frozenset(("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"))
# What a refusal of every request means, and what to set.
_MEANING = {
    "key": "the key is refused. Set it in the environment variable {variable}",
    "quota": "the account has no quota left. Top it up and run again",
    "not_found": "no such model or route. Set `model` to one it serves, and the URL to its base (mostly …/v1)",
    "option": "the option `{option}` is refused. {remedy}",
}
_LEFT_OUT = "Set `{}: null` in the YAML (None in Python) to leave it out"
_OPTION_REMEDIES = {
    "temperature": _LEFT_OUT.format("temperature"),
    "top_p": _LEFT_OUT.format("top_p"),
    "seed": _LEFT_OUT.format("sampling_seed"),
    "max_tokens": "Set a smaller `max_tokens`",
    "max_completion_tokens": "Set a smaller `max_tokens`",
}
_REQUEST_REMEDIES = {
    "too_long": "Ask for less (`max_tokens`, shorter texts), or serve the model with a longer context (vLLM: "
    "`--max-model-len`).",
    "bad_request": "If it meets every request, change what it names; if a few, they are left out.",
}


class OpenAIGenerator:
    """Asks one or several endpoints that serve the same model, each with an adaptive number of requests at once.

    A server that takes only `max_completion_tokens`, or only streams, is asked that way once it has said so.

    Parameters:
        model: the name the endpoints serve. A local path is recorded by its last part and a hash of the whole.
        endpoints: base URLs or `Endpoint`s; a URL without a path gets /v1.
        api_key_env: the environment variable with the key. Without the variable no key is sent.
        max_concurrency: the most requests at once to one endpoint.
        timeout: seconds for one attempt.
        max_attempts: attempts at one request; waiting for a busy or absent server is none.
        patience: seconds without any answer after which the run stops.
        accept_models: other names under which the endpoints may answer.

    Raises:
        ValueError: a URL or a number that is none.

    Example (no request is sent):

    >>> generator = OpenAIGenerator("tiny", ["http://localhost:8000", "http://localhost:8001"], max_concurrency=32)
    >>> generator.model, generator.concurrency
    ('tiny', 64)
    """

    option_remedies = _OPTION_REMEDIES

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
        self.endpoints = [Endpoint.with_key_of(endpoint, api_key_env) for endpoint in endpoints]
        AdaptiveLimiter(max_concurrency)  # raises for a bad value before anything is sent
        self.served_model = model
        self.model = recorded_name(model)
        self.concurrency = max_concurrency * len(self.endpoints)
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.patience = patience
        self._key_variable = api_key_env
        self._accepted = (model, self.model, *accept_models)
        self._secrets = [secret for endpoint in self.endpoints for secret in endpoint.secrets]
        # Kept when connections are closed: what an endpoint refused once, it would refuse again.
        self._habits: dict[str, set[str]] = {endpoint.name: set() for endpoint in self.endpoints}
        self._told: set[str] = set()
        self._pool: Pool | None = None
        self._any_reply = False
        self._rng = random.Random()

    async def check(self) -> None:
        """Raise `EndpointError` where an endpoint is out of reach, refuses the key or lacks the model; for nothing."""
        await asyncio.gather(*(self._check(lane) for lane in self._open().lanes))

    async def listing(self) -> dict[str, Any]:
        """What the first endpoint's list of models says about the model; empty where it says nothing."""
        entries, _ = await self._list(self._open().lanes[0])
        return next((entry for entry in entries if entry.get("id") == self.served_model), {})

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """The reply of the first free endpoint, after as many attempts as it takes. See `Generator.reply`."""
        attempts = wrong_models = failures = 0
        while True:
            try:
                async with self._open().slot() as lane:
                    reply = await self._send(lane, request)
                self._any_reply = True
                return reply
            except AttemptError as failure:
                error = failure
            kind = error.fault.kind
            failures += 1
            attempts += kind not in _NOT_ITS_FAULT
            # An empty reply, paid for and the best there is: better than asking for it in every later run.
            if attempts >= self.max_attempts and error.reply is not None:
                return error.reply
            await notify(error.fault)
            told = redact(str(error), self._secrets)
            wrong_models += kind == "wrong_model"
            if wrong_models >= _WRONG_MODELS and not self._any_reply:
                raise EndpointError(
                    f"The endpoint answers with another model than {self.model!r}: {told}. Set `model` to the one it "
                    "serves, or name it in `accept_models`."
                )
            if attempts >= self.max_attempts:
                message = f"No reply to request {request.key} in {attempts} attempts, the last: {told}."
                raise NoReplyError(kind, message)
            # The endpoint waits for what it asked for as a whole; a little spread keeps the rest from one burst.
            wait = self._rng.uniform(0, 0.1 * error.wait) if error.wait else backoff(failures, self._rng)
            # Where the endpoint is away its lane waits already; another lane may be free.
            if kind != AWAY:
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

    async def _send(self, lane: Lane, request: Request) -> Reply:
        """One attempt. Raises `AttemptError`, or another error where a further attempt would not help."""
        while True:
            body = body_of(request, self.served_model, lane.habits)
            try:
                # Over the whole attempt: the client's own time-out begins anew with every byte, and a stream can drip
                # for ever.
                content = await asyncio.wait_for(_post(lane, body, chat=request.chat), self.timeout)
                return read_reply(content, request, self._accepted)
            except asyncio.TimeoutError:
                raise AttemptError(most(request, "timeout"), f"nothing in {self.timeout:g} s") from None
            except ConnectionError as error:
                # What never left costs nothing; what may have arrived counts as the most it can have cost.
                sent = str(error) not in _NOT_SENT
                kind = "timeout" if "Timeout" in str(error) else "reset"
                raise AttemptError(most(request, kind) if sent else Fault(AWAY), str(error)) from None
            except Refusal as refusal:
                habit = habit_for(refusal, body)
                told = redact(refusal.told, self._secrets)
                if habit is None and refusal.kind in _MEANING:
                    raise self._run_error(lane, refusal) from None
                if habit is None:
                    remedy = _REQUEST_REMEDIES.get(refusal.kind)
                    if remedy and refusal.kind not in self._told:
                        self._told.add(refusal.kind)
                        logger.warning("%s refuses a request: %s. %s", lane.name, told, remedy)
                    message = f"{lane.name} refuses request {request.key}: {told}"
                    raise GenerationError(refusal.kind, message, told) from None
                # Many requests under way meet the same refusal: it is told once.
                if habit not in lane.habits:
                    logger.warning("%s: asked with %r from now on. It says: %s", lane.name, habit, told)
                lane.habits.add(habit)

    def _run_error(self, lane: Lane, refusal: Refusal, more: str = "") -> EndpointError:
        remedy = self.option_remedies.get(refusal.option, f"Take `{refusal.option}` out of `extra_body`")
        meaning = _MEANING[refusal.kind].format(variable=self._key_variable, option=refusal.option, remedy=remedy)
        return EndpointError(f"{lane.name}: {meaning}. It says: {redact(refusal.told, self._secrets)}.{more}")

    async def _check(self, lane: Lane) -> None:
        entries, answer = await self._list(lane)
        if isinstance(answer, Refusal) and answer.kind == "key":
            raise self._run_error(lane, answer)
        names = [str(entry["id"]) for entry in entries if "id" in entry]
        # Most servers list what they serve, and nothing more needs to be asked.
        if self.served_model in names:
            return
        # No such route, or another list: a request without messages is refused, for nothing, and tells as much.
        body = {"model": self.served_model, "messages": []}
        probe = await self._ask_freely(lane, _post(lane, body, chat=True, timeout=_CHECK_SECONDS))
        if isinstance(probe, Refusal) and probe.kind == "bad_request" and self.served_model in probe.told:
            probe = Refusal("not_found", probe.told)  # some servers say 400 for an unknown model
        if isinstance(probe, Refusal) and probe.kind in ("key", "quota", "not_found"):
            raise self._run_error(lane, probe, f" It serves: {', '.join(names[:10])}." if names else "")
        if probe is None:
            raise EndpointError(
                f"{lane.name} answers with a page for browsers or the like, not with JSON. Set the URL to the base of "
                "an OpenAI-compatible server (mostly …/v1)."
            )
        if names:
            logger.warning("%s does not list the model %r.", lane.name, self.model)

    async def _list(self, lane: Lane) -> tuple[list[dict[str, Any]], Any]:
        """The entries of the endpoint's list of models, and what it answered."""
        call = _guarded(lane.client.models.with_raw_response.list(timeout=_CHECK_SECONDS))
        answer = await self._ask_freely(lane, call)
        entries = answer.get("data") if isinstance(answer, dict) else None
        return [entry for entry in entries or () if isinstance(entry, dict)], answer

    async def _ask_freely(self, lane: Lane, call: Awaitable[bytes]) -> Any:
        """What a call that costs nothing is answered: JSON, a `Refusal`, an `AttemptError`, or None for no JSON."""
        try:
            return json.loads(await call)
        except (Refusal, AttemptError) as meaning:
            return meaning
        except ConnectionError as error:
            cause = redact(str(error.__cause__), self._secrets)
            message = f"{lane.name} cannot be reached: {cause}. Is the server running, and the URL right?"
            raise EndpointError(message) from None
        except ValueError:
            return None

    def _open(self) -> Pool:
        """The pool of this event loop, opened at the first use."""
        if self._pool is None:
            timeout = require("openai", "endpoint").Timeout(self.timeout, connect=_CONNECT_SECONDS)
            lanes = []
            for endpoint in self.endpoints:
                limiter, habits = AdaptiveLimiter(self.max_concurrency), self._habits[endpoint.name]
                lanes.append(Lane(endpoint.name, endpoint.client(timeout=timeout), limiter, habits))
            self._pool = Pool(lanes, patience=self.patience)
        return self._pool


async def _post(lane: Lane, body: dict[str, Any], *, chat: bool, **options: Any) -> bytes:
    """Send a completion; the body of the answer as it came. Raises what `_guarded` raises."""
    rest = dict(body)
    first = {name: rest.pop(name) for name in ("model", "messages", "prompt") if name in rest}
    # `stream` goes into `extra_body` with the rest, so that the client reads a stream to its end like any other body.
    route = lane.client.chat.completions if chat else lane.client.completions
    return await _guarded(route.with_raw_response.create(**first, extra_body=rest, **options), body)


async def _guarded(call: Awaitable[Any], sent: Collection[str] = ()) -> bytes:
    """The body of an answer. Raises what `read_status` returns, or a `ConnectionError` named by its cause."""
    openai = require("openai", "endpoint")
    try:
        return bytes((await call).content)
    except openai.APIStatusError as error:
        raise read_status(error.status_code, error.response.headers, error.response.content, sent) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        raise ConnectionError(type(cause).__name__) from cause
