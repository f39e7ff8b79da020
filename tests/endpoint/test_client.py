"""The endpoint generator against a scripted server: every fault it may meet, what it costs and what it is called."""

import asyncio

import pytest
from fake_endpoint import FakeEndpoint, answer_text

from hf_longalign.endpoint import Endpoint, OpenAIGenerator
from hf_longalign.endpoint.protocol import (
    EndpointError,
    GenerationError,
    NoReplyError,
    Request,
    RunStopped,
    Sampling,
)


pytest.importorskip("openai", reason="needs hf_longalign[synthesis]")


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr("hf_longalign.endpoint.pacing._FIRST_WAIT", 0.02)


def _request(prompt="Hi", **sampling):
    return Request((("user", prompt),), "tiny", Sampling(max_tokens=50, **sampling))


def _ask(server, *prompts, **options):
    """The replies to prompts asked at once, and the faults on the way; an error is returned, not raised."""
    faults = []

    async def notify(fault):
        faults.append(fault)

    async def ask():
        generator = OpenAIGenerator("tiny", server.url, **({"timeout": 5} | options))
        try:
            replies = [generator.reply(_request(prompt), notify) for prompt in prompts]
            return await asyncio.gather(*replies, return_exceptions=True)
        finally:
            await generator.close()

    return asyncio.run(ask()), faults


@pytest.fixture(scope="module")
def server():
    with FakeEndpoint() as server:
        yield server


def test_a_reply_comes_with_its_text_tokens_and_model(server):
    (reply,), faults = _ask(server, "one two three")
    entry = server.log[-1]
    assert reply.text == answer_text(entry.body)
    assert (reply.finish_reason, reply.prompt_tokens, reply.completion_tokens, reply.model) == ("stop", 6, 17, "tiny")
    assert entry.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "one two three"}],
        "seed": 0,
        "max_tokens": 50,
        "temperature": 0.8,
        "top_p": 1.0,
    }
    assert not faults


@pytest.mark.parametrize(
    ("mark", "kinds", "unconfirmed"),
    [
        ("429*2", ["rate_limit"] * 2, False),
        ("429bare", ["rate_limit"], False),
        ("500", ["server_error"], False),
        ("503*2", ["overloaded"] * 2, False),
        ("reset", ["reset"], True),
        ("truncated", ["bad_body"], True),
        ("html", ["web_page"], False),
        ("cut", ["reset"], True),
        ("nochoices", ["bad_body"], False),
        ("nullchoices", ["bad_body"], False),
        ("error200*2", ["server_error"] * 2, False),
        ("limit200", ["rate_limit"], False),
        ("errorfinish*3", ["server_error"] * 3, False),
        ("errorchoice", ["server_error"], False),
        ("nofinish", ["empty"], False),
        ("empty*2", ["empty"] * 2, False),
        ("null", ["empty"], False),
        ("wrong*2", ["wrong_model"] * 2, False),
    ],
)
def test_a_passing_fault_is_named_counted_and_tried_again(server, mark, kinds, unconfirmed):
    prompt = f"please [[{mark}]]"
    (reply,), faults = _ask(server, prompt)
    assert reply.text == answer_text(server.log[-1].body)
    assert [fault.kind for fault in faults] == kinds
    assert all(fault.confirmed != unconfirmed for fault in faults)
    assert server.asked()[prompt] == len(kinds) + 1
    if unconfirmed:
        assert faults[0].prompt_tokens >= len(prompt) and faults[0].completion_tokens == 50
    else:  # what the server says was used, even where it gave nothing for it
        used = _USED.get(mark.split("*")[0], (0, 0))
        assert (faults[0].prompt_tokens > 0, faults[0].completion_tokens) == used


_USED = {"wrong": (True, 17), "errorchoice": (True, 17), "nochoices": (True, 17), "nullchoices": (True, 17)}
_USED |= dict.fromkeys(("empty", "null", "nofinish", "errorfinish"), (True, 0))


@pytest.mark.parametrize("mark", ["hang", "dribble"])
def test_a_server_that_never_ends_its_answer_times_out(server, mark):
    (reply,), faults = _ask(server, f"[[{mark}]]", timeout=0.5)
    assert reply.text.startswith("Context: ")
    assert [fault.kind for fault in faults] == ["timeout"] and not faults[0].confirmed


@pytest.mark.parametrize(("mark", "seconds"), [("429", 0.2), ("429date", 0.0)])
def test_retry_after_is_honoured(server, mark, seconds):
    prompt = f"wait [[{mark}]]"
    _ask(server, prompt)
    first, second = (entry for entry in server.log if entry.prompt == prompt)
    # A date has whole seconds, so that "one second ahead" may be almost now.
    assert second.arrived - first.arrived >= seconds


