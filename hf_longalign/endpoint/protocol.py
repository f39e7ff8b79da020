"""What every generator speaks: a request, a reply, the faults between them, and the protocol."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from hf_longalign.text import clean


CONTENT_FILTER = "content_filter"
TOO_LONG = "too_long"
BAD_REQUEST = "bad_request"


class _NamedError(RuntimeError):
    def __init__(self, kind: str, message: str, told: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.told = told or message


class GenerationError(_NamedError):
    """This request will never get a usable reply; the run goes on without it.

    `kind` is "content_filter" (the endpoint refused the prompt or cut the reply; it is not asked again), "too_long"
    (prompt and reply exceed the model's range) or "bad_request". `told` is what the server said, without its address.
    """


class NoReplyError(_NamedError):
    """This request got no reply after every attempt, the last ended by `kind`; a later run will ask it again."""


class RunStopped(RuntimeError):  # noqa: N818 - a budget that is spent is no error
    """The whole run cannot go on: what was paid for is in the journal, and a rerun continues."""


class EndpointError(RunStopped):
    """The endpoint is unreachable, gone, refuses the key or an option, or does not serve the model."""


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. `temperature`, `top_p` and `seed` are not sent where they are None: models refuse them.

    `extra` goes into the request body as it is, such as `{"chat_template_kwargs": {"enable_thinking": False}}`;
    `max_completion_tokens` there replaces `max_tokens`. `draw` numbers the replies to one prompt where no seed does.

    >>> Sampling(temperature=1).temperature
    1.0
    """

    temperature: float | None = 0.8
    top_p: float | None = 1.0
    max_tokens: int = 4096
    seed: int | None = 0
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    draw: int = 0

    def __post_init__(self) -> None:
        # 1 and 1.0 are one temperature and must give one key.
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"`temperature` must be at least 0, got {self.temperature!r}. Set 0 for greedy replies.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p!r}. Set 1.0 to keep every token.")
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {self.max_tokens!r}. Set it to a reply's length.")

    def again(self, number: int) -> "Sampling":
        """The sampling of one more reply to the same prompt, the `number`-th after the first.

        >>> Sampling(seed=5).again(2).seed, Sampling(seed=None).again(2).draw
        (7, 2)
        """
        return replace(self, draw=number) if self.seed is None else replace(self, seed=self.seed + number)

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them (`dataclasses.asdict` copies deeply: that would be most of a key's cost)."""
        fields = {**vars(self), "extra": dict(self.extra)}
        if not self.draw:
            # Journals from before there was a `draw` keep their keys.
            del fields["draw"]
        return fields

    @property
    def token_limit(self) -> int:
        """The most tokens one reply may have."""
        return int(self.extra.get("max_completion_tokens", self.max_tokens))


@dataclass(frozen=True)
class Request:
    """One call to a model.

    `messages` are (role, content) pairs. `model` is the name that is recorded and keyed: never a local path (see
    `Generator.model`). `purpose` (context, outline, section, facts, judge, closed_book, pair …) is for counting alone.
    `chat=False` has the content of the only message continued as it is, without a chat template.

    >>> ask = Request((("user", "Hi"),), "tiny", Sampling(seed=1))
    >>> len(ask.key), ask.key == Request((("user", "Hi"),), "tiny", Sampling(seed=2)).key
    (32, False)
    """

    messages: tuple[tuple[str, str], ...]
    model: str
    sampling: Sampling = field(default_factory=Sampling)
    purpose: str = "context"
    chat: bool = True

    @cached_property
    def key(self) -> str:
        """32 hex digits (blake2b) over everything that shapes the reply: messages, model, sampling with its seed."""
        # `purpose` is left out: the same prompt for another purpose has the same reply.
        shaped_by = [self.messages, self.model, self.sampling.as_dict(), *([] if self.chat else ["no template"])]
        text = json.dumps(shaped_by, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def most_prompt_tokens(self) -> int:
        """No fewer tokens than the prompt has: a byte-level tokenizer makes at most one of each byte.

        64 tokens are for what a chat template adds by itself, 8 more for each message.
        """
        return 64 + sum(8 + len(role) + len(content.encode("utf-8", "replace")) for role, content in self.messages)


@dataclass(frozen=True)
class Reply:
    """What came back.

    `model` is the name the server gave; `finish_reason` "length" is a reply cut off. With `confirmed=False` the server
    did not say what was used, and the tokens are the most it can be. `cached_tokens` are those of the prompt that it
    did not compute anew, as far as it says.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str
    cached_tokens: int = field(default=0, compare=False)
    confirmed: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        # Here, where every reply enters: neither the journal nor a data set can hold half characters.
        for name in ("text", "model"):
            object.__setattr__(self, name, clean(getattr(self, name)))


@dataclass(frozen=True)
class Fault:
    """One attempt that gave no reply. `kind` is the name to count by.

    Tokens are what the fault cost; with `confirmed=False` nobody said what was billed, and they are the most it can
    be (a time-out, a reset, a body cut short).
    """

    kind: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    confirmed: bool = True


Notify = Callable[[Fault], Awaitable[None]]


async def ignore(fault: Fault) -> None:
    """Notify nobody of a fault."""


def settle(awaited: "asyncio.Future[Reply]", outcome: Reply | BaseException) -> None:
    """Hand over what became of a request, if anybody still waits for it."""
    if awaited.done():
        return
    if isinstance(outcome, Reply):
        awaited.set_result(outcome)
    else:
        awaited.set_exception(outcome)


class Generator(Protocol):
    """Turns requests into replies.

    `model` is the name to put into `Request.model`; it holds no local path. `concurrency` is the number of requests
    worth having under way at once.
    """

    model: str
    concurrency: int

    async def check(self) -> None:
        """Raise `EndpointError` where no reply could ever come; costs nothing."""

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """Return the reply, after as many attempts as it takes; `notify` is awaited for each that failed.

        Raises `GenerationError`, `NoReplyError` or `RunStopped`.
        """

    def drain(self) -> None:
        """Send nothing more: requests not yet sent raise `RunStopped`, replies on their way still arrive."""

    async def close(self) -> None:
        """Free connections, threads and memory."""


class SwitchGenerator:
    """Sends every request to the generator of its model, such as one that writes and another that judges.

    The first gives the switch its name. Raises a ValueError where two have the same model.
    """

    def __init__(self, generators: Sequence[Generator]):
        self._generators = {generator.model: generator for generator in generators}
        if len(self._generators) < len(generators):
            names = ", ".join(generator.model for generator in generators)
            raise ValueError(f"`judge` must have another model than `generator`, got {names}. Leave `judge` out.")
        self.model = generators[0].model
        # The sum, so that the one that writes is never kept waiting by the one that judges.
        self.concurrency = sum(generator.concurrency for generator in generators)
        self.places = frozenset(place for one in generators for place in getattr(one, "places", ()))

    def bind(self, ledger: Any) -> None:
        """Hand a run's ledger to those that ask in batches."""
        for generator in self._generators.values():
            if hasattr(generator, "bind"):
                generator.bind(ledger)

    def price_share(self, request: Request) -> float | None:
        """Return at which share of the price a request is asked in a batch; `None` where it is asked by itself."""
        generator = self._generators[request.model]
        share: float | None = generator.price_share(request) if hasattr(generator, "price_share") else None
        return share

    async def check(self) -> None:
        """Check every generator."""
        await asyncio.gather(*(generator.check() for generator in self._generators.values()))

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """Return the reply of the request's model."""
        return await self._generators[request.model].reply(request, notify)

    def drain(self) -> None:
        """Send nothing more."""
        for generator in self._generators.values():
            generator.drain()

    async def close(self) -> None:
        """Free what the generators hold."""
        await asyncio.gather(*(generator.close() for generator in self._generators.values()))
