"""The limiter finds an endpoint's slots, keeps near them, and comes back after an outage."""

import random

import pytest

from hf_longalign.endpoint.pacing import AdaptiveLimiter, backoff


def _simulate(limiter, slots, seconds, clock, rng):
    """An endpoint with so many slots and replies after 0.5-2 s; returns the share of the slots that was busy."""
    ends, busy, step = [], 0.0, 0.005
    until = clock[0] + seconds
    while clock[0] < until:
        for end, ticket in [entry for entry in ends if entry[0] <= clock[0]]:
            ends.remove((end, ticket))
            limiter.release(ticket, replied=True)
        refused = []
        while limiter.room():
            ticket = limiter.acquire()
            if len(ends) < slots:
                ends.append((clock[0] + rng.uniform(0.5, 2), ticket))
            else:
                refused.append(ticket)
                break
        for ticket in refused:
            limiter.release(ticket, congested=True)
        busy += len(ends) * step
        clock[0] += step
    return busy / (slots * seconds), ends


@pytest.mark.parametrize("most", [64, 256])
def test_it_keeps_all_slots_busy_without_knowing_how_many_there_are(most):
    clock = [0.0]
    limiter = AdaptiveLimiter(most, clock=lambda: clock[0])
    share, _ = _simulate(limiter, 64, 60, clock, random.Random(0))
    assert share > 0.95
    assert limiter.limit < 80


def test_it_comes_back_after_an_outage():
    clock = [0.0]
    limiter = AdaptiveLimiter(64, clock=lambda: clock[0])
    for _ in range(20):
        limiter.release(limiter.acquire(), congested=True)
    assert limiter.limit == 1.0
    share, _ = _simulate(limiter, 64, 20, clock, random.Random(0))
    assert limiter.limit == 64.0 and share > 0.6


def test_of_requests_sent_together_only_the_first_refusal_counts():
    limiter = AdaptiveLimiter(100)
    tickets = [limiter.acquire() for _ in range(100)]
    for ticket in tickets[:50]:
        limiter.release(ticket, congested=True)
    assert limiter.limit == 70.0
    for ticket in tickets[50:]:
        limiter.release(ticket)
    limiter.release(limiter.acquire(), congested=True)  # sent after the decrease
    assert limiter.limit == 1.0  # one request was too many, so fewer than one it is not


def test_it_grows_only_where_it_is_used():
    limiter = AdaptiveLimiter(10)
    tickets = [limiter.acquire() for _ in range(10)]
    limiter.release(tickets[0], congested=True)
    for ticket in tickets[1:]:
        limiter.release(ticket)
    for _ in range(100):
        limiter.release(limiter.acquire(), replied=True)
    assert limiter.limit == 7.0


def test_a_pause_leaves_no_room():
    clock = [0.0]
    limiter = AdaptiveLimiter(4, clock=lambda: clock[0])
    limiter.pause(2.0)
    limiter.pause(1.0)  # a shorter one ends no longer one
    clock[0] = 1.9
    assert limiter.room() == 0
    clock[0] = 2.0
    assert limiter.room() == 4


def test_backoff_is_spread_over_a_range_that_doubles_to_30_seconds():
    rng = random.Random(0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (6, 30), (500, 30)):
        waits = [backoff(failures, rng) for _ in range(2000)]
        assert 0 <= min(waits) < 0.02 * longest and 0.98 * longest < max(waits) <= longest
        assert abs(sum(waits) / 2000 - longest / 2) < 0.05 * longest