def test_retry_after_holds_back_the_whole_endpoint(server):
    async def ask():
        generator = OpenAIGenerator("tiny", server.url)
        first = asyncio.create_task(generator.reply(_request("hold [[429]]")))
        while not server.asked()["hold [[429]]"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await asyncio.gather(first, generator.reply(_request("held back")))
        await generator.close()

    asyncio.run(ask())
    refused = next(entry for entry in server.log if entry.prompt == "hold [[429]]")
    held = next(entry for entry in server.log if entry.prompt == "held back")
    assert held.arrived - refused.arrived >= 0.2


@pytest.mark.parametrize(
    ("mark", "text", "reason"),
    [("ended", "", "stop"), ("unparsable", "As you wish.", "stop"), ("length", None, "length")],
)
def test_an_odd_reply_that_was_paid_for_is_a_reply(server, mark, text, reason):
    (reply,), faults = _ask(server, f"[[{mark}]]")
    assert (reply.finish_reason, faults) == (reason, [])
    assert text is None or reply.text == text


def test_what_stays_empty_is_a_reply_after_all_attempts(server):
    (reply,), faults = _ask(server, "[[empty*99]]", max_attempts=3)
    assert (reply.text, reply.finish_reason, len(faults)) == ("", "stop", 2)


def test_an_outage_that_answers_200_loses_no_reply():
    with FakeEndpoint(latency=(0.01, 0.02)) as server:
        marks = ["errorfinish*3", "error200*3", "html*3", "nullchoices*3", "empty*3"]
        replies, _ = _ask(server, *(f"{number} [[{marks[number % 5]}]]" for number in range(50)))
    assert all(reply.text.startswith("Context: ") for reply in replies)


def test_a_reply_without_usage_counts_as_one_token_a_byte(server):
    (reply,), _ = _ask(server, "[[nousage]]")
    assert reply.prompt_tokens == _request("[[nousage]]").most_prompt_tokens
    assert reply.completion_tokens == 50  # no more than was allowed


def test_a_content_filter_is_one_request_s_end(server):
    (cut, refused, fine), _ = _ask(server, "[[filter]]", "[[filter400]]", "fine")
    assert cut.finish_reason == "content_filter"
    assert isinstance(refused, GenerationError) and refused.kind == "content_filter"
    assert fine.text


def test_a_bad_request_is_one_request_s_end_and_says_what_the_server_said_once(server, caplog):
    marks = ["400", "odd400"]
    errors, _ = _ask(server, *(f"{number} [[{marks[number % 2]}*9]]" for number in range(8)), "fine")
    assert errors.pop().text
    assert [error.kind for error in errors] == ["too_long", "bad_request"] * 4
    assert all(isinstance(error, GenerationError) for error in errors)
    assert errors[0].told == "This model's maximum context length is 8192 tokens"
    assert errors[1].told == "Invalid value for field 'logit_bias'" and server.url not in errors[1].told
    assert caplog.text.count("8192 tokens") == 1 and "max_tokens" in caplog.text
    assert caplog.text.count("logit_bias") == 1


_RENAMED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


def _sampled(server, *prompts, extra=None, **sampling):
    """The replies to prompts asked one after another with a sampling of their own, by one generator."""

    async def ask():
        generator = OpenAIGenerator("tiny", server.url)
        found = []
        for prompt in prompts:
            drawn = Sampling(**{"max_tokens": 50, "extra": extra or {}, **sampling})
            found.append(await generator.reply(Request((("user", prompt),), "tiny", drawn)))
            await generator.close()  # what was learnt outlives the connections
        return found

    return asyncio.run(ask())


def test_a_server_that_takes_only_max_completion_tokens_is_asked_so_from_then_on():
    with FakeEndpoint(refuses={"max_tokens": _RENAMED}) as server:
        replies = _sampled(server, "a", "b")
    assert all(reply.text.startswith("Context: ") for reply in replies)
    assert [entry.fault for entry in server.log] == ["option", None, None]
    assert all(entry.body["max_completion_tokens"] == 50 for entry in server.log[1:])


@pytest.mark.parametrize(
    ("refused", "told", "remedy", "mended"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.8", "`temperature: null`", "temperature"),
        ("top_p", "`top_p` is deprecated for this model.", "`top_p: null`", "top_p"),
        ("seed", 'Invalid JSON payload received. Unknown name "seed"', "`sampling_seed: null`", "seed"),
    ],
)
def test_a_refused_option_stops_the_run_and_its_remedy_works(refused, told, remedy, mended):
    with FakeEndpoint(refuses={refused: told}) as server:
        with pytest.raises(EndpointError) as caught:
            _sampled(server, "a")
        assert told in str(caught.value) and remedy in str(caught.value)
        (reply,) = _sampled(server, "a", **{mended: None})
        assert reply.text and refused not in server.log[-1].body


def test_a_refused_field_of_the_extra_body_is_named():
    with FakeEndpoint(refuses={"min_p": "property 'min_p' is unsupported, seed or not"}) as server:
        with pytest.raises(EndpointError, match=r"`min_p` is refused\. Take `min_p` out of `extra_body`"):
            _sampled(server, "a", extra={"min_p": 0.1})
        assert _sampled(server, "a")[0].text


def test_a_token_limit_that_is_too_large_is_no_wrong_name():
    told = "max_tokens is too large: 50. This model supports at most 40 completion tokens"
    with FakeEndpoint(refuses={"max_tokens": told}) as server, pytest.raises(EndpointError, match="a smaller"):
        _sampled(server, "a")


def test_a_model_that_only_streams_is_asked_to_stream():
    with FakeEndpoint(stream_only=True) as server:
        replies = _sampled(server, "a", "b")
        assert [entry.fault for entry in server.log] == ["option", None, None]
    assert [reply.text for reply in replies] == [answer_text(entry.body) for entry in server.log[1:]]
    assert all((reply.completion_tokens, reply.finish_reason) == (17, "stop") for reply in replies)


def test_a_stream_that_is_asked_for_is_read(server):
    (reply,) = _sampled(server, "stream, please", extra={"stream": True})
    assert reply.text == answer_text(server.log[-1].body) and reply.prompt_tokens == 5


def test_a_server_that_takes_no_stream_options_streams_without_usage():
    with FakeEndpoint(refuses={"stream_options": "unknown field: stream_options"}) as server:
        (reply,) = _sampled(server, "a", extra={"stream": True})
        assert reply.text.startswith("Context: ") and reply.completion_tokens == 50  # no more than was allowed
        own = {"stream": True, "stream_options": {"include_usage": True}}  # of the user's `extra_body`
        (reply,) = _sampled(server, "b", extra=own)
    assert reply.text.startswith("Context: ")


@pytest.mark.parametrize(("mark", "kind"), [("truncated", "bad_body"), ("error200", "server_error")])
def test_a_stream_with_a_fault_is_asked_again(server, mark, kind):
    prompt = f"streamed [[{mark}]]"
    (reply,) = _sampled(server, prompt, extra={"stream": True})
    assert reply.text.startswith("Context: ") and server.asked()[prompt] == 2


def test_a_plain_prompt_is_continued_without_a_template(server):
    request = Request((("user", "Once"),), "tiny", Sampling(0, None, 5, None, {"stop": ["."]}), chat=False)

    async def ask():
        generator = OpenAIGenerator("tiny", server.url)
        reply = await generator.reply(request)
        await generator.close()
        return reply

    assert asyncio.run(ask()).text.startswith("Context: ")
    body = {"model": "tiny", "prompt": "Once", "temperature": 0.0, "max_tokens": 5, "stop": ["."]}
    assert server.log[-1].body == body


def test_a_page_for_browsers_is_found_before_anything_is_asked():
    async def page(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = b"<html><title>Sign in</title></html>"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async def check():
        site = await asyncio.start_server(page, "127.0.0.1", 0)
        generator = OpenAIGenerator("tiny", f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}")
        with pytest.raises(EndpointError, match="Set the URL to the base"):
            await generator.check()
        await generator.close()
        site.close()

    asyncio.run(check())


def test_a_request_that_always_fails_ends_after_its_attempts(server):
    (error, fine), faults = _ask(server, "[[reset*99]]", "fine", max_attempts=3)
    assert isinstance(error, NoReplyError) and error.kind == "reset"
    assert len(faults) == 3 and fine.text


@pytest.mark.parametrize(("mark", "says"), [("401", "key is refused"), ("402", "quota"), ("404", "no such model")])
def test_what_no_request_survives_stops_the_run(server, mark, says):
    (error,), _ = _ask(server, f"[[{mark}*9]]")
    assert isinstance(error, EndpointError) and says in str(error)


def test_another_model_all_the_time_stops_the_run(server):
    (error,), faults = _ask(server, "[[wrong*9]]")
    assert isinstance(error, EndpointError) and "accept_models" in str(error) and len(faults) == 3
    (reply,), _ = _ask(server, "[[wrong*9]] again", accept_models=["another"])
    assert reply.model == "another"


def test_a_busy_server_costs_no_attempts():
    with FakeEndpoint(slots=3, latency=(0.02, 0.05)) as server:
        replies, faults = _ask(server, *(str(number) for number in range(60)), max_attempts=1)
    assert all(reply.text for reply in replies)
    assert {fault.kind for fault in faults} <= {"rate_limit"}
    assert server.most_at_once == 3


def test_several_endpoints_share_the_load_and_one_may_die():
    with FakeEndpoint(slots=4, latency=(0.02, 0.02)) as one, FakeEndpoint(slots=4, latency=(0.02, 0.02)) as two:
        two_url = two.url

        async def ask():
            generator = OpenAIGenerator("tiny", [one.url, two_url], max_concurrency=4)
            await generator.check()
            first = await asyncio.gather(*(generator.reply(_request(f"a{n}")) for n in range(40)))
            await asyncio.to_thread(two.stop)
            second = await asyncio.gather(*(generator.reply(_request(f"b{n}")) for n in range(40)))
            await generator.close()
            return first + second

        replies = asyncio.run(ask())
    assert len(replies) == 80 and all(reply.text for reply in replies)
    assert len(one.log) >= 50 and len(two.log) >= 10


def test_no_endpoint_for_too_long_stops_the_run():
    with FakeEndpoint() as server:
        pass
    (error,), faults = _ask(server, "anyone?", patience=0.3)
    assert isinstance(error, EndpointError) and "No endpoint has answered" in str(error)
    assert {fault.kind for fault in faults} == {"unreachable"} and not any(fault.prompt_tokens for fault in faults)


def test_drain_sends_nothing_more_and_loses_nothing_on_its_way():
    with FakeEndpoint(latency=(0.3, 0.3)) as server:

        async def ask():
            generator = OpenAIGenerator("tiny", server.url, max_concurrency=2)
            tasks = [asyncio.create_task(generator.reply(_request(str(number)))) for number in range(5)]
            while len(server.log) < 2:
                await asyncio.sleep(0.01)
            generator.drain()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            await generator.close()
            return outcomes

        outcomes = asyncio.run(ask())
    assert len(server.log) == 2
    assert [isinstance(outcome, RunStopped) for outcome in outcomes] == [False, False, True, True, True]


def _check(endpoints, model="tiny"):
    async def check():
        generator = OpenAIGenerator(model, endpoints)
        try:
            await generator.check()
        finally:
            await generator.close()

    asyncio.run(check())


@pytest.mark.parametrize("models_route", [True, False])
def test_the_check_is_free_and_finds_what_is_wrong(models_route, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    with FakeEndpoint(key="right", models_route=models_route) as server:
        _check(server.url)
        with pytest.raises(EndpointError, match="no such model or route"):
            _check(server.url, model="large")
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-key-42")
        with pytest.raises(EndpointError, match="key is refused") as caught:
            _check(server.url)
        assert "wrong-key-42" not in str(caught.value) and caught.value.__cause__ is None
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        with pytest.raises(EndpointError, match="no such model or route"):
            _check(f"{server.url}/deeper")
        url = server.url
        assert not server.log  # nothing that could have cost anything
    with pytest.raises(EndpointError, match="cannot be reached"):
        _check(url)


def test_a_login_in_the_url_is_sent_and_never_shown(caplog):
    caplog.set_level("DEBUG")
    with FakeEndpoint() as server:
        url = server.url.replace("http://", "http://me:hunter2@")
        (reply,), _ = _ask(Endpoint(url), "Hi")  # `_ask` takes anything with a url
        assert reply.text and server.log[-1].headers["authorization"] == "Basic bWU6aHVudGVyMg=="
    with pytest.raises(EndpointError) as caught:
        _check(url)
    for written in (str(caught.value), repr(Endpoint(url)), caplog.text):
        assert "hunter2" not in written and "bWU6" not in written


def test_a_key_is_sent_and_never_shown(caplog, monkeypatch):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-9000")
    with FakeEndpoint(key="sesame-9000") as server:
        (reply,), _ = _ask(server, "Hi")
    assert reply.text and caplog.text and "sesame-9000" not in caplog.text


def test_bad_settings_are_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="max_concurrency"):
        OpenAIGenerator("tiny", "http://localhost", max_concurrency=0)
    with pytest.raises(ValueError, match="at least one URL"):
        OpenAIGenerator("tiny", [])
    with pytest.raises(ValueError, match="must be a URL") as caught:
        OpenAIGenerator("tiny", "localhost:8000/v1?key=hunter2")
    assert "hunter2" not in str(caught.value)
