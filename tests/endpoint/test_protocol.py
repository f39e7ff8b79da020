"""What a key covers, and the bound on a prompt's tokens."""

from dataclasses import replace

import pytest

from hf_longalign.endpoint.protocol import Request, Sampling


REQUEST = Request((("system", "Be brief."), ("user", "Hi")), "tiny", Sampling(0.8, 0.9, 100, 1))


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, messages=(("system", "Be brief."), ("user", "Hi!"))),
        replace(REQUEST, messages=(("user", "Be brief."), ("user", "Hi"))),
        replace(REQUEST, messages=(("system", "Be brief.Hi"), ("user", ""))),
        replace(REQUEST, model="tiny2"),
        replace(REQUEST, sampling=Sampling(0.7, 0.9, 100, 1)),
        replace(REQUEST, sampling=Sampling(None, 0.9, 100, 1)),
        replace(REQUEST, sampling=Sampling(0.8, 1.0, 100, 1)),
        replace(REQUEST, sampling=Sampling(0.8, 0.9, 101, 1)),
        replace(REQUEST, sampling=Sampling(0.8, 0.9, 100, 2)),
        replace(REQUEST, sampling=Sampling(0.8, 0.9, 100, 1, {"chat_template_kwargs": {"enable_thinking": False}})),
    ],
)
def test_everything_that_shapes_a_reply_is_in_the_key(other):
    assert other.key != REQUEST.key


def test_what_shapes_no_reply_is_not_in_the_key():
    assert replace(REQUEST, purpose="judge").key == REQUEST.key
    assert replace(REQUEST, messages=tuple(REQUEST.messages)).key == REQUEST.key
    assert Request((), "m", Sampling(1)).key == Request((), "m", Sampling(1.0)).key
    extra = {"a": 1, "b": 2}
    same = dict(reversed(extra.items()))
    assert Request((), "m", Sampling(extra=extra)).key == Request((), "m", Sampling(extra=same)).key


def test_the_key_stays_the_same_over_releases():
    # Another key would pay for every reply of every journal again.
    assert REQUEST.key == "2f9dae3a6c5eb318cd6aab174874e8fb"


def test_no_prompt_has_more_tokens_than_the_bound():
    request = Request((("user", "日本語 🎉"),), "tiny")
    assert request.most_prompt_tokens == 64 + 8 + 4 + len("日本語 🎉".encode())


@pytest.mark.parametrize(("field", "value"), [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("max_tokens", 0)])
def test_bad_sampling_is_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        Sampling(**{field: value})
