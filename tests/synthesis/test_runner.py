"""The runner: each key asked once, results in order, every way to stop."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import pytest
from fake_endpoint import FakeEndpoint

from hf_longalign.endpoint.protocol import (
    EndpointError,
    Fault,
    GenerationError,
    NoReplyError,
    Reply,
    Request,
    RunStopped,
    Sampling,
)
from hf_longalign.synthesis.budget import Budget, BudgetExceeded
from hf_longalign.synthesis.journal import Journal, JournalError
from hf_longalign.synthesis.runner import Progress, Runner


class Echo:
    """Replies with the prompt in capitals, the later prompts first; `script` raises or spends for some prompts."""

    model = "echo"

    def __init__(self, script=None, concurrency=4):
        self.concurrency = concurrency
        self.script = script or {}
        self.asked = []
        self.at_once = self.most_at_once = self.checked = self.closed = 0
        self.draining = False

    async def check(self):
        self.checked += 1

    async def reply(self, request, notify=None):
        if self.draining:
            raise RunStopped("stopping")
        prompt = request.messages[0][1]
        self.asked.append(prompt)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.02 if len(self.asked) % 2 else 0.01)
        self.at_once -= 1
        for event in self.script.get(prompt, ()):
            if isinstance(event, BaseException):
                raise event
            await notify(event)
        return Reply(prompt.upper(), "stop", 10, 10, "echo")

    def drain(self):
        self.draining = True

    async def close(self):
        self.closed += 1


def _request(prompt):
    return Request((("user", prompt),), "echo", Sampling(max_tokens=10))


async def _shout(prompt, ask):
    return (await ask(_request(prompt))).text


def _run(journal, echo, prompts, **options):
    return Runner(echo, journal, **options).run(partial(_shout, prompt) for prompt in prompts)


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal


def test_results_come_in_the_order_of_the_jobs(journal):
    prompts = [f"p{number}" for number in range(50)]
    echo = Echo()
    assert _run(journal, echo, prompts) == [prompt.upper() for prompt in prompts]
    assert sorted(echo.asked) == sorted(prompts) and echo.most_at_once > 1
    assert (echo.checked, echo.closed) == (1, 1)


def test_what_is_in_the_journal_is_not_asked_and_needs_no_endpoint(journal):
    _run(journal, Echo(), ["a", "b"])
    echo = Echo()
    assert _run(journal, echo, ["b", "a"]) == ["B", "A"]
    assert (echo.asked, echo.checked) == ([], 0)


def test_the_same_request_at_the_same_time_is_asked_once(journal):
    echo = Echo()
    assert _run(journal, echo, ["a"] * 20) == ["A"] * 20
    assert echo.asked == ["a"]


def test_a_reply_is_in_the_journal_before_the_job_has_it(journal):
    async def job(ask):
        reply = await ask(_request("a"))
        assert journal.get(_request("a").key) == reply
        return True

    assert Runner(Echo(), journal).run([job]) == [True]


def test_jobs_are_made_when_they_are_needed(journal):
    made = []

    def jobs():
        for number in range(100):
            made.append(number)
            assert len(made) - len(echo.asked) <= 2 * echo.concurrency + 1
            yield partial(_shout, str(number))

    echo = Echo()
    assert len(Runner(echo, journal).run(jobs())) == 100


def test_it_runs_inside_a_running_loop_as_in_a_notebook(journal):
    async def cell():
        return _run(journal, Echo(), ["a"])

    assert asyncio.run(cell()) == ["A"]


def _interrupted_in_a_notebook(runner, echo, times=1):
    """Run jobs in a running loop, and press Ctrl-C once something was asked, a second time once the run stops."""

    def interrupt():
        for happened in (lambda: echo.asked, lambda: echo.draining)[:times]:
            while not happened():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    async def cell():
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            runner.run(partial(_shout, f"p{number}") for number in range(1000))

    # A notebook's; a shell that runs the tests in the background has Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()


def test_ctrl_c_in_a_notebook_keeps_the_replies_on_their_way(journal):
    echo = Echo()
    _interrupted_in_a_notebook(Runner(echo, journal), echo)
    assert 0 < len(echo.asked) < 1000
    assert all(journal.get(_request(prompt).key) for prompt in echo.asked)


def test_a_second_ctrl_c_in_a_notebook_waits_for_no_reply(journal):
    class Hanging(Echo):
        async def reply(self, request, notify=None):
            self.asked.append(request)
            await asyncio.Event().wait()

    echo = Hanging()
    _interrupted_in_a_notebook(Runner(echo, journal), echo, times=2)
    assert echo.closed == 1 and len(echo.asked) == echo.concurrency * 2


def test_an_interrupt_before_the_first_request_is_not_lost(journal):
    echo = Echo()
    runner = Runner(echo, journal)

    async def job(ask):
        return (await ask(_request("late"))).text

    def interrupted():  # as if the interrupt came while the jobs were being made
        runner._main = None
        runner._interrupt_from_outside(KeyboardInterrupt())
        yield job

    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted())
    assert echo.asked == []


def test_a_runner_runs_again(journal):
    echo = Echo()
    runner = Runner(echo, journal)
    assert runner.run([partial(_shout, "a")]) == ["A"]
    assert runner.run([partial(_shout, "b")]) == ["B"]


def test_a_filtered_reply_is_an_error_today_and_tomorrow_and_asked_once(journal):
    async def job(ask):
        try:
            return (await ask(_request("bad"))).text
        except GenerationError as error:
            return error.kind

    refused = GenerationError("content_filter", "no")
    echo = Echo({"bad": [refused]})
    assert Runner(echo, journal).run([job]) == ["content_filter"]
    assert Runner(echo, journal).run([job]) == ["content_filter"]
    assert echo.asked == ["bad"]


def test_a_bad_request_is_the_job_s_to_judge_and_not_kept(journal):
    async def job(ask):
        with pytest.raises(GenerationError, match="too long"):
            await ask(_request("bad"))
        return "rejected"

    echo = Echo({"bad": [GenerationError("bad_request", "too long")]})
    for _ in range(2):
        assert Runner(echo, journal).run([job, partial(_shout, "a")]) == ["rejected", "A"]
    assert echo.asked.count("bad") == 2 and echo.asked.count("a") == 1


def test_a_run_whose_requests_are_all_refused_stops_and_a_mended_one_goes_on(journal):
    async def job(prompt, ask):
        try:
            return (await ask(_request(prompt))).text
        except GenerationError as error:
            return error.kind

    def run(echo, prompts):
        return Runner(echo, journal).run(partial(job, prompt) for prompt in prompts)

    refused = GenerationError("bad_request", "no such field")
    for number in (3, 500):
        echo = Echo({f"p{place}": [refused] for place in range(number)})
        with pytest.raises(EndpointError, match=r"Every request is refused\. The last: no such field"):
            run(echo, echo.script)
        assert len(echo.asked) <= 20 + 2 * echo.concurrency
    assert run(Echo(), ["p0", "p1"]) == ["P0", "P1"]
    # One that is refused where others are served is the job's to judge, whoever served them and when.
    assert run(Echo({"p2": [refused]}), ["p2"]) == ["bad_request"]


def test_a_run_whose_replies_are_all_unusable_stops_and_a_rerun_goes_on(journal):
    async def job(prompt, ask):
        await ask(_request(prompt))
        runner.count("unusable", "parse: no context", _request(prompt).key)

    runner = Runner(Echo(), journal)
    prompts = [f"p{number}" for number in range(300)]
    with pytest.raises(RunStopped, match=r"last 20 replies can be used\. The first: parse: no context, in 'P\d+'"):
        runner.run(partial(job, prompt) for prompt in prompts)
    paid = journal.totals().replies
    assert 20 <= paid <= 20 + 2 * Echo().concurrency
    runner = Runner(Echo(), journal)
    with contextlib.suppress(RunStopped):
        runner.run(partial(job, prompt) for prompt in prompts)
    assert journal.totals().replies > paid + 200


def test_without_a_reply_the_others_go_on_and_the_run_is_not_done(journal):
    echo = Echo({"b": [NoReplyError("reset", "no reply")]})
    with pytest.raises(RunStopped, match=r"1 seeds got no reply \(reset: 1\)"):
        _run(journal, echo, "abc")
    assert _run(journal, Echo(), "abc") == ["A", "B", "C"]
    assert sorted(echo.asked) == ["a", "b", "c"]


def test_many_without_a_reply_end_the_run(journal):
    prompts = [f"p{number}" for number in range(1000)]
    echo = Echo({prompt: [NoReplyError("reset", "no reply")] for prompt in prompts})
    with pytest.raises(RunStopped, match="20 requests in a row"):
        _run(journal, echo, prompts)
    assert len(echo.asked) < 50


@pytest.mark.parametrize("error", [EndpointError("gone"), JournalError("full"), ZeroDivisionError("a bug")])
def test_an_error_of_the_run_is_raised_once_the_replies_on_their_way_are_kept(journal, error):
    echo = Echo({"p5": [error]})
    with pytest.raises(type(error), match=str(error)):
        _run(journal, echo, [f"p{number}" for number in range(100)])
    assert 5 < len(echo.asked) < 20
    assert all(journal.get(_request(prompt).key) for prompt in echo.asked if prompt != "p5")
    assert echo.draining and echo.closed


def test_an_error_in_a_job_is_raised(journal):
    async def job(ask):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        Runner(Echo(), journal).run([job])


def test_a_budget_is_never_passed_and_what_is_left_is_used(journal):
    prompts = [f"p{number:02}" for number in range(100)]
    most = _request("p00").most_prompt_tokens + 10
    budget = Budget(tokens=1000)
    echo = Echo()
    with pytest.raises(BudgetExceeded, match="1,000 tokens"):
        _run(journal, echo, prompts, budget=budget)
    assert 1000 - most < journal.totals().spend.tokens <= 1000
    assert len(_run(journal, Echo(), prompts, budget=Budget(tokens=5000))) == 100
    assert journal.totals().spend.tokens == 20 * 100


def test_what_faults_cost_is_spent_too(journal):
    echo = Echo({"a": [Fault("wrong_model", 30, 5), Fault("reset")]})
    progress = Progress(show=False)
    assert _run(journal, echo, "a", progress=progress, budget=Budget(1000, None, 1.0, 2.0)) == ["A"]
    totals = journal.totals()
    assert totals.spend.tokens == 55 and totals.faults == 1
    assert totals.spend.usd == pytest.approx((40 * 1.0 + 15 * 2.0) / 1e6)
    assert progress.faults == {"wrong_model": 1, "reset": 1} and progress.spend == totals.spend


def test_a_fault_that_leaves_no_room_stops_before_the_next_attempt(journal):
    echo = Echo({"a": [Fault("wrong_model", 80, 10)]})
    with pytest.raises(BudgetExceeded):
        _run(journal, echo, "a", budget=Budget(tokens=150))
    assert journal.totals().spend.tokens == 90 and journal.get(_request("a").key) is None


def test_two_that_wait_for_each_other_s_room_do_not_wait_forever(journal):
    wasted = Fault("wrong_model", 80, 10)
    echo = Echo({"a": [wasted], "b": [wasted]})
    with pytest.raises(BudgetExceeded):
        _run(journal, echo, "ab", budget=Budget(tokens=250))
    assert journal.totals().spend.tokens == 180


def test_a_reply_that_another_process_got_between_two_attempts_is_taken(journal, tmp_path):
    with Journal(tmp_path / "journal.sqlite") as other:
        theirs = Reply("THEIRS", "stop", 1, 1, "echo")

        class Meanwhile(Echo):
            async def reply(self, request, notify=None):
                other.put(request, theirs)
                await notify(Fault("wrong_model", 5, 5))
                raise AssertionError("asked again")

        assert _run(journal, Meanwhile(), "a") == ["THEIRS"]


def test_progress_counts_what_happened(journal):
    journal.put(_request("old"), Reply("OLD", "stop", 1, 1, "echo"))
    progress = Progress(total=3, show=False)
    _run(journal, Echo(), ["old", "new", "newer"], progress=progress)
    assert progress.counts == {"done": 3, "asked": 2, "journaled": 1} and progress.spend.tokens == 40
    assert str(progress) == "contexts: 3/3 done, 0 rejected, 0 retried, 0 faults, 40 tokens, $0.00 cost"


def test_every_fault_at_once_on_a_crowded_endpoint(journal):
    pytest.importorskip("openai", reason="needs hf_longalign[synthesis]")
    from hf_longalign.endpoint.client import OpenAIGenerator

    passing = ["429", "429bare", "500", "503", "reset", "truncated", "cut", "html", "error200", "nochoices", "wrong"]
    passing += ["limit200", "errorfinish", "errorchoice", "nullchoices", "nofinish", "empty"]
    marks = [*passing, "ended", "length", "unparsable", "nousage", "filter", "filter400", "400", "odd400"]
    prompts = [f"{number} [[{mark}]]" for number, mark in enumerate(marks * 5)]

    async def job(prompt, ask):
        try:
            return (await ask(Request((("user", prompt),), "tiny", Sampling(max_tokens=20)))).text
        except GenerationError as error:
            return error.kind

    progress = Progress(show=False)
    with FakeEndpoint(slots=8, latency=(0.01, 0.05)) as server:
        generator = OpenAIGenerator("tiny", server.url, max_concurrency=32)
        texts = Runner(generator, journal, progress=progress).run(partial(job, prompt) for prompt in prompts)
        asked = Counter(entry.prompt for entry in server.log if entry.fault != "full")
    ends = {"ended": "", "unparsable": "As you wish.", "400": "too_long", "odd400": "bad_request"}
    ends |= dict.fromkeys(("filter", "filter400"), "content_filter")
    for mark, prompt, text in zip(marks * 5, prompts, texts, strict=True):
        assert text == ends[mark] if mark in ends else text.startswith("Context: ")
        assert asked[prompt] == (2 if mark in passing else 1)
    full = progress.faults.pop("rate_limit")
    assert full >= 15  # 429 as scripted, and for want of a slot
    kinds = {"server_error": 20, "overloaded": 5, "reset": 10, "bad_body": 15, "wrong_model": 5}
    assert progress.faults == {**kinds, "web_page": 5, "empty": 10}
    assert journal.totals().replies == 5 * (len(marks) - 2)
    # Those that may have cost something: all but a page, an error in place of a completion, and what is overloaded.
    assert journal.totals().faults == 10 + 10 + 15 + 5 + 10


def test_no_key_password_or_path_is_left_anywhere(tmp_path, monkeypatch, capfd):
    pytest.importorskip("openai", reason="needs hf_longalign[synthesis]")
    from hf_longalign.endpoint.client import OpenAIGenerator

    monkeypatch.setenv("OPENAI_API_KEY", "sesame-9000")
    model = str(tmp_path / "secret-folder" / "llama")
    with FakeEndpoint(key="sesame-9000", model=model) as server, Journal(tmp_path / "journal.sqlite") as journal:
        generator = OpenAIGenerator(model, server.url)
        request = Request((("user", "Hi [[500]]"),), generator.model)
        runner = Runner(generator, journal)

        async def job(ask):
            return await ask(request)

        (reply,) = runner.run([job])
        assert reply.model == "llama" and generator.model.startswith("llama-")
        journal.export(tmp_path / "journal.jsonl")
        refused = Request((("user", "[[400*9]]"),), generator.model)
        with pytest.raises(GenerationError) as caught:
            runner.run([lambda ask: ask(refused)])
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir()) + str(caught.value).encode()
    written += "".join(capfd.readouterr()).encode()
    assert b"llama-" in written
    for secret in ("sesame-9000", "secret-folder", str(tmp_path)):
        assert secret.encode() not in written


def test_nothing_is_printed_off_a_terminal(tmp_path):
    code = (
        "from hf_longalign.synthesis.runner import Progress\nprogress = Progress(3); progress.done(); progress.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
