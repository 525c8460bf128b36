"""The fault-injecting endpoint holds what the other tests rest on: its faults are what they say, and its bill is right."""

from __future__ import annotations

import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime

import openai
import pytest

from graft.data.api.request import Request

from .faulty_client import ask, bill_usd, body, endpoint, status_of


def test_plain_answers_are_repeatable_and_billed_to_the_cent() -> None:
    with endpoint() as server:
        answers = [ask(server, body(n)).json() for n in range(40)]
        assert ask(server, body(7)).json() == answers[7]
        report = server.report()
    assert report["billed_usd"] == pytest.approx(sum(map(bill_usd, answers)) + bill_usd(answers[7]))
    assert (report["requests"], report["unique"], report["billed_twice"]) == (41, 40, 1)
    assert report["by_key"][Request(body(7)).key] == {"requests": 2, "billed": 2}
    assert all(0 < a["usage"]["completion_tokens"] <= 50 for a in answers)
    assert all(a["usage"]["prompt_tokens"] <= len(body(n)["messages"][0]["content"].encode()) + 16 for n, a in enumerate(answers))
    assert 0 < sum("prompt_tokens_details" in a["usage"] for a in answers) < 40


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("429", 429, "rate_limit_exceeded"),
        ("429-date", 429, "rate_limit_exceeded"),
        ("429-ms", 429, "rate_limit_exceeded"),
        ("429-plain", 429, "rate_limit_exceeded"),
        ("500", 500, "server_error"),
        ("503", 503, "overloaded"),
        ("503-after", 503, "overloaded"),
        ("401", 401, "invalid_api_key"),
        ("quota", 429, "insufficient_quota"),
    ],
)
def test_an_error_is_said_and_not_billed(fault: str, status: int, code: str) -> None:
    with endpoint(fault, retry_after_s=3) as server:
        with pytest.raises(openai.APIStatusError) as e:
            ask(server, body())
        report = server.report()
    assert (e.value.status_code, e.value.code) == (status, code)
    headers = e.value.response.headers
    waits = {"429": "3", "503-after": "3"}
    assert headers.get("retry-after") == waits.get(fault) or fault == "429-date"
    assert headers.get("retry-after-ms") == ("3000" if fault == "429-ms" else None)
    if fault == "429-date":
        wait_s = (parsedate_to_datetime(headers["retry-after"]) - parsedate_to_datetime(headers["date"])).total_seconds()
        assert 3 <= wait_s <= 5
    assert (report["billed_usd"], report["statuses"], report["faults"]) == (0, {str(status): 1}, {fault: 1})


@pytest.mark.parametrize("fault", ["refusal", "schema", "length", "filter"])
def test_a_spoilt_answer_is_billed(fault: str) -> None:
    with endpoint(fault) as server, endpoint() as honest:
        reply, whole = ask(server, body()).json(), ask(honest, body()).json()
        report = server.report()
    choice, content = reply["choices"][0], reply["choices"][0]["message"]["content"]
    match fault:
        case "refusal":
            assert content is None and choice["message"]["refusal"]
        case "schema":
            assert set(json.loads(content)) == {"unexpected"}
        case "length":
            assert choice["finish_reason"] == "length" and whole["choices"][0]["message"]["content"].startswith(content)
            assert reply["usage"]["completion_tokens"] == 50
        case "filter":
            assert choice["finish_reason"] == "content_filter" and not content
    assert report["billed_usd"] == pytest.approx(bill_usd(reply)) and report["billed_usd"] > 0


@pytest.mark.parametrize(
    ("fault", "raised", "billed"),
    [
        ("reset", openai.APIConnectionError, 0),
        ("reset-paid", openai.APIConnectionError, 1),
        ("reset-body", openai.APIConnectionError, 1),
        ("hang", openai.APITimeoutError, 0),
        ("late", openai.APITimeoutError, 1),
    ],
)
def test_no_answer_arrives(fault: str, raised: type[Exception], billed: int) -> None:
    with endpoint(fault, late_s=1.5) as server:
        with pytest.raises(raised):
            ask(server, body(), timeout_s=0.5)
        report = server.report()
    assert (report["billed"], report["billed_usd"] > 0, report["faults"]) == (billed, bool(billed), {fault: 1})


def test_a_truncated_body_is_a_200_that_does_not_parse() -> None:
    with endpoint("truncated") as server:
        reply = ask(server, body())
        assert server.report()["billed"] == 1
    assert int(reply.headers["content-length"]) == len(reply.content)
    with pytest.raises(json.JSONDecodeError):
        reply.json()


