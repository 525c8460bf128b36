"""A run's access to the API against a server that fails on purpose and keeps its own books, through real Ray actors."""

import json
import os
import sqlite3
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from graft.core.errors import CredentialError, DataError, ServeError
from graft.core.recipe import Recipe
from graft.core.sections import Api, Augment
from graft.data.api.caller import Caller
from graft.data.api.limits import retry_after_s
from graft.data.api.request import Request
from graft.data.api.session import Session

from .faulty import FaultyEndpoint

PRICES = {"m": {"input": 150.0, "cached_input": 75.0, "output": 600.0, "batch": 0.5}}
ISSUE = ["429", "429-plain", "500", "503", "reset", "hang", "drip", "late", "truncated", "refusal", "schema"]
PASSING = ["429", "429-date", "429-ms", "429-plain", "500", "503", "503-after", "reset", "reset-body", "reset-paid", "hang", "drip", "late"]
PAID_BUT_USELESS = ["truncated", "refusal", "schema", "length", "filter"]


def recipe(**api):
    fast = {"model": "m", "prices": PRICES, "in_flight": 32, "timeout_s": 2, "max_retries": 12, "max_output_tokens": 400}
    return Recipe(name="asked", augment=Augment(seeds="seeds.jsonl"), api=Api(**{**fast, **api}))


def requests(n, max_tokens=400):
    content = '4 則\n{"user": "幫我畫一隻貓", "assistant": "call(\\"generate_image\\", {\\"prompt\\": \\"貓\\"})"}'
    return [Request({"model": "m", "seed": i, "max_tokens": max_tokens, "messages": [{"role": "user", "content": content}]}) for i in range(n)]


def ask(path, server, n, **api):
    with Session(recipe(**api), path / "ledger.sqlite", server.base_url) as session:
        answers = list(session.ask(requests(n)))
        return answers, session.figures()


def open_attempts(path):
    with sqlite3.connect(path / "ledger.sqlite") as db:
        return db.execute("SELECT count(*) FROM attempts WHERE state = 'open'").fetchone()[0]


def test_answers_come_in_order_and_are_asked_for_once(ray_local, tmp_path):
    with FaultyEndpoint(prices=PRICES, jitter_s=0.1) as server:
        answers, figures = ask(tmp_path, server, 300)
        assert [a.key for a in answers] == [r.key for r in requests(300)] and all(a.response and a.asked for a in answers)
        truth = server.report()
        assert truth["requests"] == truth["unique"] == 300 and truth["max_in_flight"] <= 32
        assert figures["spent_usd"] == pytest.approx(truth["billed_usd"]) and open_attempts(tmp_path) == 0
        again, _ = ask(tmp_path, server, 310, actors=2)
        assert again[:300] == answers and server.report()["requests"] == 310


def test_a_lone_surrogate_is_asked_about_like_anything_else(ray_local, tmp_path):
    odd = Request({**requests(1)[0].body, "messages": [{"role": "user", "content": '4 則\n{"user": "\ud83d", "assistant": "好"}'}]})
    with FaultyEndpoint(answers="canned") as server, Session(recipe(), tmp_path / "ledger.sqlite", server.base_url) as session:
        assert [a.error for a in session.ask([odd])] == [None] and next(iter(session.known([odd]))) == odd.key


def with_stopwatch(log):
    """A Caller that notes when each request left, when its answer was read, and the wait that this asked for."""

    class TimedCaller(Caller):
        async def _send(self, content):
            sent_s = time.monotonic()
            outcome = await super()._send(content)
            times = {"sent_s": sent_s, "read_s": time.monotonic(), "wait_s": retry_after_s(outcome["headers"])}
            with Path(log).open("a") as f:
                f.write(json.dumps(times) + "\n")
            return outcome

    return TimedCaller


