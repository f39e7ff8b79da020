"""A real endpoint on loopback: `transformers serve` with a tiny model made on the fly."""

import asyncio
from functools import partial

import pytest
from served import transformers_serve
from tiny_chat import make_tiny_chat

from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import EndpointError, Request, Sampling
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.local import TransformersGenerator
from hf_longalign.synthesis.runner import Runner


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The model's folder and the server's URL."""
    folder = make_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")
    with transformers_serve(folder, tmp_path_factory.mktemp("home")) as url:
        yield str(folder), url


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
