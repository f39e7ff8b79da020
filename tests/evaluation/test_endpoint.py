"""Answers through an endpoint: what is sent, how faults are met, what an error says and what it must not say."""

import asyncio
import json
import logging
import re

import pytest
from fake_endpoint import FakeEndpoint
from served import transformers_serve
from tiny_chat import make_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longalign.cli import main
from hf_longalign.evaluation.endpoint import EndpointError, EndpointGenerator
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.prompt import Prompt, token_counter


pytest.importorskip("openai", reason='needs pip install "hf_longalign[eval]"')


def prompt_of(text, **fields):
    return Prompt("needle", "single", 0, text, ("a",), fields.pop("max_new_tokens", 16), **fields)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_chat_and_plain_prompts_take_their_routes():
    bodies = {}

    class Noted(FakeEndpoint):
        async def _answer(self, writer, method, path, headers, raw):
            bodies[path] = json.loads(raw or "null")
            return await super()._answer(writer, method, path, headers, raw)

        def _completion(self, entry, kind):
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            usage["prompt_tokens_details"] = {"cached_tokens": 3}
            return {**super()._completion(entry, kind), "usage": usage}

    prompts = [prompt_of("b", stop=("END",)), prompt_of("a", chat=False, max_new_tokens=7)]
    with Noted(reply=lambda body: "Well, END and more") as server:
        generator = EndpointGenerator("tiny", f"http://127.0.0.1:{server.port}")
        found = dict(generator.generate(prompts))
    assert found[prompts[0]].text == "Well, " and found[prompts[0]].tokens == 2
    assert found[prompts[1]].text == "Well, END and more"
    assert bodies["/v1/chat/completions"] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "b"}],
        "temperature": 0.0,
        "max_tokens": 16,
        "stop": ["END"],
    }
    assert bodies["/v1/completions"] == {"model": "tiny", "prompt": "a", "temperature": 0.0, "max_tokens": 7}
    stats = generator.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (10, 6, 4) and stats.seconds > 0
    assert list(generator.generate([])) == []


def test_a_login_in_the_url_is_sent_and_not_shown(caplog, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with FakeEndpoint() as server, caplog.at_level(logging.DEBUG):
        generator = EndpointGenerator("tiny", f"http://me:s%40cret@127.0.0.1:{server.port}/v1/")
        list(generator.generate([prompt_of("a")]))
    assert server.log[0].headers["authorization"] == "Basic bWU6c0BjcmV0"
    assert "cret" not in caplog.text and "bWU6c0BjcmV0" not in caplog.text


def test_no_more_than_so_many_at_once_and_prompts_that_share_stand_together():
    prompts = [prompt_of(f"{kind} {number}") for number in range(10) for kind in "ab"]
    with FakeEndpoint(slots=3, latency=(0.01, 0.02)) as server:
        found = dict(EndpointGenerator("tiny", server.url, max_concurrency=3).generate(prompts))
    assert set(found) == set(prompts) and server.most_at_once == 3
    assert not any(entry.fault for entry in server.log)
    order = [entry.prompt[0] for entry in server.log]
    assert order[:8] == ["a"] * 8 and order[-8:] == ["b"] * 8


@pytest.mark.parametrize(
    "fault", ["429", "500", "503", "reset", "cut", "html", "nullchoices", "error200", "errorfinish"]
)
def test_faults_that_pass_are_asked_again(fault):
    prompts = [prompt_of(f"[[{fault}]] one"), prompt_of("two")]
    with FakeEndpoint() as server:
        found = dict(EndpointGenerator("tiny", server.url).generate(prompts))
    assert set(found) == set(prompts) and server.asked()[prompts[0].text] == 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("400", "This model's maximum context length is 8192 tokens"),
        ("odd400", "Invalid value for field 'logit_bias'"),
        ("401", "Set it in the environment variable EVAL_KEY"),
        ("404", "Set `model` to one it serves"),
        ("500*9", "2 attempts, the last: server_error: oops"),
        ("hang*9", r"the last: timeout: nothing in 0\.5 s"),
        ("html*9", "web_page: a page 'Sign in'"),
        ("nochoices*9", "bad_body"),
        ("error200*9", "server_error: upstream failed"),
    ],
)
def test_an_error_says_what_the_server_said_after_the_finished_answers(fault, told):
    prompts = [prompt_of("a fine"), prompt_of(f"b [[{fault}]]"), prompt_of("c fine")]
    done = []
    with FakeEndpoint(latency=(0.05, 0.05)) as server:
        generator = EndpointGenerator(
            "tiny", server.url, api_key_env="EVAL_KEY", max_concurrency=3, timeout=0.5, max_attempts=2
        )
        with pytest.raises(EndpointError, match=told):
            done += (prompt.text for prompt, _ in generator.generate(prompts))
    # A list that is extended keeps what came before the error.
    assert sorted(done) == ["a fine", "c fine"]


