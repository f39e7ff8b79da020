"""Batches: out of order, in part, refused, expired; killed at any moment, and nothing is paid for twice."""

import json
import multiprocessing
import random
import re
import sys
import time

import pytest
from datasets import load_dataset
from fake_batches import FakeBatches
from fake_endpoint import answer_text

from hf_longalign.cli import main
from hf_longalign.endpoint import (
    BatchGenerator,
    CommandBatches,
    EndpointError,
    GenerationError,
    HostedBatches,
    Request,
    RunStopped,
    Sampling,
    SwitchGenerator,
)
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.runner import Runner
from hf_longalign.synthesis.tables import JournalLedger

from .fakes import FakeGenerator, make_pairs, make_text
from .kill_client import run_batches


pytest.importorskip("openai", reason="needs hf_longalign[synthesis]")

PRICES = Budget(prompt_price=1.0, completion_price=10.0)


def request(prompt, **sampling):
    return Request((("user", prompt),), "tiny", Sampling(**sampling))


def generator_of(server, **options):
    batches = HostedBatches(server.url, poll_seconds=0.01)
    return BatchGenerator("tiny", batches, **{"linger": 0.02, **options})


def ask_all(folder, generator, prompts, budget=PRICES):
    """The reply, or the error's kind, for each prompt; and the journal's totals."""

    async def job(prompt, ask):
        try:
            return (await ask(request(prompt))).text
        except GenerationError as error:
            return error.kind

    with Journal(folder / "journal.sqlite") as journal:
        runner = Runner(generator, journal, budget=budget)
        texts = runner.run([lambda ask, prompt=prompt: job(prompt, ask) for prompt in prompts])
        left = JournalLedger(journal, budget).open_batches()
        return texts, journal.totals(), left


def text_of(prompt):
    return answer_text({"messages": [{"role": "user", "content": prompt}], "seed": 0})


def test_replies_come_out_of_order_and_go_to_their_requests_at_half_the_price(tmp_path):
    prompts = [f"seed {n}" for n in range(30)]
    with FakeBatches() as server:
        texts, totals, left = ask_all(tmp_path, generator_of(server), prompts)
        assert texts == [text_of(prompt) for prompt in prompts]
        assert server.calls["create"] == 1
        assert (totals.replies, totals.faults, left) == (30, 0, [])
        assert totals.spend.usd == pytest.approx(30 * (10 * 1.0 + 16 * 10.0) / 1e6 / 2)
        # All again: nothing is sent.
        assert ask_all(tmp_path, generator_of(server), prompts)[0] == texts
        assert server.calls["create"] == 1


@pytest.mark.parametrize("mark", ["expired*2", "500", "429", "lost"])
def test_what_a_batch_did_not_bring_is_asked_in_the_next(tmp_path, mark):
    prompts = ["plain", f"[[{mark}]] again"]
    with FakeBatches() as server:
        texts, totals, left = ask_all(tmp_path, generator_of(server), prompts)
        assert texts == [text_of(prompt) for prompt in prompts]
        assert server.asked["plain"] == 1
        assert (totals.replies, left) == (2, [])
        # Nobody said that a line that is missing cost nothing.
        assert (totals.unconfirmed.tokens > 0) == (mark == "lost")


def test_of_two_lines_for_a_request_the_first_counts(tmp_path):
    with FakeBatches() as server:
        texts, totals, _ = ask_all(tmp_path, generator_of(server), ["[[double]] x", "[[double]] y"])
        lines = [json.loads(line) for line in server.files["output_file_id-batch_0"].splitlines()]
        first = {}
        for line in lines:
            first.setdefault(line["custom_id"], line["response"]["body"]["choices"][0]["message"]["content"])
        assert texts == [first[request(prompt).key] for prompt in ("[[double]] x", "[[double]] y")]
        assert (len(lines), totals.replies) == (4, 2)


def test_a_request_that_is_refused_is_left_out_and_the_content_filter_is_remembered(tmp_path):
    with FakeBatches() as server:
        texts, _, left = ask_all(tmp_path, generator_of(server), ["plain", "[[400]] long", "[[filter]] bad"])
        assert texts == [text_of("plain"), "too_long", "content_filter"]
        assert left == []
        texts, _, _ = ask_all(tmp_path, generator_of(server), ["[[filter]] bad"])
        assert texts == ["content_filter"] and server.asked["[[filter]] bad"] == 1


