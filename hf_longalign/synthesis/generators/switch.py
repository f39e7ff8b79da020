"""Several models behind one generator: each request goes to the one whose name it bears."""

import asyncio
from collections.abc import Sequence

from hf_longalign.synthesis.generators.base import EndpointError, Generator, Notify, Reply, Request, ignore


class SwitchGenerator:
    """Sends every request to the generator of its model, such as one that writes and another that judges.

    Args:
        generators: the first gives the switch its name; no two may have the same model.

    Raises:
        ValueError: two generators have one model's name, so a request cannot tell them apart.
    """

    def __init__(self, generators: Sequence[Generator]):
        self._generators = {generator.model: generator for generator in generators}
        if len(self._generators) < len(generators):
            names = ", ".join(generator.model for generator in generators)
            raise ValueError(f"`judge` must have another model than `generator`, got {names}. Leave `judge` out.")
        self.model = generators[0].model
        self.remote = all(generator.remote for generator in generators)
        self.concurrency = sum(generator.concurrency for generator in generators)

    async def check(self) -> None:
        """Check every generator."""
        await asyncio.gather(*(generator.check() for generator in self._generators.values()))

    async def reply(self, request: Request, notify: Notify = ignore) -> Reply:
        """Return the reply of the request's model."""
        generator = self._generators.get(request.model)
        if generator is None:
            raise EndpointError(f"No generator has the model {request.model!r}.")
        return await generator.reply(request, notify)

    def drain(self) -> None:
        """Send nothing more."""
        for generator in self._generators.values():
            generator.drain()

    async def close(self) -> None:
        """Free what the generators hold."""
        await asyncio.gather(*(generator.close() for generator in self._generators.values()))
