"""Greedy answers of a served model, and what its server can be asked about its range."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from shlex import quote
from typing import Any

from hf_longalign.endpoint import Endpoint, EndpointError, GenerationError, OpenAIGenerator, Reply, Request, Sampling
from hf_longalign.endpoint.protocol import TOO_LONG
from hf_longalign.evaluation.haystack import noise
from hf_longalign.evaluation.prompt import Completion, Prompt, cut_at
from hf_longalign.known_answers import NEW_TOKENS, ledger
from hf_longalign.records.report import Speed
from hf_longalign.records.training import AnswersRecord


logger = logging.getLogger(__name__)

# Where lists of models say how many tokens a model takes: vLLM and SGLang, OpenRouter, Groq, LM Studio.
_RANGE_FIELDS = ("max_model_len", "context_length", "context_window", "max_context_length")
_SHORT_PROBE = 512
_PROBE_ANSWER = 32
# A server that reads fewer of the tokens that were sent has cut the prompt; chat templates differ by less.
_READ = 0.9


@dataclass(frozen=True)
class ServerFacts:
    """What a server tells, when it is asked, about the model that it serves."""

    reach: int | None  # tokens that it says it takes, prompt and answer; `None` where it does not say
    base: str | None  # the model behind the name it serves, as far as it says
    sent: int  # tokens of the longest prompt, as the local tokenizer counts them
    read: int  # tokens of it that the server counted; 0 where it does not say
    short: bool  # whether it finds a pass key at the beginning of a short text
    long: bool  # whether it finds one as far back as the longest prompt reaches

    def settings(self) -> dict[str, str]:
        """Return the facts for a reader of the report, by name.

        >>> facts = ServerFacts(None, None, sent=16000, read=16010, short=True, long=False).settings()
        >>> facts["pass key, 16,000 tokens back"]
        'not found, though found in 512 tokens: the range may not be served'
        """
        if self.long:
            found = "found"
        elif self.short:
            found = f"not found, though found in {_SHORT_PROBE} tokens: the range may not be served"
        else:
            found = f"not found, nor in {_SHORT_PROBE} tokens: this says nothing of the range"
        return {
            "range of the server": "not told" if self.reach is None else f"{self.reach:,} tokens",
            "model behind the name": self.base or "not told",
            "prompt tokens read by the server": f"{self.read:,} of {self.sent:,}" if self.read else "not told",
            f"pass key, {self.sent:,} tokens back": found,
            "RoPE of the server": "not told by any server: it is that of the model as served",
        }


class EndpointGenerator:
    """Answers prompts greedily through an endpoint, several at once.

    Chat prompts go to `/chat/completions`, plain ones to `/completions`, with temperature 0. A busy or failing server
    is asked again, after the time it names or with growing pauses. A server that applies the penalties of a model's
    generation config must be told not to (vLLM: `--generation-config vllm`), or its answers are not plain greedy ones.

    Args:
        model: the name under which the model is served.
        endpoint: such as http://localhost:8000/v1, which a URL without a path gets; or several that serve the same. A
            login in it is sent as HTTP basic authentication and shown nowhere.
        api_key_env: the environment variable that holds the key; without it none is sent.
        max_concurrency: the most requests at once.
        timeout: seconds for one answer.
        max_attempts: attempts at one answer; waiting for a busy server is none.

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
        endpoint: str | Sequence[str],
        *,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 16,
        timeout: float = 1800.0,
        max_attempts: int = 8,
    ) -> None:
        self.model, self.max_concurrency, self.timeout = model, max_concurrency, timeout
        self.stats = Speed()
        self.on_read: Callable[[Prompt], None] = lambda prompt: None
        self._client = OpenAIGenerator(
            model,
            endpoint,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_attempts=max_attempts,
            # One answer to a long prompt may take longer than a server may be away.
            patience=max(600.0, 2 * timeout),
        )
        self._client.option_remedies = {
            "temperature": "Answers are compared greedily, at temperature 0: evaluate a model that takes it",
            "max_tokens": "Set a smaller `max_new_tokens`",
        }
        self._checked = False

    def check(self) -> None:
        """Raise `EndpointError` where no answer could come: no server, another model, a key that is refused."""
        if not self._checked:
            with self._loop() as loop:
                asyncio.run_coroutine_threadsafe(self._client.check(), loop).result()
            self._checked = True

    @property
    def endpoint(self) -> Endpoint:
        """The first address, with its key: for who asks it in another way."""
        return self._client.endpoints[0]

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its answer as it arrives; those that share a beginning are sent one after another.

        Raises:
            EndpointError: a prompt gets no answer. Nothing more is sent, and the answers on their way are yielded
                first.
        """
        # A server that keeps what it has read finds it again in the next prompt.
        waiting = iter(sorted(prompts, key=lambda prompt: prompt.text))
        sent: dict[Future[Reply], Prompt] = {}
        failure: Exception | None = None
        start = time.perf_counter()
        if prompts:
            self.check()
        with self._loop() as loop:
            while True:
                room = 0 if failure else self._client.concurrency - len(sent)
                for prompt in islice(waiting, room):
                    answer = self._client.reply(self._request(prompt))
                    sent[asyncio.run_coroutine_threadsafe(answer, loop)] = prompt
                if not sent:
                    break
                for future in wait(sent, return_when=FIRST_COMPLETED).done:
                    prompt, error = sent.pop(future), future.exception()
                    if error is None:
                        self.stats.seconds += time.perf_counter() - start
                        yield prompt, self._counted(prompt, future.result())
                        start = time.perf_counter()
                    elif failure is None:
                        # Its size and not its text: that may be nobody's business, and is long.
                        size = f"{len(prompt.text):,} characters and {prompt.max_new_tokens} new tokens"
                        failure = EndpointError(
                            f"No answer to a prompt of {size}. {error} Answers that arrived are kept."
                        )
                        failure.__cause__ = error
                        loop.call_soon_threadsafe(self._client.drain)
        if failure is not None:
            raise failure

    def look(self, longest: Prompt, count: Callable[[str], int]) -> ServerFacts:
        """Ask the server what it can be asked about its range, and refuse one in which a prompt has no room.

        `count` takes a text to its tokens as the model reads it, the chat template included where the prompt uses it.

        Raises:
            ValueError: the server says that its range is smaller than the longest prompt with its answer, or cuts it.
            EndpointError: the server gives no answer.
        """
        needed = count(longest.text) + longest.max_new_tokens
        what = f"`lengths`: the longest prompt ({longest.task}) with its answer"
        with self._loop() as loop:
            listing = asyncio.run_coroutine_threadsafe(self._client.listing(), loop).result()
        reach = next((int(listing[name]) for name in _RANGE_FIELDS if listing.get(name)), None)
        if reach is not None and reach < needed:
            raise ValueError(_no_room(what, needed, f"{self.model!r} is served with a range of {reach:,}"))
        # The short text tells whether the model can do this at all, else the long one says nothing of the range.
        key = str(random.Random(needed).randrange(10_000, 100_000))
        probes = [_probe(key, tokens, count, chat=longest.chat) for tokens in (min(_SHORT_PROBE, needed), needed)]
        try:
            read, found = [], []
            for probe in probes:
                before = self.stats.prompt_tokens
                ((_, answer),) = self.generate([probe])
                read.append(self.stats.prompt_tokens - before)
                found.append(key in answer.text)
        except EndpointError as error:
            if isinstance(error.__cause__, GenerationError) and error.__cause__.kind == TOO_LONG:
                raise ValueError(_no_room(what, needed, f"the server says: {error.__cause__.told}")) from None
            raise
        sent = count(probes[1].text)
        if 0 < read[1] < _READ * sent:
            raise ValueError(_no_room(what, needed, f"of {sent:,} tokens sent the server read {read[1]:,}"))
        base = listing.get("root") or listing.get("parent")
        facts = ServerFacts(reach, None if base is None else str(base).split("/")[-1], sent, read[1], *found)
        if facts.short and not facts.long:
            logger.warning("%s finds a pass key %s tokens back: no. Is its RoPE scaled?", self.model, f"{sent:,}")
        return facts

    def check_answers(self, expected: AnswersRecord, name: str) -> str:
        """Refuse a server that answers otherwise than the model `name` as trained, and return what was compared.

        Raises:
            ValueError: names the first prompt that is answered otherwise.
            EndpointError: the server gives no answer.
        """
        columns = zip(expected.lines, expected.questions, expected.tokens, expected.answers, strict=True)
        prompts = {
            Prompt("probe", "served", n, ledger(lines, question), (), NEW_TOKENS, chat=expected.chat): (tokens, answer)
            for n, (lines, question, tokens, answer) in enumerate(columns)
        }
        for prompt, completion in self.generate(list(prompts)):
            tokens, answer = prompts[prompt]
            if not completion.text.strip().startswith(answer):
                raise ValueError(
                    f"`endpoint` must answer as {name!r} was trained, got {completion.text.strip()!r} instead of "
                    f"{answer!r} to a fixed prompt of {tokens:,} tokens: other weights, RoPE or chat template. Serve "
                    f"it as `hf-longalign serve-command {quote(name)}` says, or set `check_served` to 'off'."
                )
        return f"{len(prompts)} fixed prompts of up to {max(expected.tokens, default=0):,} tokens, answered the same"

    def _request(self, prompt: Prompt) -> Request:
        extra: dict[str, Any] = {"stop": list(prompt.stop)} if prompt.stop else {}
        sampling = Sampling(0.0, None, prompt.max_new_tokens, seed=None, extra=extra)
        # A chat server writes the whole answer: it cannot be told how to begin it.
        text = prompt.text if prompt.chat else prompt.text + prompt.prefix
        return Request((("user", text),), self._client.model, sampling, prompt.task, prompt.chat)

    def _counted(self, prompt: Prompt, reply: Reply) -> Completion:
        if not reply.text and reply.completion_tokens > 1:
            logger.warning("An answer of %s has no content: a filter or a reasoning parser took it.", self.model)
        if not reply.confirmed:
            return Completion(cut_at(reply.text, prompt.stop), 0, reply.finish_reason == "length")
        self.stats.prompt_tokens += reply.prompt_tokens
        self.stats.cached_tokens += reply.cached_tokens
        self.stats.generated_tokens += reply.completion_tokens
        return Completion(cut_at(reply.text, prompt.stop), reply.completion_tokens, reply.finish_reason == "length")

    @contextmanager
    def _loop(self) -> Iterator[asyncio.AbstractEventLoop]:
        """An event loop in a thread of its own, for the caller may have one running (notebooks do).

        What is still on its way in the end is given up.
        """

        async def leave() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield loop
        finally:
            asyncio.run_coroutine_threadsafe(leave(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _no_room(what: str, needed: int, told: str) -> str:
    return (
        f"{what} must have room on the server, got {needed:,} tokens, and {told}. Set shorter lengths, or serve the "
        f"model with a longer range (vLLM: `--max-model-len {needed}`)."
    )


def _probe(key: str, tokens: int, count: Callable[[str], int], *, chat: bool) -> Prompt:
    """A text of about so many tokens, its answer included, whose first sentence alone holds the answer."""
    filler, text = noise(seed=1), ""
    # About 100 tokens a paragraph: the first guess is too short, and grown by what is missing.
    paragraphs = 0
    while True:
        body = "\n\n".join(filler[number % len(filler)] for number in range(paragraphs))
        question = "What is the pass key? Answer with its five digits alone." if chat else "The pass key is"
        grown = f"The pass key is {key}. Remember it.\n\n{body}\n\n{question}"
        missing = tokens - _PROBE_ANSWER - count(grown)
        if text and missing < 0:
            return Prompt("probe", "probe", 0, text, (key,), _PROBE_ANSWER, chat=chat, length=tokens)
        text = grown
        paragraphs += max(1, missing // 200)