def test_a_request_that_never_gets_a_reply_stops_the_run_at_its_end(tmp_path):
    with FakeBatches() as server, pytest.raises(RunStopped, match=r"1 seeds got no reply \(batch_expired: 1\)"):
        ask_all(tmp_path, generator_of(server, max_rounds=2), ["plain", "[[expired*9]] x"])
    assert server.asked["[[expired*9]] x"] == 2


def test_a_model_that_takes_another_name_of_the_limit_is_asked_by_it(tmp_path):
    told = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    with FakeBatches(refuses={"max_tokens": told}) as server:
        texts, totals, _ = ask_all(tmp_path, generator_of(server), ["plain"])
        assert texts == [text_of("plain")] and totals.replies == 1


def test_a_batch_that_is_refused_as_a_whole_says_what_the_server_said_and_leaves_nothing_open(tmp_path):
    with FakeBatches(refuse="Batch size limit reached.") as server:
        with pytest.raises(EndpointError, match="Batch size limit reached"):
            ask_all(tmp_path, generator_of(server), ["plain"])
        with Journal(tmp_path / "journal.sqlite") as journal:
            assert JournalLedger(journal, PRICES).open_batches() == []
            assert journal.totals().spend.tokens == 0


def test_a_key_that_is_refused_is_named_before_anything_is_sent(tmp_path):
    with FakeBatches(key="secret") as server, pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        ask_all(tmp_path, generator_of(server), ["plain"])
    assert not server.calls["create"]


def test_lost_answers_cut_downloads_and_busy_servers_cost_nothing(tmp_path):
    prompts = [f"seed {n}" for n in range(10)]
    with FakeBatches(lose_creates=1, cut_downloads=2, busy=2) as server:
        texts, totals, _ = ask_all(tmp_path, generator_of(server), prompts)
        assert texts == [text_of(prompt) for prompt in prompts]
        assert set(server.asked.values()) == {1} and totals.faults == 0


def test_large_rounds_are_several_batches_and_the_budget_holds_for_all_of_them(tmp_path):
    prompts = [f"seed {n}" for n in range(25)]
    with FakeBatches() as server:
        texts, _, _ = ask_all(tmp_path, generator_of(server, concurrency=10), prompts)
        assert texts == [text_of(prompt) for prompt in prompts]
        assert server.calls["create"] == 3
    most = Budget().most(request("seed 10")).tokens
    with FakeBatches() as server:  # room is set aside for five at a time
        texts, _, _ = ask_all(tmp_path / "poor", generator_of(server), prompts[:12], Budget(tokens=5 * most))
        assert texts == [text_of(prompt) for prompt in prompts[:12]]
        assert max(len(server.lines(name)) for name in server.batches) <= 5
    with FakeBatches() as server, pytest.raises(RunStopped, match="budget is spent"):
        ask_all(tmp_path / "poorest", generator_of(server), prompts, Budget(tokens=most + 40))
    assert sum(server.asked.values()) == 2


def test_another_generator_does_not_wait_for_batches_that_nobody_collects(tmp_path):
    with FakeBatches() as server, Journal(tmp_path / "journal.sqlite") as journal:
        ledger = JournalLedger(journal, PRICES)
        ledger.open_batch("tag", generator_of(server).batches.place, [request("plain")])
        ledger.leave_batch("tag")
        generator = FakeGenerator("tiny")
        with pytest.raises(RunStopped, match="1 requests are under way in batches at"):
            Runner(generator, journal).run([lambda ask: ask(request("plain"))])
        # One that writes beside one that judges collects all the same; what was never sent is forgotten.
        both = SwitchGenerator([FakeGenerator("judge"), generator_of(server)])
        (reply,) = Runner(both, journal).run([lambda ask: ask(request("plain"))])
        assert reply.text == text_of("plain") and server.asked["plain"] == 1


