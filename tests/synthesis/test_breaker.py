"""When a run whose replies are of no use stops, and when it goes on."""

import random

import pytest

from hf_longalign.endpoint.protocol import EndpointError, GenerationError
from hf_longalign.synthesis.budget import Breaker


def _judge(breaker, verdicts, *, paid=True):
    """Feed verdicts ("u" unusable, "." usable); the place at which the breaker says stop, or None."""
    for number, verdict in enumerate(verdicts):
        key = f"{paid} {number}"
        if paid:
            breaker.paid(key)
        if verdict == ".":
            breaker.usable()
        elif breaker.unusable("length: it has 3 words", key, "As you wish.\nNo."):
            return number
    return None


def test_nothing_but_unusable_replies_stop_after_20():
    assert _judge(Breaker(), "u" * 19 + ".") is None
    assert _judge(Breaker(), "u" * 100) == 19


def test_the_reason_and_the_first_reply_are_told():
    breaker = Breaker()
    _judge(breaker, "u" * 19)
    breaker.paid("last")
    stop = breaker.unusable("parse: another", "last", "Another.")
    assert "The first: length: it has 3 words, in 'As you wish. No.'" in str(stop) and "run again" in str(stop)


def test_a_change_in_the_middle_is_seen():
    assert _judge(Breaker(), "." * 1000 + "u" * 300) == 1199


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_share_of_unusable_replies_stops_nothing(share):
    rng = random.Random(0)
    stopped = 0
    for _ in range(20):
        verdicts = "".join("u" if rng.random() < share else "." for _ in range(3000))
        # The first replies tell the share; before them 20 in a row may be chance.
        stopped += _judge(Breaker(), "uuuuuuuuu." * 10 + verdicts) is not None
    assert stopped == 0


def test_what_an_earlier_run_paid_for_stops_nothing_and_the_rerun_goes_on():
    breaker = Breaker()
    assert _judge(breaker, "u" * 100, paid=False) is None
    assert _judge(breaker, "u" * 200) is None


def test_refusals_stop_where_nothing_else_is_served():
    long, bad = GenerationError("too_long", "9 tokens"), GenerationError("bad_request", "no such field")
    for error in (long, bad):
        breaker = Breaker()
        found = [breaker.refused(error) for _ in range(20)]
        assert found[:19] == [None] * 19 and isinstance(found[19], EndpointError) and str(error) in str(found[19])
    breaker = Breaker()
    breaker.replied()
    assert not any(breaker.refused(long) for _ in range(100))
    assert sum(breaker.refused(bad) is None for _ in range(20)) == 19
