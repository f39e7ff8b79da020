"""Asking until a reply can be read, within one allowance of retries for a seed."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from hf_longalign.endpoint.protocol import GenerationError, Reply, Request, Sampling
from hf_longalign.synthesis.prompts import Messages
from hf_longalign.synthesis.replies import ReplyError
from hf_longalign.text import clean, digest


T = TypeVar("T")
Ask = Callable[[Request], Awaitable[Reply]]


class Count(Protocol):
    """Counts "retried" and "rejected" seeds, "usable" and "unusable" replies, the latter with reason and key."""

    def __call__(self, kind: str, reason: str = "", key: str = "") -> None:
        """Count one."""


def ignore_count(kind: str, reason: str = "", key: str = "") -> None:
    """Count nothing."""


class GiveUpError(Exception):
    """No usable context, and no retry left; the message is the reason."""


@dataclass
class Dialogue:
    """The requests made for one seed: their keys, the last one of its own, and how many retries they have used."""

    ask: Ask
    model: str
    sampling: Sampling
    retries: int
    used: int = 0
    keys: list[str] = field(default_factory=list)
    last: str = ""
    prompt_hash: str = ""
    count: Count = ignore_count

    async def get(
        self, purpose: str, prompt: Callable[[str | None], Messages], read: Callable[[str], T], reason: str | None
    ) -> tuple[T, str | None]:
        """Ask until the reply can be read; returns what was read and the finish reason.

        Raises:
            GiveUpError: no retry is left, or the generator will never reply.
        """
        while True:
            messages = prompt(reason)
            # Another seed: the same prompt twice would otherwise get the journal's reply, the one that failed.
            request = Request(messages, self.model, self.sampling.again(self.used), purpose)
            try:
                reply = await self.ask(request)
            except GenerationError as error:
                self.count("unusable", error.kind, request.key)
                raise GiveUpError(f"{error.kind}: {clean(error.told)}") from None
            self.keys.append(request.key)
            self.last = request.key
            self.prompt_hash = digest(*(part for message in messages for part in message))
            try:
                return read(reply.text), reply.finish_reason
            except ReplyError as error:
                cut = f"it was cut off at the limit of {self.sampling.token_limit} tokens; be shorter: "
                reason = f"parse: {cut if reply.finish_reason == 'length' else ''}{error}"
                self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Count the last reply as unusable and use up a retry.

        Raises:
            GiveUpError: none is left.
        """
        self.count("unusable", reason, self.last)
        self.retry(reason)

    def retry(self, reason: str) -> None:
        """Use up a retry.

        Raises:
            GiveUpError: none is left.
        """
        if self.used >= self.retries:
            raise GiveUpError(reason)
        self.used += 1
        self.count("retried")