def test_after_a_failure_nothing_more_is_sent():
    prompts = [prompt_of("[[400]] first"), *(prompt_of(f"later {number}") for number in range(20))]
    with FakeEndpoint() as server:
        with pytest.raises(EndpointError):
            list(EndpointGenerator("tiny", server.url, max_concurrency=1).generate(prompts))
        assert len(server.log) == 1


def test_a_caller_may_leave_early_and_may_have_a_running_event_loop():
    prompts = [prompt_of("a"), prompt_of("b [[hang*9]]")]
    with FakeEndpoint() as server:
        generator = EndpointGenerator("tiny", server.url)

        async def first():
            answers = generator.generate(prompts)
            prompt, _ = next(answers)
            answers.close()  # does not wait for the other
            return prompt

        assert asyncio.run(first()) == prompts[0]


def test_an_absent_server_and_a_refused_key(monkeypatch, caplog):
    monkeypatch.setenv("EVAL_KEY", "sk-very-secret")
    with pytest.raises(EndpointError, match="cannot be reached"):
        list(EndpointGenerator("tiny", "http://127.0.0.1:9").generate([prompt_of("a")]))
    with FakeEndpoint(key="sk-right") as server, caplog.at_level(logging.DEBUG):
        generator = EndpointGenerator("tiny", server.url, api_key_env="EVAL_KEY")
        with pytest.raises(EndpointError, match="the key is refused") as caught:
            list(generator.generate([prompt_of("a")]))
    assert "very-secret" not in str(caught.value) and "***" in str(caught.value)
    assert "very-secret" not in caplog.text
    with FakeEndpoint(key="sk-very-secret") as server:
        generator = EndpointGenerator("tiny", server.url, api_key_env="EVAL_KEY")
        assert len(list(generator.generate([prompt_of("a")]))) == 1


def test_answers_without_content_are_empty_and_told(caplog):
    class Silent(FakeEndpoint):
        def _completion(self, entry, kind):
            completion = super()._completion(entry, kind)
            completion["choices"][0]["message"]["content"] = None
            return completion

    with Silent() as server:
        ((_, completion),) = EndpointGenerator("tiny", server.url).generate([prompt_of("a")])
    assert completion.text == "" and completion.tokens == 17 and "has no content" in caplog.text


@pytest.mark.parametrize("mark", ["empty", "ended"])
def test_a_greedy_answer_may_be_empty_and_is_asked_for_once(mark):
    with FakeEndpoint() as server:
        ((_, completion),) = EndpointGenerator("tiny", server.url).generate([prompt_of(f"[[{mark}*9]]")])
        assert completion.text == "" and len(server.log) == 1


def test_where_a_server_does_not_say_no_tokens_are_counted():
    with FakeEndpoint() as server:
        generator = EndpointGenerator("tiny", server.url)
        ((_, completion),) = generator.generate([prompt_of("[[nousage]]")])
    assert completion.tokens == generator.stats.prompt_tokens == 0


def test_a_model_that_takes_no_temperature_is_refused():
    refuses = {"temperature": "'temperature' does not support 0.0"}
    told = pytest.raises(EndpointError, match=r"at temperature 0.*does not support 0\.0")
    with FakeEndpoint(refuses=refuses) as server, told:
        list(EndpointGenerator("tiny", server.url).generate([prompt_of("a")]))


def words(text):
    return len(text.split())


def finds(reach):
    """A model that finds a pass key no more than `reach` words back."""

    def reply(body):
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        key = re.search(r"pass key is (\d{5})\.", text)
        return f"It is {key[1]}." if key and words(text) <= reach else "I do not know."

    return reply


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_is_asked_what_it_can_be_asked(chat, caplog):
    prompt = prompt_of("word " * 4000, chat=chat)
    listing = {"max_model_len": 5000, "root": "/models/org/base"}
    with FakeEndpoint(reply=finds(8000), listing=listing) as server:
        facts = EndpointGenerator("tiny", server.url).look(prompt, words)
        assert (facts.reach, facts.base, facts.short, facts.long) == (5000, "base", True, True)
        # As long as the longest prompt with its answer, short of it by less than a paragraph and the answer.
        assert 4016 - 32 - 150 < facts.sent <= 4016 - 32
        assert facts.settings()["range of the server"] == "5,000 tokens"
    with FakeEndpoint(reply=finds(1000)) as server:
        facts = EndpointGenerator("tiny", server.url).look(prompt, words)
        assert (facts.reach, facts.short, facts.long) == (None, True, False) and "RoPE" in caplog.text
        assert "the range may not be served" in facts.settings()[f"pass key, {facts.sent:,} tokens back"]
    with FakeEndpoint(reply=finds(0)) as server:
        facts = EndpointGenerator("tiny", server.url).look(prompt, words)
        assert "says nothing of the range" in str(facts.settings())


