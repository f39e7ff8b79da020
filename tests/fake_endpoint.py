"""A scripted OpenAI-compatible server on loopback: slots, latency, a key, refused options, and faults.

A prompt that contains `[[reset*2]]` has its first two attempts reset and is answered from the third on; several such
marks are played one after another. `FAULTS` names them all. Every request is logged with its prompt, so that a test
can count what was asked and what was answered, before and after a kill of the client.

    with FakeEndpoint(slots=64, latency=(0.5, 2.0)) as server:
        ...                     # server.url, server.log, server.busy_seconds
    python tests/fake_endpoint.py --slots 64 --latency 0.5 2.0     # on its own: prints its URL; GET /stats
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate


FAULTS = (
    "429",  # with Retry-After 0.2
    "429date",  # with Retry-After as an HTTP date, one second ahead
    "429bare",
    "400",  # the context is too long
    "odd400",
    "401",
    "404",
    "402",
    "500",
    "503",
    "reset",
    "hang",  # no answer, ever
    "dribble",  # one byte every 0.1 s, never done
    "truncated",  # a body cut in the middle, of the announced length
    "cut",  # a body that ends before its announced length
    "html",  # a login page with status 200
    "error200",
    "limit200",  # an error object with a code, 429, and status 200
    "errorfinish",  # finish_reason "error" and no text
    "errorchoice",  # an error object beside half a text
    "nochoices",
    "nullchoices",
    "nofinish",  # no text, no finish_reason
    "empty",  # no text and no token
    "ended",  # no text, one token: the model ended at once
    "null",
    "wrong",  # another model answers
    "filter",  # finish_reason content_filter
    "filter400",
    "length",
    "unparsable",
    "nousage",
)
_MARK = re.compile(r"\[\[(\w+)(?:\*(\d+))?\]\]")


@dataclass
class Asked:
    """One request as the server saw it. Times are `time.monotonic()`; `answered` is when the last byte was written."""

    prompt: str
    body: dict
    headers: dict
    arrived: float
    fault: str | None = None
    answered: float | None = None


def answer_text(body: dict) -> str:
    """The reply to a body: the same words for the same messages and seed."""
    shaped_by = json.dumps([body.get("messages", body.get("prompt")), body.get("seed")])
    words = hashlib.sha256(shaped_by.encode()).hexdigest()
    return "Context: " + " ".join(words[i : i + 4] for i in range(0, 64, 4))


@dataclass
class FakeEndpoint:
    """The server, in a thread of its own while the `with` block lasts."""

    slots: int = 10_000
    latency: tuple[float, float] = (0.0, 0.0)
    model: str = "tiny"
    key: str | None = None
    models_route: bool = True
    port: int = 0
    reply: object = answer_text
    listing: dict = field(default_factory=dict)  # what the list of models says about the model
    refuses: dict[str, str] = field(default_factory=dict)  # options that lead to a 400, with what it says
    stream_only: bool = False
    queue: bool = False  # a request beyond the slots waits instead of getting 429
    log: list[Asked] = field(default_factory=list)
    busy_seconds: float = 0.0
    most_at_once: int = 0

    def __post_init__(self):
        self._attempts = Counter()
        self._in_service = 0
        self._connections = set()
        self._since = time.monotonic()
        self._rng = random.Random(0)

    # -- for the test

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self) -> Counter:
        """How often each prompt was asked."""
        return Counter(entry.prompt for entry in self.log)

    def __enter__(self) -> "FakeEndpoint":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)

    # -- the server

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self.serve(started.set))
        self._loop.close()

    async def serve(self, started) -> None:
        self._done = asyncio.Event()
        self._free = asyncio.Semaphore(self.slots)
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, limit=2**24, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        started()
        await self._done.wait()
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader, writer) -> None:
        task = asyncio.current_task()
        self._connections.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                raw = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in head.split("\r\n")[1:-2]}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(writer, method, path, raw, body):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, writer, method, path, headers, raw) -> bool:
        if path == "/stats":
            return await _send(writer, 200, self.stats())
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            got = headers.get("authorization")
            return await _send(writer, 401, {"error": {"message": f"Incorrect API key provided: {got}"}})
        if (method, path) == ("GET", "/v1/models") and self.models_route:
            return await _send(writer, 200, {"object": "list", "data": [{"id": self.model, **self.listing}]})
        if method != "POST" or path not in ("/v1/chat/completions", "/v1/completions"):
            return await _send(writer, 404, {"error": {"message": f"no route {path}"}})
        body = json.loads(raw)
        if body["model"] != self.model:
            message = f"The model `{body['model']}` does not exist."
            return await _send(writer, 404, {"error": {"message": message, "code": "model_not_found"}})
        if "messages" in body and not body["messages"]:
            return await _send(writer, 400, {"error": {"message": "messages must not be empty"}})
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        entry = Asked(prompt, body, headers, time.monotonic())
        self.log.append(entry)
        if self._in_service >= self.slots and not self.queue:
            entry.fault = "full"
            return await _send(writer, 429, {"error": {"message": "too many requests"}})
        for name, told in self.refuses.items():
            if name in body:
                entry.fault = "option"
                return await _send(writer, 400, {"error": {"message": told, "type": "invalid_request_error"}})
        if self.stream_only and not body.get("stream"):
            entry.fault = "option"
            message = "This model only support stream mode, please enable the stream parameter to access the model."
            return await _send(writer, 400, {"error": {"message": message}})
        entry.fault = self._fault(prompt)
        async with self._free:
            self._count(+1)
            try:
                await asyncio.sleep(self._rng.uniform(*self.latency))
                keep = await self._play(writer, entry)
            finally:
                self._count(-1)
        return keep

    def _fault(self, prompt: str) -> str | None:
        """The fault this attempt is to meet, by the marks of the prompt and the attempts before it."""
        self._attempts[prompt] += 1
        attempt = self._attempts[prompt]
        for kind, times in _MARK.findall(prompt):
            assert kind in FAULTS, kind
            attempt -= int(times or 1)
            if attempt <= 0:
                return kind
        return None

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self.busy_seconds += self._in_service * (now - self._since)
        self._since = now
        self._in_service += change
        self.most_at_once = max(self.most_at_once, self._in_service)

    def stats(self) -> dict:
        self._count(0)
        answered = [entry.answered for entry in self.log if entry.answered]
        return {
            "asked": len(self.log),
            "answered": len(answered),
            "refused": sum(entry.fault == "full" for entry in self.log),
            "busy_seconds": self.busy_seconds,
            "most_at_once": self.most_at_once,
            "first": min((entry.arrived for entry in self.log), default=0.0),
            "last_arrival": max((entry.arrived for entry in self.log), default=0.0),
            "last": max(answered, default=0.0),
            "starts": sorted(entry.arrived for entry in self.log if entry.answered),
            "ends": sorted(answered),
        }

    async def _play(self, writer, entry: Asked) -> bool:
        kind = entry.fault
        if kind in _STATUSES:
            status, error, extra = _STATUSES[kind]
            if kind == "429date":
                extra = {"Retry-After": formatdate(time.time() + 1, usegmt=True)}
            return await _send(writer, status, {"error": error}, extra)
        if kind == "reset":
            writer.transport.abort()
            return False
        if kind == "hang":
            await asyncio.sleep(3600)
        data = self._completion(entry, kind)
        data = _events(data, entry.body) if entry.body.get("stream") else json.dumps(data).encode()
        if kind == "html":
            page = b"<!doctype html><html><title>Sign in</title><body>Please sign in.</body></html>"
            return await _raw(writer, 200, page, {}, "text/html")
        if kind == "truncated":
            return await _raw(writer, 200, data[: len(data) // 2], {})
        if kind in ("cut", "dribble"):
            writer.write(_head(200, len(data), {}) + data[:10])
            await writer.drain()
            while kind == "dribble":
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
            return False
        keep = await _raw(writer, 200, data, {})
        entry.answered = time.monotonic()
        return keep

    def _completion(self, entry: Asked, kind: str | None) -> dict:
        if kind == "error200":
            return {"error": {"message": "upstream failed", "code": 502}}
        if kind == "limit200":
            return {"error": {"message": "slow down", "code": 429}}
        silent = dict.fromkeys(("empty", "ended", "errorfinish", "nofinish"), "")
        text = {**silent, "null": None, "unparsable": "As you wish."}.get(kind, self.reply(entry.body))
        reason = {"filter": "content_filter", "length": "length", "errorfinish": "error", "nofinish": None}
        reason = reason.get(kind, "stop")
        choice = {"index": 0, "finish_reason": reason}
        if "messages" in entry.body:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if kind == "errorchoice":
            choice["error"] = {"message": "provider disconnected", "code": 502}
        completion = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "another" if kind == "wrong" else self.model,
            "choices": {"nochoices": [], "nullchoices": None}.get(kind, [choice]),
            "usage": {
                "prompt_tokens": len(json.dumps(entry.body.get("messages", entry.body.get("prompt"))).split()),
                "completion_tokens": 1 if kind == "ended" else len((text or "").split()),
                "total_tokens": 0,
            },
        }
        if kind == "nousage":
            del completion["usage"]
        return completion


_STATUSES = {
    "429": (429, {"message": "slow down"}, {"Retry-After": "0.2"}),
    "429date": (429, {"message": "slow down"}, {}),
    "429bare": (429, {"message": "slow down"}, {}),
    "400": (400, {"message": "This model's maximum context length is 8192 tokens"}, {}),
    "odd400": (400, {"message": "Invalid value for field 'logit_bias'"}, {}),
    "401": (401, {"message": "Incorrect API key provided"}, {}),
    "402": (402, {"message": "Insufficient balance"}, {}),
    "404": (404, {"message": "no such model"}, {}),
    "500": (500, {"message": "oops"}, {}),
    "503": (503, {"message": "overloaded"}, {"Retry-After": "0.1"}),
    "filter400": (400, {"message": "filtered", "code": "content_filter"}, {}),
}


def _events(completion: dict, body: dict) -> bytes:
    """The completion as server-sent events, a word each, with a comment and the usage if it was asked for."""
    if "error" in completion:
        return f"data: {json.dumps(completion)}\n\n".encode()
    (choice,) = completion["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    parts = re.findall(r"\s*\S+", text or "")
    lines = [": keep-alive"]
    for part in parts:
        delta = {"delta": {"content": part}} if "messages" in body else {"text": part}
        lines.append({"model": completion["model"], "choices": [{"index": 0, **delta, "finish_reason": None}]})
    lines.append({"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if body.get("stream_options", {}).get("include_usage"):
        lines.append({"choices": [], "usage": completion["usage"]})
    lines = [line if isinstance(line, str) else f"data: {json.dumps(line)}" for line in lines]
    return "".join(f"{line}\n\n" for line in [*lines, "data: [DONE]"]).encode()


def _head(status: int, length: int, extra: dict, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status} .", f"Content-Type: {kind}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in extra.items()), "", ""]).encode()


async def _raw(writer, status: int, body: bytes, extra: dict, kind: str = "application/json") -> bool:
    writer.write(_head(status, len(body), extra, kind) + body)
    await writer.drain()
    return True


async def _send(writer, status: int, data: dict, extra: dict | None = None) -> bool:
    return await _raw(writer, status, json.dumps(data).encode(), extra or {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--latency", type=float, nargs=2, default=(0.5, 2.0))
    parser.add_argument("--queue", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    endpoint = FakeEndpoint(options.slots, tuple(options.latency), port=options.port, queue=options.queue)
    asyncio.run(endpoint.serve(lambda: print(endpoint.url, flush=True)))  # noqa: T201