def test_what_is_asked_beside_a_batch_costs_the_whole_price_and_counts_when_it_is_killed(tmp_path):
    """A judge at an endpoint of its own: its claims were sent, its replies are billed in full."""
    judge = FakeGenerator("judge")
    judge.write = lambda request: "supported"
    asked = Request((("user", "x"),), "judge", Sampling(), "judge")
    with FakeBatches() as server, Journal(tmp_path / "journal.sqlite") as journal:
        runner = Runner(SwitchGenerator([generator_of(server), judge]), journal, budget=PRICES)
        runner.run([lambda ask: ask(asked)])
        assert journal.totals().spend.usd == pytest.approx((50 * 1.0 + 1 * 10.0) / 1e6)
        runner.run([lambda ask: ask(request("x"))])
        assert journal.totals().spend.usd == pytest.approx((50 + 10 + (10 + 160) / 2) / 1e6)
        assert [runner._terms(one)[1] for one in (asked, request("x"))] == [False, True]
    for waits, faults in ((False, 1), (True, 0)):
        with Journal(tmp_path / f"killed-{waits}.sqlite") as journal:
            journal.claim(asked, PRICES, waits=waits)
        with Journal(tmp_path / f"killed-{waits}.sqlite") as journal:  # closed with a claim: cut off under way
            assert journal.totals().faults == faults


def test_killed_at_any_moment_a_run_collects_its_batches_and_pays_for_nothing_twice(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai", run_batches.__module__])
    rng, seeds, kills = random.Random(0), 40, 0
    with FakeBatches(looks=6) as server:
        deadline = time.monotonic() + 120
        while not (tmp_path / "rows.json").exists():
            assert time.monotonic() < deadline
            process = context.Process(target=run_batches, args=(tmp_path, seeds, server.url))
            process.start()
            process.join(rng.uniform(0.1, 0.9) if kills < 15 else 60)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
        assert kills >= 5
        assert set(server.asked.values()) == {1}, server.asked.most_common(3)
        assert len(server.asked) == 2 * seeds
    with Journal(tmp_path / "journal.sqlite") as journal:
        totals = journal.totals()
        assert (totals.replies, totals.faults) == (2 * seeds, 0)
        assert totals.spend.tokens == 2 * seeds * 26


VLLM = """
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
with open(sys.argv[2], "w") as file:
    for line in reversed(lines):
        text = line["body"]["messages"][-1]["content"].upper()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        body = {"model": "tiny", "choices": [choice], "usage": usage}
        response = {"status_code": 200, "request_id": "r", "body": body}
        result = {"id": "v", "custom_id": line["custom_id"], "response": response, "error": None}
        file.write(json.dumps(result) + "\\n")
"""


def test_a_command_answers_files(tmp_path):
    (tmp_path / "vllm.py").write_text(VLLM)
    command = [sys.executable, str(tmp_path / "vllm.py"), "{input}", "{output}"]
    batches = CommandBatches(command, tmp_path / "batches")
    texts, totals, left = ask_all(tmp_path, BatchGenerator("tiny", batches, linger=0.02), ["one", "two"])
    assert (texts, totals.replies, left) == (["ONE", "TWO"], 2, [])
    assert str(tmp_path) not in batches.place
    broken = CommandBatches([sys.executable, "-c", "raise SystemExit(3)", "{input}", "{output}"], tmp_path / "batches")
    with pytest.raises(EndpointError, match="ended with status 3"):
        ask_all(tmp_path, BatchGenerator("tiny", broken, linger=0.02), ["three"])
    with pytest.raises(EndpointError, match="is not there"):
        missing = CommandBatches(["no-such-command", "{input}", "{output}"], tmp_path)
        ask_all(tmp_path, BatchGenerator("tiny", missing, linger=0.02), ["four"])
    with pytest.raises(ValueError, match=r"`command` must name where \{output\} goes"):
        CommandBatches(["vllm", "{input}"], tmp_path)


def test_the_command_line_asks_in_batches(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(4)))

    def write(body):
        number = int(re.search(r"village (\d+)\?", body["messages"][-1]["content"])[1])
        return f"Context: {make_text(number)}"

    options = ["--seeds", str(tmp_path / "pairs.jsonl"), "--model", "tiny", "--cache_dir", str(tmp_path / "cache")]
    options += ["--checks", "support", "--min_words", "3", "--n_distractors", "1", "--generator", "batch"]
    with FakeBatches(looks=1, reply=write) as server:
        options += ["--endpoints", server.url, "--prompt_price", "1000", "--completion_price", "10000"]
        assert main(["synthesize", *options, "--output_dir", str(tmp_path / "out")]) == 0
        assert server.calls["create"] == 1
    assert load_dataset(str(tmp_path / "out"), "chat", split="train").num_rows == 4
    # Half of 4 times 10 tokens at $1,000 and 16 at $10,000 a million.
    assert ", $0.34" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
