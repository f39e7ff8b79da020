"""What must not be written down is taken out, and a URL is one or is refused."""

import pytest

from hf_longalign.endpoint.address import redact


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
