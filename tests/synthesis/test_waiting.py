"""Waiting: what servers ask for, and backoff."""

import random
from datetime import datetime, timezone

import pytest

from hf_longalign.synthesis.redact import redact
from hf_longalign.synthesis.waiting import backoff, retry_after


NOW = datetime(2026, 10, 21, 7, 28, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:29:00 GMT"}, 60.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:29:00 -0000"}, 60.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 09:29:00 +0200"}, 60.0),
    ],
)
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after(headers, NOW) == seconds


def test_backoff_is_spread_over_a_range_that_doubles_to_30_seconds():
    rng = random.Random(0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (6, 30), (500, 30)):
        waits = [backoff(failures, rng) for _ in range(2000)]
        assert 0 <= min(waits) < 0.02 * longest and 0.98 * longest < max(waits) <= longest
        assert abs(sum(waits) / 2000 - longest / 2) < 0.05 * longest


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:pw@host:1/v1", "http://host:1/v1"),
        ("key sk-proj-abc123*** is wrong", "key *** is wrong"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("no file '/home/me/models/tiny'", "no file 'tiny'"),
        ("no file ~/models/tiny.", "no file tiny."),
        (r"no file C:\Users\me\tiny", "no file tiny"),
        ("POST http://host/v1/chat/completions", "POST http://host/v1/chat/completions"),
        ("org/tiny is gated", "org/tiny is gated"),
        ("and/or 1/2", "and/or 1/2"),
    ],
)
def test_secrets_and_paths_are_taken_out(text, clean):
    assert redact(text) == clean


def test_given_secrets_are_taken_out_the_longest_first():
    assert redact("abcdef abc", ["abc", "abcdef", ""]) == "*** ***"
