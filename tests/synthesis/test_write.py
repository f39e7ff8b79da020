import asyncio

import pytest

from hf_longalign.endpoint.protocol import GenerationError, Reply, Sampling
from hf_longalign.synthesis.checks import Rules
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.writer import Plan, check_given, judge_given, write_context


SEED = Seed("a", "narrativeqa", "When was the dam below Thornwick finished?", "1912", context="Finished in 1912.")
GOOD = "Title: The Dam\nContext:\nThe dam below the village was finished in 1912, and Ada watched the water rise."
RULES = Rules(("complete", "refusal", "meta", "length", "support", "leak"), min_words=5)


class Script:
    """Answers requests one after another and keeps them."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests = []
        self.counted, self.unusable = [], []

    async def __call__(self, request):
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, Reply) else Reply(reply, "stop", 10, 20, "m")

    def count(self, kind, reason="", key=""):
        self.counted.append(kind)
        if kind == "unusable":
            self.unusable.append((reason, key))

    def content(self, number):
        return self.requests[number].messages[-1][1]


def plan(**changes):
    return Plan(**{"generator": "openai", "model": "m", "sampling": Sampling(seed=7), "rules": RULES, **changes})


def write(script, the_plan=None, **kwargs):
    return asyncio.run(write_context(SEED, the_plan or plan(), script, script.count, **kwargs))


def test_a_good_reply_is_accepted_at_once():
    script = Script(GOOD)
    outcome = write(script)
    assert outcome.accepted and outcome.title == "The Dam" and outcome.context.startswith("The dam below")
    assert [check.outcome for check in outcome.checks] == ["passed"] * 7
    assert outcome.provenance.journal_keys == (script.requests[0].key,)
    assert outcome.provenance.attempts == 1 and script.counted == ["usable"]
    assert script.requests[0].purpose == "context" and script.requests[0].sampling.seed == 7


def test_a_failure_is_retried_with_the_reason_and_another_seed():
    script = Script("Sure.", "Context: Too short.", GOOD)
    outcome = write(script)
    assert outcome.accepted and outcome.provenance.attempts == 3
    assert 'An earlier reply was rejected: parse: "Context:" was missing.' in script.content(1)
    assert "rejected: length: it has 2 words, at least 5 are needed; support: it does not hold" in script.content(2)
    assert [request.sampling.seed for request in script.requests] == [7, 8, 9]
    assert len(set(outcome.provenance.journal_keys)) == 3
    assert script.counted == ["unusable", "retried", "unusable", "retried", "usable"]
    assert [key for _, key in script.unusable] == [request.key for request in script.requests[:2]]
    assert script.unusable[0][0] == 'parse: "Context:" was missing'


def test_without_a_seed_each_retry_is_another_request():
    script = Script("Sure.", "Sure.", GOOD)
    assert write(script, plan(sampling=Sampling(None, None, seed=None))).accepted
    assert [request.sampling.seed for request in script.requests] == [None] * 3
    assert len({request.key for request in script.requests}) == 3


def test_after_the_last_retry_it_is_rejected_with_the_last_reason():
    script = Script(*["Context: Too short."] * 3)
    outcome = write(script)
    assert not outcome.accepted and outcome.reason.startswith("length: it has 2 words")
    assert outcome.context == "Too short." and outcome.provenance.attempts == 3
    assert script.counted == ["unusable", "retried"] * 2 + ["unusable", "rejected"]
    assert write(Script("Sure."), plan(retries=0)).reason == 'parse: "Context:" was missing'


def test_a_reply_cut_off_by_length_is_not_data():
    outcome = write(Script(Reply(GOOD, "length", 1, 1, "m")), plan(retries=0))
    assert outcome.reason.startswith("complete: it was cut off")


@pytest.mark.parametrize("text", ["The dam", "<think>Context: a draft", "Context:"])
def test_an_unreadable_reply_that_was_cut_off_says_so(text):
    outcome = write(Script(Reply(text, "length", 1, 1, "m")), plan(retries=0, sampling=Sampling(max_tokens=77)))
    assert outcome.reason.startswith("parse: it was cut off at the limit of 77 tokens; be shorter: ")


def test_a_generator_that_will_not_reply_is_not_asked_again():
    script = Script(GenerationError("too_long", "http://host refuses request 1: 9 tokens", "9 tokens"))
    outcome = write(script)
    assert outcome.reason == "too_long: 9 tokens"
    assert len(script.requests) == 1 and script.counted == ["unusable", "rejected"]


def test_facts_first():
    facts = "Title: Dams\nEvidence:\n- Finished in 1912.\nDistraction:\n- Begun in 1910."
    script = Script("no facts", facts, GOOD.removeprefix("Title: The Dam\n"))
    outcome = write(script, plan(facts_first=True))
    assert outcome.accepted and outcome.title == "Dams"
    assert [request.purpose for request in script.requests] == ["facts", "facts", "context"]
    assert "- Finished in 1912.\nDistraction:\n- Begun in 1910." in script.content(2)


def test_a_long_context_is_outlined_and_written_in_sections():
    outline = "Title: The Dam\nSection 1: Start | first stone\nSection 2: End | the water"
    script = Script(outline, "Context:\nThe first stone was laid in 1910.", "Context:\nIt was finished in 1912.")
    outcome = write(script, plan(words=3000, reply_words=1500))
    assert outcome.accepted and outcome.title == "The Dam"
    assert outcome.context == "The first stone was laid in 1910.\n\nIt was finished in 1912."
    assert [request.purpose for request in script.requests] == ["outline", "section", "section"]
    assert "this is where it begins" in script.content(1)
    assert "ends with:\nThe first stone was laid in 1910." in script.content(2)
    assert "about 1500 words" in script.content(2)


def test_a_section_cut_off_rejects_the_whole():
    outline = "Section 1: Start\nSection 2: End"
    cut = Reply("Context: The first stone was laid in 1912 and", "length", 1, 1, "m")
    outcome = write(Script(outline, cut, "Context: The end."), plan(words=3000, reply_words=1500, retries=0))
    assert outcome.reason.startswith("complete: it was cut off")


@pytest.mark.parametrize(
    "verdict, accepted, reason",
    [
        ("supported", True, ""),
        ("not supported: no year", False, "support: it does not hold what the answer '1912' says; judge: no year"),
        ("Perhaps.", False, "support: it does not hold what the answer '1912' says"),
    ],
)
def test_a_judge_is_asked_where_strings_do_not_tell(verdict, accepted, reason):
    script = Script("Context: It was finished in nineteen hundred and twelve.", verdict)
    outcome = write(script, plan(judge="judge-model", retries=0))
    assert outcome.accepted == accepted and outcome.reason == reason
    assert script.requests[1].model == "judge-model" and script.requests[1].sampling.temperature == 0.0


def test_a_judge_is_not_asked_where_the_answer_stands_there():
    script = Script(GOOD)
    assert write(script, plan(judge="judge-model")).accepted and len(script.requests) == 1


def test_a_context_refused_beside_others_is_written_anew_from_what_is_left():
    from dataclasses import replace

    first = write(Script("Sure.", GOOD))
    refused = replace(first, reason="duplicate: it nearly repeats another")
    script = Script(GOOD)
    outcome = write(script, refused=refused)
    assert "rejected: duplicate: it nearly repeats another." in script.content(0)
    assert outcome.accepted and outcome.provenance.attempts == 3 and script.requests[0].sampling.seed == 9
    assert len(outcome.provenance.journal_keys) == 3
    exhausted = write(Script(), refused=replace(outcome, reason="duplicate: again"))
    assert exhausted.reason == "duplicate: again" and exhausted.context == outcome.context


def test_a_given_context_is_checked_and_never_written():
    outcome = check_given(SEED, plan())
    assert not outcome.accepted and outcome.reason == "length: it has 3 words, at least 5 are needed"
    assert outcome.provenance.generator == "documents" and outcome.provenance.journal_keys == ()


def test_a_judge_can_save_a_given_context():
    from dataclasses import replace

    seed = replace(SEED, context="It was finished in nineteen hundred and twelve.")
    found = check_given(seed, plan())
    assert found.reason.startswith("support:")
    script = Script("supported")
    judged = asyncio.run(judge_given(found, plan(judge="j"), script))
    assert judged.accepted and judged.provenance.journal_keys == (script.requests[0].key,)
