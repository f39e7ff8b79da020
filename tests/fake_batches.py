"""A scripted Batch API on loopback: files, batches, results out of order, lines of errors, lost answers.

A prompt that contains `[[expired*2]]` has no reply in its first two batches and one from the third on. Marks:
`expired`, `lost` (no line at all), `500` and `429` (a line with that status), `400` (a context that is too long),
`double` (two lines), `filter` (the content filter).
"""

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fake_endpoint import answer_text


_MARK = re.compile(r"\[\[(\w+)(?:\*(\d+))?\]\]")


@dataclass
class FakeBatches:
    """The server, in threads of its own while the `with` block lasts."""

    model: str = "tiny"
    reply: object = answer_text
    key: str | None = None
    looks: int = 2  # how often a batch is looked at before it is done
    lose_creates: int = 0  # so many answers to the creation of a batch are lost on their way
    cut_downloads: int = 0  # so many downloads of results end in the middle
    busy: int = 0  # so many looks at a batch are answered with 503
    refuse: str | None = None  # batches fail as a whole, with these words
    refuses: dict[str, str] = field(default_factory=dict)  # options that lead to a line with 400, and what it says
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict] = field(default_factory=dict)
    asked: Counter = field(default_factory=Counter)  # prompts, by the batches they were in
    calls: Counter = field(default_factory=Counter)

    def __enter__(self):
        self._attempts, self._looks, self._lock = Counter(), Counter(), threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                fake._get(self)

            def do_POST(self):
                fake._post(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _get(self, handler):
        path = handler.path.split("?")[0]
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            return _answer(handler, 401, {"error": {"message": "Incorrect API key provided"}})
        if path == "/v1/batches":
            self.calls["list"] += 1
            data = [{**batch, "status": "in_progress"} for batch in reversed(self.batches.values())]
            return _answer(handler, 200, {"object": "list", "data": data, "has_more": False})
        if path.startswith("/v1/batches/"):
            if self.busy:
                self.busy -= 1
                return _answer(handler, 503, {"error": {"message": "overloaded"}})
            return _answer(handler, 200, self._look(path.rsplit("/", 1)[1]))
        if path.endswith("/content"):
            content = self.files[path.split("/")[-2]]
            if self.cut_downloads:
                self.cut_downloads -= 1
                content = content[: len(content) // 2]
            return _raw(handler, 200, content)
        return _answer(handler, 404, {"error": {"message": f"no route {path}"}})

    def _post(self, handler, raw):
        with self._lock:
            if handler.path == "/v1/files":
                boundary = re.search(r"boundary=(.+)", handler.headers["content-type"])[1].encode()
                part = next(part for part in raw.split(b"--" + boundary) if b'name="file"' in part)
                name = f"file-{len(self.files)}"
                self.files[name] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
                self.calls["upload"] += 1
                fields = {"bytes": len(self.files[name]), "created_at": 0, "filename": name, "purpose": "batch"}
                return _answer(handler, 200, {"id": name, "object": "file", "status": "processed", **fields})
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {
                "id": name,
                "object": "batch",
                "status": "validating",
                "created_at": int(time.time()),
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                **json.loads(raw),
            }
            self.calls["create"] += 1
            for line in self.lines(name):
                self.asked[line["body"]["messages"][-1]["content"]] += 1
            if self.lose_creates:
                self.lose_creates -= 1
                handler.connection.shutdown(socket.SHUT_RDWR)
                return None
            return _answer(handler, 200, self.batches[name])

    def lines(self, name):
        return [json.loads(line) for line in self.files[self.batches[name]["input_file_id"]].splitlines()]

    def _look(self, name):
        with self._lock:
            batch = self.batches[name]
            self._looks[name] += 1
            if self._looks[name] < self.looks or batch["status"] in ("completed", "expired", "failed"):
                return batch
            if self.refuse:
                errors = {"object": "list", "data": [{"code": "invalid", "message": self.refuse}]}
                batch.update(status="failed", errors=errors)
                return batch
            good, bad = [], []
            for line in self.lines(name):
                good_line, bad_line = self._work(line)
                good += good_line
                bad += bad_line
            random.Random(0).shuffle(good)
            for kind, lines in (("output_file_id", good), ("error_file_id", bad)):
                if lines:
                    batch[kind] = f"{kind}-{name}"
                    self.files[batch[kind]] = "".join(json.dumps(line) + "\n" for line in lines).encode()
            counts = {"completed": len({line["custom_id"] for line in good}), "failed": len(bad)}
            expired = any((line["error"] or {}).get("code") == "batch_expired" for line in bad)
            batch["request_counts"] = {**counts, "total": sum(counts.values())}
            batch["status"] = "expired" if expired else "completed"
            return batch

    def _work(self, line):
        """The lines of results and of errors for one request."""
        body, key = line["body"], line["custom_id"]
        prompt = body["messages"][-1]["content"]
        self._attempts[prompt] += 1
        attempt, kind = self._attempts[prompt], None
        for name, times in _MARK.findall(prompt):
            attempt -= int(times or 1)
            if attempt <= 0:
                kind = name
                break
        option = next((name for name in self.refuses if name in body), None)
        if option:
            error = {"error": {"message": self.refuses[option], "type": "invalid_request_error"}}
            return [], [_line(key, 400, error)]
        if kind == "lost":
            return [], []
        if kind == "expired":
            return [], [
                {**_line(key, 0, None), "response": None, "error": {"code": "batch_expired", "message": "late"}}
            ]
        if kind in ("400", "429", "500"):
            told = {"400": "This model's maximum context length is 8192 tokens"}.get(kind, "oops")
            return [], [_line(key, int(kind), {"error": {"message": told}})]
        text = self.reply(body)
        answer = {
            "object": "chat.completion",
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "content_filter" if kind == "filter" else "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 16},
        }
        lines = [_line(key, 200, answer)]
        if kind == "double":
            again = json.loads(json.dumps(answer))
            again["choices"][0]["message"]["content"] = "another text"
            lines.append(_line(key, 200, again))
        return lines, []


def _line(key, status, body):
    return {"id": "x", "custom_id": key, "response": {"status_code": status, "body": body}, "error": None}


def _answer(handler, status, content):
    return _raw(handler, status, json.dumps(content).encode())


def _raw(handler, status, content):
    handler.send_response(status)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