def all_faults(tmp_path, monkeypatch, n, kinds):
    """5 % of each fault at once: complete, every paid answer kept, no Retry-After undercut; returns the server's report."""
    monkeypatch.setattr("graft.data.api.session.Caller", with_stopwatch(tmp_path / "times.jsonl"))
    faults = dict.fromkeys(kinds, 0.05)
    with FaultyEndpoint(prices=PRICES, faults=faults, log=tmp_path / "log.jsonl", late_s=3, retry_after_s=0.5) as server:
        answers, figures = ask(tmp_path, server, n, in_flight=64, timeout_s=1)
        truth = server.report()
        delivered = {r["key"] for r in server.requests() if r["status"] == 200 and r["fault"] in (None, *PAID_BUT_USELESS)}
    assert len(answers) == n and all(a.asked for a in answers)
    assert set(truth["faults"]) == set(kinds), "every fault was met"
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        kept = {k for (k,) in db.execute("SELECT key FROM answers")}
    lost = [a for a in answers if a.key not in kept]
    assert delivered <= kept, "an answer that was paid for and came is in the ledger"
    assert not lost, "13 attempts are enough"
    assert all("unreadable" in a.error for a in answers if a.error and a.key in kept)
    assert figures["spent_usd"] >= truth["billed_usd"], "what may have been billed is counted"
    sent = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    waits = [(t["read_s"], t["read_s"] + t["wait_s"]) for t in sent if t["wait_s"]]
    undercuts = sum(any(since <= t["sent_s"] < until for since, until in waits) for t in sent)
    assert len(sent) == truth["requests"] and len(waits) > n // 50
    assert undercuts == truth["undercuts_key"] == 0, "by the client's clock for every request, by the server's for the one that was told to wait"
    print(
        f"requests {truth['requests']}, unique {truth['unique']}, faults {truth['faults']}, paid answers kept {len(delivered)}/{len(delivered)}, "
        f"waits {len(waits)}, undercuts {undercuts}; by the server's clock, all requests, 50 ms after: {truth['undercuts_any']}"
    )
    return truth


def test_every_fault_at_once(ray_local, tmp_path, monkeypatch):
    all_faults(tmp_path, monkeypatch, 300, ISSUE)


