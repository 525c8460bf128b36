"""Token buckets, announced limits, the breaker and Retry-After, on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.api.limits import Announced, Breaker, Bucket, Grouping, Lane, backoff_s, duration_s, retry_after_s


@given(st.integers(1, 6000), st.lists(st.tuples(st.integers(1, 500), st.floats(0, 5)), min_size=1, max_size=60))
def test_no_minute_ever_gets_more_than_its_share(per_minute, wants):
    bucket, now, taken = Bucket(per_minute), 0.0, []
    for amount, idle_s in wants:
        now += idle_s
        now += bucket.wait_s(amount, now)
        bucket.take(amount, now)
        taken.append((now, amount))
    for start, _ in taken:
        inside = [a for t, a in taken if start <= t < start + 60]
        assert sum(inside) <= per_minute + bucket.capacity + max(inside) + 1e-6  # a large one is paid off afterwards


def test_a_server_that_announces_its_limit_is_believed():
    limit = Announced()
    limit.observe(remaining=3, reset_s=10, under_way=1, now=0)
    for _ in range(2):
        assert limit.wait_s(1, 1) == 0
        limit.take(1, 1)
    assert 9 < limit.wait_s(1, 1) < 9.1
    limit.take(1, 10.1)
    assert limit.wait_s(1, 10.1) == 0


def test_retry_after_closes_the_lane_for_everyone_and_is_never_shortened():
    lane = Lane(8)
    lane.observe({"retry-after": "5"}, now=100)
    lane.observe({"retry-after-ms": "10"}, now=100)
    assert 5 <= lane.wait_s(1, 100) < 5.1 and lane.wait_s(1, 104.99) > 0 and lane.wait_s(1, 105.1) == 0


def test_in_flight_waits_for_something_to_come_back():
    lane = Lane(1)
    lane.leave(10, 0)
    assert lane.wait_s(10, 0) == float("inf")
    lane.back(10)
    assert lane.wait_s(10, 0) == 0


def test_the_breaker_lets_one_probe_through_and_closes_on_success():
    breaker = Breaker(threshold=3)
    for _ in range(3):
        assert breaker.wait_s(0) == 0
        breaker.failure("refused", 0)
    breaker.failure("left before it opened", 0)
    assert breaker.wait_s(0) == 0.5 and breaker.wait_s(0.5) == 0
    breaker.leave()
    assert breaker.wait_s(0.6) == float("inf"), "one at a time"
    breaker.failure("refused", 0.7)
    assert breaker.wait_s(0.7) == 1.0 and breaker.down_s(5) == 5
    breaker.leave()
    breaker.success()
    assert breaker.wait_s(2) == 0 and breaker.down_s(9) == 0


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "60", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 9),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, 30),
    ],
)
def test_retry_after_in_all_its_forms(headers, wait_s):
    assert retry_after_s(headers) == wait_s


@pytest.mark.parametrize(
    ("text", "seconds"), [("6m0s", 360), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("2", 2), ("1d", 86400), ("soon", None), ("", None)]
)
def test_reset_times(text, seconds):
    assert duration_s(text) == (None if seconds is None else pytest.approx(seconds))


def test_back_off_grows_and_stays_in_its_bounds():
    assert all(0 <= backoff_s(n) <= min(20, 0.5 * 2**n) for n in range(40) for _ in range(20))
    assert max(backoff_s(6) for _ in range(200)) > 8


@pytest.mark.parametrize(("took_s", "gathered_s"), [(0.01, 0.001), (1.0, 0.005), (60.0, 0.02)])
def test_messages_are_gathered_for_a_small_share_of_what_a_request_takes(took_s, gathered_s):
    grouping = Grouping()
    for _ in range(500):
        grouping.took(took_s)
    assert grouping.seconds == pytest.approx(gathered_s, rel=0.01)