def test_a_range_that_is_smaller_than_the_prompts_is_refused_by_name():
    prompt = prompt_of("word " * 4000)
    with FakeEndpoint(listing={"max_model_len": 4015}) as server:
        with pytest.raises(
            ValueError, match=r"`lengths`: .* got 4,016 tokens, and .* range of 4,015.*max-model-len 4016"
        ):
            EndpointGenerator("tiny", server.url).look(prompt, words)
        assert not server.log
    with FakeEndpoint(listing={"max_model_len": 4016}) as server:
        EndpointGenerator("tiny", server.url).look(prompt, words)

    class Short(FakeEndpoint):
        def _fault(self, prompt):
            return "400" if words(prompt) > 1000 else None

    with Short() as server, pytest.raises(ValueError, match=r"`lengths`.* the server says: This model's maximum"):
        EndpointGenerator("tiny", server.url).look(prompt, words)

    class Cuts(FakeEndpoint):
        def _completion(self, entry, kind):
            completion = super()._completion(entry, kind)
            completion["usage"]["prompt_tokens"] = min(2048, completion["usage"]["prompt_tokens"])
            return completion

    with Cuts() as server, pytest.raises(ValueError, match=r"`lengths`.* tokens sent the server read 2,048"):
        EndpointGenerator("tiny", server.url).look(prompt, words)


def test_an_unknown_model_is_refused_in_the_server_s_words():
    with FakeEndpoint() as server, pytest.raises(EndpointError, match=r"`large` does not exist.* It serves: tiny"):
        list(EndpointGenerator("large", server.url).generate([prompt_of("a")]))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://me:pw@host/v1?key=1"])
def test_bad_urls_are_refused_without_their_login(url):
    with pytest.raises(ValueError, match="`endpoint` must be a URL") as caught:
        EndpointGenerator("tiny", url)
    assert "pw" not in str(caught.value) and "key" not in str(caught.value)
    with pytest.raises(ValueError, match="`max_concurrency` must be"):
        EndpointGenerator("tiny", "http://host", max_concurrency=0)


def test_the_command_reports_what_the_server_tells_and_asks_it_once(tmp_path, capsys):
    folder = make_tiny_chat(tmp_path / "tiny")

    class Counts(FakeEndpoint):
        def _completion(self, entry, kind):
            completion = super()._completion(entry, kind)
            completion["usage"]["prompt_tokens"] = 480
            return completion

    command = [
        "evaluate",
        "--model",
        str(folder),
        "--suites",
        "needle",
        "--needle_tasks",
        "single",
        "--lengths",
        "512",
    ]
    command += ["--depths", "0.5", "--samples", "2", "--max_new_tokens", "16", "--output_dir"]
    with Counts(model=str(folder), listing={"max_model_len": 512}, reply=finds(10_000)) as server:
        for _ in range(2):
            assert main([*command, str(tmp_path / "out"), "--endpoint", server.url]) == 0
        assert len(server.log) == 2 + 2  # two probes, two questions
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings["base: range of the server"] == "512 tokens"
    assert [value for name, value in settings.items() if "pass key" in name] == ["found"]
    with Counts(model=str(folder), listing={"max_model_len": 400}) as server:
        assert main([*command, str(tmp_path / "short"), "--endpoint", server.url])
        assert "`lengths`: the longest prompt" in capsys.readouterr().err and not server.log


def test_a_real_server_answers_as_the_local_generator(tmp_path):
    folder = make_tiny_chat(tmp_path / "tiny")
    prompts = [prompt_of("Which town was warned first?"), prompt_of("Context: a long text about", chat=False)]
    with transformers_serve(folder, tmp_path) as url:
        served = dict(EndpointGenerator(str(folder), url).generate(prompts))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        facts = EndpointGenerator(str(folder), url).look(prompts[0], token_counter(tokenizer, chat=True))
        with pytest.raises(EndpointError, match=f"Server is pinned to.*{folder.name}"):
            list(EndpointGenerator("org/other", url).generate(prompts))
    # It says nothing of its range, and reads what it is sent.
    assert (facts.reach, facts.base) == (None, None) and facts.read == facts.sent
    model = AutoModelForCausalLM.from_pretrained(folder)
    local = dict(LocalGenerator(model, tokenizer).generate(prompts))
    assert {p.text: c.text for p, c in served.items()} == {p.text: c.text for p, c in local.items()}
