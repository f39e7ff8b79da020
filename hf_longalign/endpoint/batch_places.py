"""Where batches are sent: a hosted Batch API, or a command such as `vllm run-batch` on this machine."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_longalign.endpoint.address import Endpoint, redact
from hf_longalign.endpoint.protocol import EndpointError
from hf_longalign.lazy import require
from hf_longalign.text import digest


# The field of a batch's metadata by which it is found again.
_TAG = "hf_longalign"
_ENDED = frozenset(("completed", "failed", "expired", "cancelled"))
_ATTEMPTS = 5


@dataclass(frozen=True)
class Result:
    """What came back for one request: a status with the body of an answer, or the code of an error without one."""

    status: int
    body: bytes = b""
    code: str = ""


class BatchRefusedError(EndpointError):
    """A batch was refused as a whole, for nothing."""


class HostedBatches:
    """A hosted Batch API: files and batches as https://platform.openai.com/docs/guides/batch describes them.

    Parameters:
        endpoint: the base URL; without a path it gets /v1.
        api_key_env: the environment variable with the key.
        poll_seconds: seconds between two looks at a batch.

    >>> HostedBatches("https://api.example.com").place
    'https://api.example.com/v1'
    """

    price_share = 0.5

    def __init__(
        self,
        endpoint: str | Endpoint,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        poll_seconds: float = 30.0,
    ) -> None:
        self._endpoint = Endpoint.with_key_of(endpoint, api_key_env)
        self.place = self._endpoint.name
        self.poll_seconds = poll_seconds
        self._variable = api_key_env
        self._opened: Any = None

    async def check(self) -> None:
        """Ask for the list of batches, which costs nothing."""
        await self._call(lambda client: client.batches.list(limit=1))

    async def send(self, tag: str, lines: bytes) -> str:
        """Upload a file of requests, one JSON object a line, and return the name of its batch. Sends none twice."""
        file = await self._call(lambda client: client.files.create(file=(f"{tag}.jsonl", lines), purpose="batch"))
        first = json.loads(lines.split(b"\n", 1)[0])
        tried = False

        async def create(client: Any) -> Any:
            nonlocal tried
            # An answer that was lost on its way leaves a batch behind: look before another one is paid for.
            name = await self._look(client, tag) if tried else None
            tried = True
            if name is None:
                # No API offers another window than a day.
                options = {"completion_window": "24h", "metadata": {_TAG: tag}}
                name = (await client.batches.create(input_file_id=file.id, endpoint=first["url"], **options)).id
            return name

        return str(await self._call(create))

    async def find(self, tag: str) -> str | None:
        """Look through the batches of the account for the one with this tag."""
        name: str | None = await self._call(lambda client: self._look(client, tag))
        return name

    async def results(self, name: str) -> dict[str, Result]:
        """Wait for the end and return what came back, by `custom_id`; what did not is absent.

        Raises `BatchRefusedError`, or `EndpointError` where the other side is away.
        """
        while True:
            batch = await self._call(lambda client: client.batches.retrieve(name))
            if batch.status in _ENDED:
                break
            await asyncio.sleep(self.poll_seconds)
        counts = batch.request_counts
        wanted = (counts.completed + counts.failed) if counts else 0
        results: dict[str, Result] = {}
        for _ in range(_ATTEMPTS):
            for file in filter(None, (batch.error_file_id, batch.output_file_id)):
                content = await self._call(lambda client, file=file: client.files.content(file))
                results.update(read_results(content.content.splitlines()))
            # A download that was cut short must not be paid for a second time.
            if len(results) >= wanted:
                break
            await asyncio.sleep(self.poll_seconds)
        if batch.status == "failed" and not results:
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            told = "; ".join(filter(None, (error.message for error in errors))) or "it failed without a word"
            raise BatchRefusedError(
                f"{self.place} refuses the batch. It says: {redact(told, self._endpoint.secrets)}."
            )
        return results

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        client, self._opened = self._opened, None
        if client is not None:
            await client.close()

    async def _look(self, client: Any, tag: str) -> str | None:
        async for batch in client.batches.list(limit=100):
            if (batch.metadata or {}).get(_TAG) == tag:
                return str(batch.id)
        return None

    async def _call(self, call: Any) -> Any:
        """Do one thing, again while the other side is away or busy; all of them may be done twice."""
        openai = require("openai", "endpoint")
        self._opened = self._opened or self._endpoint.client()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await call(self._opened)
            except openai.APIStatusError as error:
                told = redact(error.message, self._endpoint.secrets)
                if error.status_code in (401, 403):
                    remedy = f"Set the key in the environment variable {self._variable}"
                    raise EndpointError(f"{self.place}: the key is refused. {remedy}. It says: {told}") from None
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    remedy = "Is it a Batch API? `OpenAIGenerator` asks servers that have none"
                    raise EndpointError(f"{self.place} refuses a batch. {remedy}. It says: {told}") from None
            except openai.APIConnectionError as error:
                told = redact(str(error.__cause__ or error), self._endpoint.secrets)
            if attempt < _ATTEMPTS:
                await asyncio.sleep(min(self.poll_seconds, 2.0**attempt))
        raise EndpointError(f"{self.place} cannot be used: {told}. Run again once it is back; nothing is lost.")


class CommandBatches:
    """A command that answers a file of requests with a file of results, such as `vllm run-batch`.

    Parameters:
        command: the command and its arguments, with `{input}` and `{output}` where the files go.
        folder: where the files are kept; a run that was killed finds its own again.

    >>> command = ["vllm", "run-batch", "-i", "{input}", "-o", "{output}", "--model", "Qwen/Qwen2.5-7B-Instruct"]
    >>> CommandBatches(command, "outputs/batches").place
    'the command vllm, cc73f30d'
    """

    price_share = 1.0

    def __init__(self, command: Sequence[str], folder: str | Path) -> None:
        for part in ("{input}", "{output}"):
            if not any(part in word for word in command):
                raise ValueError(f"`command` must name where {part} goes, got {list(command)!r}. Add it.")
        self.command = list(command)
        self.folder = Path(folder)
        self.place = f"the command {Path(command[0]).name}, {digest(str(folder))[:8]}"
        self._one_at_a_time = asyncio.Lock()

    async def check(self) -> None:
        """Look for the command."""
        if shutil.which(self.command[0]) is None:
            raise EndpointError(f"The command `{self.command[0]}` is not there. Install it, or name its whole path.")

    async def send(self, tag: str, lines: bytes) -> str:
        """Write the file of requests; `results` runs the command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{tag}.part"
        unfinished.write_bytes(lines)
        os.replace(unfinished, self.folder / f"{tag}.jsonl")
        return tag

    async def find(self, tag: str) -> str | None:
        """Return the tag where its file was written."""
        return tag if (self.folder / f"{tag}.jsonl").exists() else None

    async def results(self, name: str) -> dict[str, Result]:
        """Run the command, unless its results are there already."""
        output = self.folder / f"{name}.results.jsonl"
        async with self._one_at_a_time:  # two models do not fit one GPU
            if not output.exists():
                unfinished = self.folder / f"{name}.{os.getpid()}.part"
                files = {"{input}": str(self.folder / f"{name}.jsonl"), "{output}": str(unfinished)}
                words = self.command
                for mark, file in files.items():
                    words = [word.replace(mark, file) for word in words]
                status = await self._run(words)
                if status or not unfinished.exists():
                    raise BatchRefusedError(
                        f"`{self.command[0]}` ended with status {status} and without results. See its own words above."
                    )
                os.replace(unfinished, output)
        return read_results(output.read_bytes().splitlines())

    async def close(self) -> None:
        """Forget the lock, which belongs to the event loop that used it."""
        self._one_at_a_time = asyncio.Lock()

    async def _run(self, words: Sequence[str]) -> int:
        # In a group of its own: Ctrl-C reaches this process, which ends the command in order.
        process = await asyncio.create_subprocess_exec(*words, start_new_session=True)
        try:
            return await process.wait()
        except asyncio.CancelledError:  # the run stops, and the accelerator must be free
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.wait()
            raise


def read_results(lines: Iterable[bytes]) -> dict[str, Result]:
    """Read the lines of a file of results, in any order; of two for one request an answer stays, and the first.

    >>> line = b'{"custom_id": "a", "response": {"status_code": 200, "body": {"id": 1}}, "error": null}'
    >>> read_results([line, b"half a li"])
    {'a': Result(status=200, body=b'{"id": 1}', code='')}
    """
    results: dict[str, Result] = {}
    for line in lines:
        try:
            read = json.loads(line)
            key, response, error = str(read["custom_id"]), read.get("response") or {}, read.get("error") or {}
            body = response.get("body")
            found = Result(
                int(response.get("status_code") or 0),
                json.dumps(body).encode() if body is not None else json.dumps({"error": error}).encode(),
                str(error.get("code") or ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # cut short, or no line of results
        if key not in results or (results[key].status != 200 and found.status == 200):
            results[key] = found
    return results
