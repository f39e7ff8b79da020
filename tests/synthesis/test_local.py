"""The local generator against a naive one-by-one reference."""

import asyncio
import sys

import pytest
import torch
import vllm_stand_in
from tiny_chat import make_tiny_chat

from hf_longalign.endpoint.protocol import EndpointError, GenerationError, Request, RunStopped, Sampling
from hf_longalign.synthesis.local import Draw, TransformersGenerator, VLLMGenerator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def generator(folder):
    return TransformersGenerator(str(folder), device="cpu")


def _request(prompt, generator, **sampling):
    return Request(
        (("system", "Be brief."), ("user", prompt)), generator.model, Sampling(**{"max_tokens": 12} | sampling)
    )


def _replies(generator, requests, *, batch_size=16):
    generator.concurrency = batch_size

    async def ask():
        replies = await asyncio.gather(*(generator.reply(request) for request in requests))
        await generator.close()
        return replies

    return asyncio.run(ask())


def _naive(generator, request):
    """Token by token, the whole sequence anew each time, alone: ids and whether the end was drawn."""
    model, tokenizer = generator._load()
    messages = [{"role": role, "content": content} for role, content in request.messages]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    sampling = request.sampling
    rng = torch.Generator().manual_seed(int(request.key[:15], 16))
    draws = torch.rand(sampling.max_tokens + 1, generator=rng).tolist()
    new = []
    for draw in draws[: sampling.max_tokens]:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, -1]
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            ranked = sorted(enumerate((logits / sampling.temperature).softmax(-1).tolist()), key=lambda pair: -pair[1])
            nucleus, mass = [], 0.0
            for token, probability in ranked:
                if mass >= sampling.top_p:
                    break
                nucleus.append((token, probability))
                mass += probability
            rest = draw * mass
            for token, probability in nucleus:  # noqa: B007 - the last one is drawn
                rest -= probability
                if rest < 0:
                    break
        new.append(token)
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(new[:-1], skip_special_tokens=True), "stop", len(new)
    return tokenizer.decode(new, skip_special_tokens=True), "length", len(new)


def _mixed(generator):
    return [
        _request("Hi", generator, temperature=0),
        _request("Tell me about the dam at Varn, please, at some length.", generator),
        _request("Which town?", generator, top_p=0.5, seed=3),
        _request("Which town?", generator, temperature=1.5, max_tokens=30, seed=4),
        _request("a b c d e f g", generator, temperature=0.3, top_p=0.9, max_tokens=1),
    ]


def test_a_batch_gives_what_each_request_gives_alone(generator):
    requests = _mixed(generator)
    replies = _replies(generator, requests)
    for request, reply in zip(requests, replies, strict=True):
        assert (reply.text, reply.finish_reason, reply.completion_tokens) == _naive(generator, request)
        assert reply.model == generator.model
    assert replies[3].completion_tokens > 12 or replies[3].finish_reason == "stop"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_no_reply(generator, batch_size):
    requests = _mixed(generator)
    assert _replies(generator, requests[::-1], batch_size=batch_size)[::-1] == _replies(generator, requests)


def test_seed_and_prompt_change_the_reply(generator):
    texts = [reply.text for reply in _replies(generator, [_request("Hi", generator, seed=seed) for seed in range(5)])]
    assert len(set(texts)) == 5


def test_draws_follow_the_distribution(generator):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    requests = [_request("x", generator, seed=seed, temperature=1.0) for seed in range(4000)]
    draw = Draw(requests, 0, 1, torch.device("cpu"))
    chosen = draw(torch.zeros(4000, 0), logits.expand(4000, 4)).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert torch.allclose(shares, logits.softmax(-1), atol=0.03)