def test_a_drip_outlasts_a_timeout_between_bytes() -> None:
    with endpoint("drip", drip_s=0.004) as server:
        began = time.monotonic()
        reply = ask(server, body(), timeout_s=0.5)
        assert time.monotonic() - began > 0.004 * len(reply.content) > 0.5
        assert reply.json()["choices"] and server.report()["billed"] == 1


def test_faults_follow_the_request_and_not_the_time() -> None:
    def fates(order: list[int], seed: int) -> dict[int, list[str]]:
        with endpoint(faults={"429-plain": 0.3, "500": 0.2}, seed=seed) as server:
            found: dict[int, list[str]] = {n: [] for n in order}
            for n in order * 2:
                try:
                    found[n].append(str(ask(server, body(n)).status_code))
                except openai.APIStatusError as e:
                    found[n].append(str(e.status_code))
            return found

    forth = fates(list(range(40)), 1)
    assert forth == fates(list(reversed(range(40))), 1)
    assert forth != fates(list(range(40)), 2)
    counts = {status: sum(f.count(status) for f in forth.values()) for status in ("429", "500", "200")}
    print(f"of 80 requests: {counts}")
    assert 12 <= counts["429"] <= 36 and 6 <= counts["500"] <= 26
    assert any(a != b for a, b in forth.values())  # asked again, another fate


def test_undercuts_are_told_from_patience() -> None:
    with endpoint("429", retry_after_s=1) as server:
        for wait_s in (0.0, 0.3, 1.1):  # same key at once; another key 0.3 s in; again after both waits
            time.sleep(wait_s)
            with pytest.raises(openai.RateLimitError):
                ask(server, body(1 if wait_s == 0.3 else 0))
            if wait_s == 0.0:
                with pytest.raises(openai.RateLimitError):
                    ask(server, body(0))
        report = server.report()
    # the second request of key 0 cut its own wait short, within the grace of all others'; key 1 cut everybody's short
    assert (report["undercuts_key"], report["undercuts_any"]) == (1, 1)


def test_the_quota_code_ends_it_by_count_and_by_switch() -> None:
    with endpoint(quota_after=3) as server:
        for n in range(3):
            ask(server, body(n))
        for n in range(3, 6):
            with pytest.raises(openai.RateLimitError) as e:
                ask(server, body(n))
            assert e.value.code == "insufficient_quota"
        assert server.report()["after_quota"] == 2
        server.control(quota_after=None)
        ask(server, body(9))
        server.control(quota=True)
        with pytest.raises(openai.RateLimitError):
            ask(server, body(10))


def test_limits_are_enforced_and_announced() -> None:
    with endpoint(limits={"requests_per_minute": 600, "tokens_per_minute": 1e6, "burst_s": 0.5}) as server:
        first = ask(server, body(0))
        assert first.headers["x-ratelimit-limit-requests"] == "600"
        assert first.headers["x-ratelimit-remaining-requests"] == "4"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 1e6
        assert first.headers["x-ratelimit-reset-requests"].endswith("ms")
        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(lambda n: status_of(server, body(n)), range(1, 17)))
        refused = [s for s in statuses if s != 200]
        assert set(refused) == {429} and len(refused) >= 6
        wait_ms = 0
        while not wait_ms:  # until one is refused
            try:
                ask(server, body(17))
            except openai.RateLimitError as e:
                wait_ms = int(e.response.headers["retry-after-ms"])
                assert int(e.response.headers["retry-after"]) == math.ceil(wait_ms / 1000)
        time.sleep(wait_ms / 1000)
        assert ask(server, body(17)).status_code == 200
        server.control(limits={"in_flight": 3}, latency_s=0.5)
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda n: status_of(server, body(n)), range(20, 28)))
        assert statuses.count(200) == 3 and statuses.count(429) == 5


def test_an_outage_refuses_and_cuts_and_ends() -> None:
    with endpoint(latency_s=5.0) as server, ThreadPoolExecutor(1) as pool:
        cut = pool.submit(ask, server, body(0), 10.0)
        while server.report(by_key=False)["in_flight"] == 0:
            time.sleep(0.01)
        server.control(outage_s=0.6, latency_s=0.0)
        with pytest.raises(openai.APIConnectionError):
            cut.result(2)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=1)
        assert server.report()["requests"] == 1  # waits for the end
        assert ask(server, body(1)).status_code == 200
