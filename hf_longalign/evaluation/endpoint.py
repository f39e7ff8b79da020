"""Greedy answers of a served model: vLLM, SGLang, TGI, `transformers serve` or any OpenAI-compatible endpoint."""

import asyncio
import base64
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.stats import GenerationStats


logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0


class EndpointError(RuntimeError):
    """An endpoint that gives no answer; the message says what to do."""


class EndpointGenerator:
    """Answers prompts greedily through an endpoint, several at once.

    Chat prompts go to `/chat/completions`, plain ones to `/completions`, with temperature 0. A busy or failing server
    is asked again, after the time it names or with growing pauses. A server that applies the penalties of a model's
    generation config must be told not to (vLLM: `--generation-config vllm`), or its answers are not plain greedy ones.

    Args:
        model: the name under which the model is served.
        base_url: such as http://localhost:8000/v1, which a URL without a path gets. A login in it is sent as HTTP
            basic authentication and shown nowhere.
        api_key_env: the environment variable that holds the key; without it none is sent.
        concurrency: requests at once.
        timeout: seconds for one answer.
        max_retries: how often a request is repeated.

    Attributes:
        stats: counts as the server tells them, and seconds, see [`GenerationStats`].

    Raises:
        ValueError: a URL or concurrency that is none.
        ImportError: `openai` is missing.

    Example:

    ```python
    generator = EndpointGenerator("Qwen/Qwen2.5-7B-Instruct", "http://localhost:8000")
    for prompt, completion in generator.generate(prompts):
        store.add(prompt.key, completion.text)
    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 1800.0,
        max_retries: int = 8,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError('`openai` is not installed. Run: pip install "hf_longalign[eval]"') from error
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"`concurrency` must be a positive integer, got {concurrency!r}. Set 16 if in doubt.")
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.stats = GenerationStats()
        self._key_variable = api_key_env
        self.url, login = _split_login(base_url)
        key = None if login else os.environ.get(api_key_env)
        self._secrets = [secret for secret in (key, login, *_login_parts(base_url)) if secret]
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "api_key": key or "none",
            "default_headers": {"Authorization": f"Basic {login}"} if login else {},
            "timeout": openai.Timeout(timeout, connect=_CONNECT_SECONDS),
            "max_retries": max_retries,
        }

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its answer as it arrives; those that share a beginning are sent one after another.

        Raises:
            EndpointError: a prompt gets no answer. Nothing more is sent, and the answers on their way are yielded
                first.
        """
        waiting = iter(sorted(prompts, key=lambda prompt: prompt.text))
        sent: dict[Future[Completion], Prompt] = {}
        failure: Exception | None = None
        start = time.perf_counter()
        with self._connected() as send:
            while True:
                room = 0 if failure else self.concurrency - len(sent)
                sent |= {send(prompt): prompt for prompt in islice(waiting, room)}
                if not sent:
                    break
                for future in wait(sent, return_when=FIRST_COMPLETED).done:
                    prompt, error = sent.pop(future), future.exception()
                    if error is not None:
                        failure = failure or self._explained(error, prompt)
                        continue
                    self.stats.seconds += time.perf_counter() - start
                    yield prompt, future.result()
                    start = time.perf_counter()
        if failure is not None:
            raise failure

    @contextmanager
    def _connected(self) -> Iterator[Callable[[Prompt], Future[Completion]]]:
        """A function that sends a prompt; what is still on its way in the end is given up."""
        import openai

        with _event_loop() as loop:
            client = openai.AsyncOpenAI(**self._options)
            try:
                yield lambda prompt: asyncio.run_coroutine_threadsafe(self._ask(client, prompt), loop)
            finally:
                asyncio.run_coroutine_threadsafe(_close(client), loop).result()

    async def _ask(self, client: Any, prompt: Prompt) -> Completion:
        settings: dict[str, Any] = {"model": self.model, "temperature": 0.0, "max_tokens": prompt.max_new_tokens}
        if prompt.stop:
            settings["stop"] = list(prompt.stop)
        if prompt.chat:
            messages = [{"role": "user", "content": prompt.text}]
            answer = await client.chat.completions.create(messages=messages, **settings)
            text = answer.choices[0].message.content
        else:
            answer = await client.completions.create(prompt=prompt.text, **settings)
            text = answer.choices[0].text
        if text is None:
            logger.warning("An answer of %s has no content: a filter or a reasoning parser took it.", self.url)
        usage = answer.usage
        return self._counted(Completion(_cut(text or "", prompt.stop), getattr(usage, "completion_tokens", 0)), usage)

    def _counted(self, completion: Completion, usage: Any) -> Completion:
        details = getattr(usage, "prompt_tokens_details", None)
        self.stats.prompt_tokens += getattr(usage, "prompt_tokens", 0)
        self.stats.cached_tokens += getattr(details, "cached_tokens", None) or 0
        self.stats.generated_tokens += completion.tokens
        return completion

    def _explained(self, error: BaseException, prompt: Prompt) -> Exception:
        """The error a reader can act on, without keys, logins or the prompt."""
        remedy = _remedy(error, self._key_variable, self.timeout)
        if remedy is None:
            return EndpointError(
                f"{self.url} does not answer with a completion ({type(error).__name__}). Set the URL to the base of "
                "an OpenAI-compatible server (mostly …/v1)."
            )
        told = str(error)
        for secret in self._secrets:
            told = told.replace(secret, "***")
        return EndpointError(
            f"{self.url} gives no answer to a prompt of {len(prompt.text):,} characters and {prompt.max_new_tokens} "
            f"new tokens: {remedy} Answers that arrived are kept. It says: {told[:500]}"
        )


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, so that the caller may have one running (notebooks do)."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _close(client: Any) -> None:
    """Give up what is still being asked, and the connections."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _remedy(error: BaseException, key_variable: str, timeout: float) -> str | None:
    """What to do about an error of the client; `None` for one that is not its."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"none came in {timeout:g} s. Raise `timeout` or lower `concurrency`."
    if isinstance(error, openai.APIConnectionError):
        return "it cannot be reached. Is the server running, and the URL right?"
    if not isinstance(error, openai.APIStatusError):
        return None
    if error.status_code in (401, 403):
        return f"the key is refused. Set the environment variable {key_variable}."
    if error.status_code == 404:
        return "no such model or route. Set the model to one it serves, and the URL to its base (mostly …/v1)."
    if error.status_code == 429 or error.status_code >= 500:
        return "it is overloaded or broken. Lower `concurrency`, look at its log, and run again."
    return "the request is refused. Serve the model with a longer context (vLLM: `--max-model-len`), or ask for less."


def _split_login(url: str) -> tuple[str, str | None]:
    """A base URL without its login, and the login as HTTP basic authentication sends it.

    >>> _split_login("http://me:pw@host:8000")
    ('http://host:8000/v1', 'bWU6cHc=')
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        raise ValueError(f"`base_url` must be a URL such as http://localhost:8000/v1, got {shown!r}. Set no query.")
    base = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/") or "/v1", "", ""))
    if not parts.username:
        return base, None
    return base, base64.b64encode(":".join(_login_parts(url)).encode()).decode()


def _login_parts(url: str) -> list[str]:
    parts = urlsplit(url)
    return [unquote(parts.username), unquote(parts.password or "")] if parts.username else []


def _cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop text, which some servers leave in.

    >>> _cut("42. And", (".", "!"))
    '42'
    """
    return text[: min((index for index in map(text.find, stop) if index >= 0), default=len(text))]
