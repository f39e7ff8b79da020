"""The formats, without a network."""

import json
from datetime import datetime, timezone

import pytest

from hf_longalign.endpoint.protocol import Reply, Request, Sampling
from hf_longalign.endpoint.wire import (
    AttemptError,
    Refusal,
    body_of,
    habit_for,
    read_reply,
    read_status,
    retry_after,
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


def test_a_greedy_reply_without_a_token_is_one_and_a_drawn_one_is_a_fault():
    data = {"model": "tiny", "choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
    body = json.dumps({**data, "usage": {"prompt_tokens": 4, "completion_tokens": 0}}).encode()
    greedy = Request((("user", "Hi"),), "tiny", Sampling(0, max_tokens=9))
    assert read_reply(body, greedy, ("tiny",)) == Reply("", "stop", 4, 0, "tiny")
    with pytest.raises(AttemptError, match="empty") as caught:
        read_reply(body, REQUEST, ("tiny",))
    assert caught.value.reply == Reply("", "stop", 4, 0, "tiny")


@pytest.mark.parametrize("tokens", [float("nan"), float("inf"), -5, 0, "7", None])
def test_a_usage_that_is_no_number_is_counted_as_the_most(tokens):
    reply = _read({"content": "abc"}, usage={"prompt_tokens": tokens, "completion_tokens": tokens})
    assert (reply.prompt_tokens, reply.completion_tokens) == (REQUEST.most_prompt_tokens, 3)


def test_a_stream_adds_up_and_one_without_its_end_is_none():
    events = [
        b": OPENROUTER PROCESSING",
        b'data: {"model": "tiny", "choices": [{"delta": {"role": "assistant", "content": "two\xe2\x80\xa8"}}]}',
        b'data: {"choices": [{"delta": {"content": "lines"}, "finish_reason": "length"}]}',
        b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}',
    ]
    whole = b"\r\n\r\n".join([*events, b"data: [DONE]"])
    assert read_reply(whole, REQUEST, ("tiny",)) == Reply("two\u2028lines", "length", 3, 2, "tiny")
    with pytest.raises(AttemptError, match="bad_body"):
        read_reply(b"\n\n".join(events[:2]), REQUEST, ("tiny",))
    with pytest.raises(AttemptError, match="server_error: gone"):
        read_reply(b"\n\n".join([*events[:2], b'data: {"error": {"message": "gone"}}']), REQUEST, ("tiny",))


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
        (400, {"message": "no"}, "bad_request"),
        (400, {"message": "This model's maximum context length is 8192 tokens, max_tokens is 4096"}, "too_long"),
        (400, {"message": "no", "code": "context_length_exceeded"}, "too_long"),
        (400, {"message": "prompt is too long: 220000 tokens > 200000 maximum"}, "too_long"),
        (422, {"message": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 and 512"}, "too_long"),
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
    for body in (error, {"error": error}, [{"error": error}]):
        meaning = read_status(status, {}, json.dumps(body).encode())
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
    meaning = read_status(status, {"retry-after": "3"}, b"")
    assert isinstance(meaning, AttemptError) and meaning.fault.kind == kind and meaning.wait == 3.0


_SENT = body_of(Request((("user", "Hi"),), "tiny"), "tiny")


@pytest.mark.parametrize(
    ("error", "option", "habit"),
    [
        (
            {"message": "Unsupported parameter. Use 'max_completion_tokens' instead.", "param": "max_tokens"},
            "max_tokens",
            "max_completion_tokens",
        ),
        ({"message": "Only the default (1) value is supported.", "param": "temperature"}, "temperature", None),
        ({"message": "`temperature` and `top_p` cannot both be specified for this model."}, "temperature", None),
        (
            {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "type": "extra"}]},
            "seed",
            None,
        ),
        ({"message": "Stream must be set to true"}, "stream", "stream"),
        ({"message": "Provider returned error", "metadata": {"raw": '{"detail": "no top_p"}'}}, "top_p", None),
    ],
)
def test_a_refused_option_is_named_and_asked_for_in_another_form_where_there_is_one(error, option, habit):
    for body in (error, {"error": error}):
        meaning = read_status(400, {}, json.dumps(body).encode(), _SENT)
        assert (meaning.kind, meaning.option) == ("option", option)
        assert habit_for(meaning, _SENT) == habit
    with_habit = body_of(Request((("user", "Hi"),), "tiny"), "tiny", {habit} if habit else ())
    again = read_status(400, {}, json.dumps(error).encode(), with_habit)
    assert habit_for(again, with_habit) is None  # no second time


def test_a_message_about_the_messages_is_the_request_s_own():
    for told in ({"message": "no", "param": "messages"}, {"message": "The upstream broke"}, {"message": "min_p"}):
        assert read_status(400, {}, json.dumps(told).encode(), _SENT).kind == "bad_request"


def test_a_page_is_told_without_its_tags():
    assert read_status(502, {}, b"<html><h1>Bad  gateway</h1></html>").args == ("server_error: Bad gateway",)


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
