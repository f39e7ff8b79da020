"""A real endpoint on loopback: `transformers serve` with a tiny model made on the fly."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial

import pytest
from tiny_chat import make_tiny_chat

from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import EndpointError, Request, Sampling
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.local import TransformersGenerator
from hf_longalign.synthesis.runner import Runner


for module in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(module, reason='needs pip install "transformers[serving]"')


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The model's folder and the server's URL."""
    folder = make_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()  # the list of models fails without it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, home / "log")
        yield str(folder), f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url, process, log):
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def _request(generator, prompt, **sampling):
    messages = (("system", "Be brief."), ("user", prompt))
    return Request(messages, generator.model, Sampling(**{"max_tokens": 16} | sampling))


async def _ask(request, ask):
    return await ask(request)


def test_replies_are_journaled_and_not_asked_again(served, tmp_path):
    folder, url = served
    generator = OpenAIGenerator(folder, url, max_concurrency=4)
    requests = [_request(generator, f"Tell me about dam {number}.") for number in range(12)]
    with Journal(tmp_path / "journal.sqlite") as journal:
        replies = Runner(generator, journal).run(partial(_ask, request) for request in requests)
        assert journal.totals().replies == 12
    assert all(reply.text and reply.prompt_tokens > 10 for reply in replies)
    assert {reply.finish_reason for reply in replies} <= {"stop", "length"}
    assert {reply.model for reply in replies} == {"tiny@main"}
    gone = OpenAIGenerator(folder, "http://127.0.0.1:9")
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert Runner(gone, journal).run(partial(_ask, request) for request in requests) == replies
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert folder.encode() not in written


def test_greedy_replies_are_those_of_the_local_generator(served, tmp_path):
    folder, url = served
    local = TransformersGenerator(folder, device="cpu")
    remote = OpenAIGenerator(folder, url, max_concurrency=4)
    outcomes = []
    for generator in (local, remote):
        requests = [_request(generator, prompt, temperature=0) for prompt in ("Hi", "Which town was warned first?")]
        with Journal(tmp_path / "journal.sqlite") as journal:
            replies = Runner(generator, journal).run(partial(_ask, request) for request in requests)
        outcomes.append([(reply.text, reply.finish_reason, reply.prompt_tokens) for reply in replies])
    assert outcomes[0] == outcomes[1]


def test_a_model_that_is_not_served_is_found_before_anything_is_asked(served):
    _, url = served

    async def check():
        generator = OpenAIGenerator("org/other", url)
        try:
            await generator.check()
        finally:
            await generator.close()

    with pytest.raises(EndpointError, match="pinned") as caught:
        asyncio.run(check())
    assert "/tmp" not in str(caught.value)