def test_a_granted_request_waits_out_what_its_process_was_told(ray_local, tmp_path, monkeypatch):
    """The broker grants as long as it has not heard of a Retry-After; the process that read it knows at once."""

    class ToldCaller(with_stopwatch(tmp_path / "times.jsonl")):
        def __init__(self, *given):
            super().__init__(*given)
            self.closed_until_s = time.monotonic() + 1.5
            (tmp_path / "until").write_text(str(self.closed_until_s))

    monkeypatch.setattr("graft.data.api.session.Caller", ToldCaller)
    with FaultyEndpoint() as server:
        answers, _ = ask(tmp_path, server, 5)
    sent = [json.loads(line)["sent_s"] for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert all(a.response for a in answers) and len(sent) == 5 and min(sent) >= float((tmp_path / "until").read_text())


@pytest.mark.campaign
def test_every_fault_at_once_in_2000_requests(ray_local, tmp_path, monkeypatch):
    """On a quiet machine a request takes less than 50 ms to the server, so its clock can judge all of them."""
    assert all_faults(tmp_path, monkeypatch, 2000, ISSUE)["undercuts_any"] == 0


def test_a_cap_of_one_dollar_is_not_passed_by_the_servers_own_count(ray_local, tmp_path):
    faults = dict.fromkeys([*PASSING, *PAID_BUT_USELESS], 0.02)
    with FaultyEndpoint(prices=PRICES, faults=faults, retry_after_s=0.1, late_s=3) as server:
        answers, figures = ask(tmp_path, server, 200, budget_usd=1.0, timeout_s=1)
        billed = server.report()["billed_usd"]
        assert 0.5 < billed <= 1.0 and billed <= figures["spent_usd"] <= 1.0
        unasked = [a for a in answers if not a.asked]
        assert 0 < len(unasked) < 200 and all("budget" in a.error for a in unasked)
        before = server.report()["requests"]
        _, figures = ask(tmp_path, server, 200, budget_usd=1.0, timeout_s=1)  # another run, another day: the same cap
        assert server.report()["billed_usd"] <= 1.0 and server.report()["requests"] - before < 40
        raised, _ = ask(tmp_path, server, 200, budget_usd=90.0, timeout_s=1)
        assert all(a.asked for a in raised)
        print(f"billed {billed:.4f} of $ 1.00, counted {figures['spent_usd']:.4f}")


def test_a_cap_in_tokens(ray_local, tmp_path):
    with FaultyEndpoint() as server:
        answers, figures = ask(tmp_path, server, 100, budget_tokens=10_000)
        truth = server.report()
        assert 5_000 < truth["prompt_tokens"] + truth["completion_tokens"] == figures["tokens"] <= 10_000
        assert 0 < sum(a.asked for a in answers) < 100


def test_a_quota_code_ends_the_run_in_one_line(ray_local, tmp_path):
    with FaultyEndpoint(quota_after=50, latency_s=0.05) as server:
        with pytest.raises(CredentialError, match="insufficient_quota") as e:
            ask(tmp_path, server, 400)
        assert "\n" not in str(e.value) and server.report()["after_quota"] <= 32
        server.control(quota_after=None, quota=False)
        answers, _ = ask(tmp_path, server, 400)
        truth = server.report()
        assert all(a.response for a in answers) and truth["billed"] == truth["unique"] == 400, "what was paid before is not asked again"


def test_a_wrong_key_ends_the_run_in_one_line(ray_local, tmp_path, monkeypatch):
    with FaultyEndpoint(api_key="right") as server:
        with pytest.raises(CredentialError, match="401"):
            ask(tmp_path, server, 100)
        assert server.report()["requests"] <= 32


def test_requests_that_are_all_refused_end_the_run(ray_local, tmp_path):
    with FaultyEndpoint() as server:
        broken = [Request({**r.body, "messages": [{"role": "user", "content": f"no seed {i}"}]}) for i, r in enumerate(requests(100))]
        with (
            Session(recipe(in_flight=2), tmp_path / "ledger.sqlite", server.base_url) as session,
            pytest.raises(DataError, match=r"400.*refused, none answered"),
        ):
            list(session.ask(broken))
        assert server.report()["requests"] <= 10


def test_one_request_that_is_refused_is_one_failed_answer(ray_local, tmp_path):
    with FaultyEndpoint() as server:
        mixed = requests(20)
        mixed[7] = Request({**mixed[7].body, "messages": [{"role": "user", "content": "no seed"}]})
        with Session(recipe(in_flight=1), tmp_path / "ledger.sqlite", server.base_url) as session:
            answers = list(session.ask(mixed))
        assert [i for i, a in enumerate(answers) if a.error] == [7] and "400" in answers[7].error and server.report()["requests"] == 20


def test_a_gateways_page_is_nobodys_answer_and_an_address_needs_no_path(ray_local, tmp_path):
    asked = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            text = "<html>one moment</html>" if len(asked) == 1 else json.dumps({"choices": [{"message": {"content": "好"}}]})
            self.send_response(200)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        with Session(recipe(), tmp_path / "ledger.sqlite", f"http://127.0.0.1:{gateway.server_port}") as session:
            (answer,) = session.ask(requests(1))
            assert answer.response["choices"] and session.figures()["presumed"] == 1, "the page may have been paid for"
        gateway.shutdown()
    assert asked == ["/chat/completions"] * 2


def test_an_outage_is_waited_out_and_a_dead_server_is_given_up(ray_local, tmp_path):
    with FaultyEndpoint(latency_s=0.1) as server:
        server.control(outage_s=4)
        answers, figures = ask(tmp_path, server, 100)
        assert all(a.response for a in answers) and figures["presumed"] == 0, "what never left costs nothing"
        server.process.kill()
        began = time.monotonic()
        with pytest.raises(ServeError, match="has not answered for"):
            ask(tmp_path, server, 120, give_up_after_s=2)
        assert time.monotonic() - began < 30


def test_the_servers_limits_are_kept_once_they_are_known(ray_local, tmp_path):
    limits = {"requests_per_minute": 1200, "burst_s": 1, "in_flight": 16}
    with FaultyEndpoint(limits=limits, latency_s=0.02) as server:
        answers, _ = ask(tmp_path, server, 120, in_flight=16)
        truth = server.report()
        assert all(a.response for a in answers) and truth["undercuts_key"] == truth["undercuts_any"] == 0
        assert truth["statuses"].get("429", 0) <= 16, "the first burst, at most"
        told, _ = ask(tmp_path / "told", server, 60, in_flight=16, requests_per_minute=1100)
        assert all(a.response for a in told) and server.report()["statuses"].get("429", 0) == truth["statuses"].get("429", 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_is_one_line_and_room_again_goes_on(ray_local, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", small], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with FaultyEndpoint() as server:
            with pytest.raises(DataError, match=r"cannot be written: .*full") as e:
                ask(small, server, 1500)
            assert "\n" not in str(e.value)
            subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
            answers, _ = ask(small, server, 1500)
            truth = server.report()
            assert all(a.response for a in answers) and truth["requests"] <= truth["unique"] + 2 * 32
    finally:
        subprocess.run(["umount", "-l", small], check=False)


def test_an_answer_dearer_than_its_worst_case_stops_a_run_with_a_budget(ray_local, tmp_path):
    with (
        FaultyEndpoint() as server,
        Session(recipe(max_output_tokens=1, budget_usd=500), tmp_path / "ledger.sqlite", server.base_url) as session,
        pytest.raises(DataError, match=r"worst case.*max_output_tokens"),
    ):
        list(session.ask(requests(200, max_tokens=4000)))
