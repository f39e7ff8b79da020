"""The chat-completion format, without a network."""

import json

import pytest

from hf_longalign.synthesis.generators.base import Request, Sampling
from hf_longalign.synthesis.generators.completions import (
    AttemptError,
    Refusal,
    body_of,
    read_reply,
    read_status,
    same_model,
)


REQUEST = Request((("user", "Hi"),), "tiny", Sampling(max_tokens=9))


def _read(message, **more):
    data = {"model": "tiny", "choices": [{"message": message, "finish_reason": "stop"}], **more}
    return read_reply(json.dumps(data).encode(), REQUEST, ("tiny",))


def test_content_in_parts_is_joined_without_the_thoughts():
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _read({"content": parts}).text == "ab"


def test_a_refusal_field_is_the_text():
    assert _read({"content": None, "refusal": "I cannot."}).text == "I cannot."


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}])
def test_without_usage_the_most_is_counted(usage):
    reply = _read({"content": "abc"}, usage=usage)
    assert (reply.prompt_tokens, reply.completion_tokens) == (REQUEST.most_prompt_tokens, 3)


def test_an_empty_reply_has_the_tokens_it_says():
    assert _read({"content": ""}, usage={"prompt_tokens": 4, "completion_tokens": 0}).completion_tokens == 0


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'"text"', b'{"choices": [null]}', b'{"choices": [{"message": null}]}']
)
def test_what_is_no_completion_is_a_bad_body(body):
    with pytest.raises(AttemptError, match="bad_body"):
        read_reply(body, REQUEST, ("tiny",))


@pytest.mark.parametrize(
    ("asked", "got", "same"),
    [
        ("tiny", "", True),
        ("tiny", "TINY", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("/models/tiny", "/models/tiny@main", True),
        ("org/tiny", "tiny", True),
        ("org/tiny", "org/tiny:free", True),
        ("tiny", "another", False),
    ],
)
def test_which_names_are_one_model(asked, got, same):
    assert same_model(asked, got) is same


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"message": "too long"}, "bad_request"),
        (400, {"message": "", "code": "content_filter"}, "content_filter"),
        (403, {"message": "Your input was flagged by moderation"}, "content_filter"),
        (401, {"message": "no"}, "key"),
        (403, {"message": "no"}, "key"),
        (402, {"message": "no"}, "quota"),
        (429, {"message": "no", "code": "insufficient_quota"}, "quota"),
        (404, {"message": "no"}, "not_found"),
        (422, {"detail": "unexpected"}, "bad_request"),
    ],
)
def test_what_another_attempt_would_not_help(status, error, kind):
    for body in (error, {"error": error}):
        meaning = read_status(status, {}, body)
        assert isinstance(meaning, Refusal) and meaning.kind == kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, "rate_limit"),
        *((status, "overloaded") for status in (408, 503, 504, 529)),
        *((status, "server_error") for status in (409, 500, 502)),
    ],
)
def test_what_another_attempt_may_help(status, kind):
    meaning = read_status(status, {"retry-after": "3"}, None)
    assert isinstance(meaning, AttemptError) and meaning.fault.kind == kind and meaning.wait == 3.0


def test_extra_fields_go_into_the_body_and_may_replace_the_token_limit():
    sampling = Sampling(temperature=None, top_p=None, extra={"max_completion_tokens": 7, "reasoning_effort": "low"})
    assert body_of(Request((), "tiny", sampling), "served") == {
        "model": "served",
        "messages": [],
        "seed": 0,
        "max_completion_tokens": 7,
        "reasoning_effort": "low",
    }
    assert sampling.token_limit == 7