def test_the_end_token_stops_a_reply(generator, monkeypatch):
    model, tokenizer = generator._load()
    with torch.no_grad():
        bias = torch.zeros(len(tokenizer))
        bias[tokenizer.eos_token_id] = 3.0
        head = model.lm_head
        model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=True)
        model.lm_head.weight.copy_(head.weight)
        model.lm_head.bias.copy_(bias)
    try:
        requests = [_request("Hi", generator, seed=seed, max_tokens=100, temperature=1.0) for seed in range(6)]
        replies = _replies(generator, requests)
        assert {reply.finish_reason for reply in replies} == {"stop"}
        assert len({reply.completion_tokens for reply in replies}) > 1
        for request, reply in zip(requests, replies, strict=True):
            assert (reply.text, reply.finish_reason, reply.completion_tokens) == _naive(generator, request)
    finally:
        model.lm_head = head


def test_what_is_too_long_is_refused_alone(generator):
    async def ask():
        requests = [_request("Hi", generator, max_tokens=600), _request("Hi", generator)]
        outcomes = await asyncio.gather(*map(generator.reply, requests), return_exceptions=True)
        await generator.close()
        return outcomes

    long, fine = asyncio.run(ask())
    assert isinstance(long, GenerationError) and long.kind == "too_long" and "max_tokens" in str(long)
    assert fine.text


def test_what_a_model_here_does_not_take_is_said_once(generator, caplog):
    extra = {"min_p": 0.1, "stop": ["END"], "chat_template_kwargs": {}, "max_completion_tokens": 2}
    first, _ = _replies(generator, [_request(prompt, generator, extra=extra) for prompt in ("Hi", "Which town?")])
    assert first.completion_tokens <= 2
    assert [record.getMessage() for record in caplog.records] == [f"{generator.model} takes no min_p, stop: left out."]


def test_out_of_memory_halves_the_batch(generator, monkeypatch):
    generate, sizes = generator._generate_at_once, []

    def scarce(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no memory")
        return generate(batch)

    expected = _replies(generator, _mixed(generator))
    monkeypatch.setattr(generator, "_generate_at_once", scarce)
    assert _replies(generator, _mixed(generator)) == expected
    assert sizes == [5, 2, 3, 1, 2] and generator.concurrency == 1


def test_drain_finishes_the_batch_at_work(generator):
    async def ask():
        generator.concurrency = 2
        tasks = [asyncio.create_task(generator.reply(_request(str(number), generator))) for number in range(6)]
        while not tasks[0].done():
            await asyncio.sleep(0.001)
        generator.drain()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await generator.close()
        return outcomes

    outcomes = asyncio.run(ask())
    stopped = [isinstance(outcome, RunStopped) for outcome in outcomes]
    assert 2 <= sum(stopped) <= 4


def test_nothing_is_begun_once_the_run_is_stopping(generator, monkeypatch):
    """Not even for a prompt that was being made ready."""
    encode = generator._encode

    def encode_while_it_stops(request):
        found = encode(request)
        generator.drain()
        return found

    monkeypatch.setattr(generator, "_encode", encode_while_it_stops)
    with pytest.raises(RunStopped):
        _replies(generator, [_request("Hi", generator)])
    asyncio.run(generator.close())


def test_a_folder_is_recorded_by_name_and_content(folder, tmp_path):
    other = make_tiny_chat(tmp_path / "tiny", seed=1)
    names = [TransformersGenerator(str(path)).model for path in (folder, other)]
    assert names[0] != names[1] and all(name.startswith("tiny-") and "/" not in name for name in names)


@pytest.mark.parametrize("kind", [TransformersGenerator, VLLMGenerator])
def test_what_cannot_be_loaded_is_said_without_its_path(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EndpointError, match="cannot be loaded") as caught:
        asyncio.run(kind(str(tmp_path / "empty")).check())
    assert str(tmp_path) not in str(caught.value)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    folder = make_tiny_chat(tmp_path / "tiny")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EndpointError, match="no chat template"):
        asyncio.run(TransformersGenerator(str(folder)).check())


def test_a_bad_batch_size_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be"):
        TransformersGenerator("org/tiny", batch_size=0)
