"""A key gets what its limits say and no more; what a request did not use is given back, however it ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.auth import Caller, Limits
from serving.errors import BadRequest, RateLimited
from serving.limits import Limiter


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def caller(requests=None, tokens=None, concurrent=None, name="ann"):
    return Caller(name, limits=Limits(requests, tokens, concurrent))


def subject():
    clock, refused = Clock(), []
    return Limiter(lambda key, limit: refused.append((key, limit)), clock), clock, refused


def send(limiter, who):
    with limiter.request(who):
        pass


def test_requests_refill_steadily():
    limiter, clock, refused = subject()
    ann = caller(requests=60)
    for _ in range(60):
        send(limiter, ann)
    with pytest.raises(RateLimited, match="key 'ann' may send 60 requests a minute; try again in 1 s") as caught:
        send(limiter, ann)
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "rate_limit_exceeded", 1)
    clock.now_s += 2
    send(limiter, ann)
    send(limiter, ann)
    with pytest.raises(RateLimited):
        send(limiter, ann)
    assert refused == [("ann", "requests")] * 2
    clock.now_s += 3600
    for _ in range(60):
        send(limiter, ann)
    with pytest.raises(RateLimited):
        send(limiter, ann)


def test_one_keys_use_is_not_anothers():
    limiter, _, _ = subject()
    send(limiter, caller(requests=1))
    send(limiter, caller(requests=1, name="bob"))
    with pytest.raises(RateLimited):
        send(limiter, caller(requests=1))


def test_concurrency_counts_what_runs_and_a_refusal_costs_no_request():
    limiter, _, refused = subject()
    ann = caller(requests=3, concurrent=1)
    with limiter.request(ann):
        for _ in range(5):
            with pytest.raises(RateLimited, match="1 requests at once") as caught:
                send(limiter, ann)
        assert caught.value.retry_after_s == 1
    assert limiter.headers(ann)["x-ratelimit-remaining-requests"] == "2"
    with pytest.raises(ZeroDivisionError), limiter.request(ann):
        raise ZeroDivisionError
    send(limiter, ann)
    assert refused == [("ann", "concurrency")] * 5


def test_unused_tokens_are_given_back():
    limiter, clock, _ = subject()
    ann = caller(tokens=100)
    with limiter.tokens(ann, 90) as spending:
        spending.tokens = 30
        with pytest.raises(RateLimited, match="may use 100 tokens a minute, and this request can use 20") as caught:
            limiter.tokens(ann, 20).__enter__()
        assert caught.value.retry_after_s == 6
        assert limiter.headers(ann)["x-ratelimit-remaining-tokens"] == "10"
    assert limiter.headers(ann)["x-ratelimit-remaining-tokens"] == "70"
    with pytest.raises(ZeroDivisionError), limiter.tokens(ann, 70):
        raise ZeroDivisionError
    assert limiter.headers(ann)["x-ratelimit-remaining-tokens"] == "70"
    clock.now_s += 60
    with limiter.tokens(ann, 100):
        pass


def test_what_a_minute_can_never_hold_is_a_bad_request():
    limiter, _, _ = subject()
    with pytest.raises(BadRequest, match=r"can use 101 tokens.* key 'ann' may use 100 a minute; set a smaller max"):
        limiter.tokens(caller(tokens=100), 101).__enter__()


def test_headers_are_openais_and_only_for_limits_that_there_are():
    limiter, clock, _ = subject()
    assert limiter.headers(caller()) == {}
    ann = caller(requests=2, tokens=60_000, name="both")
    send(limiter, ann)
    with limiter.tokens(ann, 1) as spending:
        spending.tokens = 1
    assert limiter.headers(ann) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "60000",
        "x-ratelimit-remaining-tokens": "59999",
        "x-ratelimit-reset-tokens": "1ms",
    }
    send(limiter, ann)
    assert limiter.headers(ann)["x-ratelimit-reset-requests"] == "1m0s"
    clock.now_s += 0.5
    assert limiter.headers(ann)["x-ratelimit-reset-requests"] == "59.5s"


def test_retry_after_is_at_most_what_openais_client_obeys():
    limiter, _, _ = subject()
    slow = caller(requests=1)
    send(limiter, slow)
    with pytest.raises(RateLimited) as caught:
        send(limiter, slow)
    assert caught.value.retry_after_s == 60
    assert 1 <= caught.value.retry_after_s <= 120


def test_a_changed_limit_counts_at_once_and_what_runs_still_counts():
    limiter, _, _ = subject()
    send(limiter, caller(requests=1))
    with limiter.request(caller(requests=5, concurrent=1)), pytest.raises(RateLimited, match="at once"):
        send(limiter, caller(requests=6, concurrent=1))
    send(limiter, caller(requests=6, concurrent=1))


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40), st.floats(0, 1)), max_size=60))
def test_no_run_of_requests_uses_more_than_a_minute_and_its_refill(steps):
    limiter, clock, _ = subject()
    ann, used, start_s = caller(tokens=50), 0, clock.now_s
    for pause_s, most, share in steps:
        clock.now_s += pause_s
        try:
            with limiter.tokens(ann, most) as spending:
                spending.tokens = int(most * share)
        except RateLimited:
            continue
        used += spending.tokens
        assert used <= 50 + (clock.now_s - start_s) * 50 / 60 + 1e-6
