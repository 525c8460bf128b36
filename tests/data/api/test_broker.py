"""The broker over its real WebSocket: one answer is paid once, caps hold, a dead holder is followed by the next."""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys

import pytest

from graft.core.errors import ArtifactError
from graft.data.api.client import Client, unsent
from graft.data.api.keeper import keep
from graft.data.api.lease import Lease, surely_dead, this_process

LIMITS = {"in_flight": 4, "requests_per_minute": None, "tokens_per_minute": None, "budget_usd": None, "budget_tokens": None, "give_up_after_s": 60}


def hello(session="s", account="recipe", **limits):
    return {"session": session, "account": account, "endpoint": "http://e", "model": "m", "limits": {**LIMITS, **limits}}


def paid(decision, key, usd=0.1, tokens=10, response="{}"):
    return unsent(decision.attempt, key) | {
        "state": "paid", "usd": usd, "tokens": tokens, "request": "{}", "response": response, "outcome": "answer", "reason": "", "kind": ""
    }  # fmt: skip


def failed(decision, key, outcome="server", state="free", **more):
    return unsent(decision.attempt, key) | {"outcome": outcome, "state": state, "reason": "why", "kind": "data", **more}


@contextlib.asynccontextmanager
async def broker(path):
    task = asyncio.create_task(keep(path))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def with_broker(tmp_path, scenario):
    async def go():
        path = tmp_path / "ledger.sqlite"
        async with broker(path):
            await asyncio.wait_for(scenario(path), 30)

    asyncio.run(go())


def test_the_second_who_wants_an_answer_gets_the_first_ones(tmp_path):
    async def scenario(path):
        a, b = Client(path, hello("a", "one")), Client(path, hello("b", "two"))
        grant = await a.claim("k", 1, 10)
        other = asyncio.create_task(b.claim("k", 1, 10))
        twin = asyncio.create_task(a.claim("k", 1, 10))
        await asyncio.sleep(0.1)
        assert grant.what == "grant" and not other.done() and not twin.done()
        await a.settle(paid(grant, "k", response='{"n": 1}'))
        assert (await other).what == (await twin).what == "known"
        assert await b.ask(answers=["k"]) == {"k": '{"n": 1}'} and (await b.claim("k", 1, 10)).what == "known"
        figures = await b.ask(stats="b")
        assert figures["spent_usd"] == 0 and (await a.ask(stats="a"))["spent_usd"] == pytest.approx(0.1)

    with_broker(tmp_path, scenario)


def test_a_failure_hands_the_request_to_the_next_who_waits(tmp_path):
    async def scenario(path):
        a, b = Client(path, hello("a")), Client(path, hello("b"))
        grant = await a.claim("k", 1, 10)
        other = asyncio.create_task(b.claim("k", 1, 10))
        await asyncio.sleep(0.05)
        await a.settle(failed(grant, "k"))
        assert (await other).what == "grant"
        again = asyncio.create_task(a.claim("k", 1, 10))
        await asyncio.sleep(0.05)
        await b.close()  # it goes with the request under way: its owner lives, so it may still come back
        assert not again.done()

    with_broker(tmp_path, scenario)


def test_a_client_that_comes_back_keeps_its_own_grants_alone(tmp_path):
    async def scenario(path):
        a = Client(path, hello("a"))
        grant = await a.claim("k", 1, 10)
        b = Client(path, hello("b"))  # of the same process: it says hello while the first has a request under way
        waiting = asyncio.create_task(b.claim("k", 1, 10))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await a.settle(paid(grant, "k"))
        assert (await waiting).what == "known"

    with_broker(tmp_path, scenario)


def test_the_cap_counts_what_is_reserved_lost_and_paid(tmp_path):
    async def scenario(path):
        c = Client(path, hello(budget_usd=1.0))
        first, second = await c.claim("a", 0.4, 10), await c.claim("b", 0.4, 10)
        third = asyncio.create_task(c.claim("c", 0.4, 10))
        await asyncio.sleep(0.1)
        assert not third.done(), "0.8 are reserved"
        await c.settle(paid(first, "a", usd=0.1))
        assert (await third).what == "grant"
        await c.settle(failed(second, "b", "connection", "lost", usd=0.4, tokens=10))
        await c.settle(paid(await third, "c", usd=0.3))
        assert (await c.claim("d", 0.4, 10)).what == "budget" and (await c.claim("e", 0.2, 10)).what == "grant"
        figures = await c.ask(stats="s")
        assert (
            figures["spent_usd"] == pytest.approx(0.8)
            and figures["presumed_usd"] == pytest.approx(0.4)
            and figures["reserved_usd"] == pytest.approx(0.2)
        )
        free = Client(path, hello("t", "other recipe"))
        assert (await free.claim("f", 99, 10)).what == "grant", "another recipe's budget is its own"

    with_broker(tmp_path, scenario)


def test_a_cap_is_that_of_who_asks(tmp_path):
    """Another run of the recipe, or a look at a larger budget, lifts nobody's."""

    async def scenario(path):
        run = Client(path, hello("run", budget_usd=1.0))
        await run.settle(paid(await run.claim("a", 0.9, 10), "a", usd=0.9))
        look = Client(path, hello("look", budget_usd=100.0))
        assert (await look.ask(stats="look"))["spent_usd"] == pytest.approx(0.9), "one account"
        assert (await run.claim("b", 0.4, 10)).what == "budget" and (await look.claim("b", 0.4, 10)).what == "grant"

    with_broker(tmp_path, scenario)


def test_who_waits_for_anothers_request_gets_it_on_whichever_lane(tmp_path):
    """Though none of its own was ever admitted there."""

    async def scenario(path):
        a, b = Client(path, hello("a")), Client(path, {**hello("b"), "endpoint": "http://other"})
        grant = await a.claim("k", 1, 10)
        waiting = asyncio.create_task(b.claim("k", 1, 10))
        await asyncio.sleep(0.1)
        await a.settle(failed(grant, "k"))
        assert (await waiting).what == "grant"

    with_broker(tmp_path, scenario)


def test_a_cap_in_tokens_holds_too(tmp_path):
    async def scenario(path):
        c = Client(path, hello(budget_tokens=100))
        await c.settle(paid(await c.claim("a", 0, 60), "a", tokens=60))
        assert (await c.claim("b", 0, 60)).what == "budget" and (await c.claim("c", 0, 40)).what == "grant"

    with_broker(tmp_path, scenario)


def test_what_the_quota_code_ends_ends_for_all_who_ask_there(tmp_path):
    async def scenario(path):
        a, b = Client(path, hello("a", in_flight=1)), Client(path, hello("b", in_flight=1))
        grant = await a.claim("k", 1, 10)
        waiting = [asyncio.create_task(c.claim(f"k{i}", 1, 10)) for i, c in enumerate((a, b, a, b))]
        await asyncio.sleep(0.1)
        await a.settle(failed(grant, "k", "fatal", reason="no quota", kind="credential"))
        assert {(d.what, d.kind, d.reason) for d in await asyncio.gather(*waiting)} == {("stopped", "credential", "no quota")}
        assert a.halted and b.halted
        later = Client(path, hello("c", in_flight=1))
        assert (await later.claim("k", 1, 10)).what == "grant", "a later run tries again"

    with_broker(tmp_path, scenario)


def test_a_server_that_is_down_is_probed_and_then_given_up(tmp_path):
    async def scenario(path):
        c = Client(path, hello(give_up_after_s=1.2, in_flight=64))
        grants = [await c.claim(f"k{i}", 0, 1) for i in range(10)]
        for i, grant in enumerate(grants):
            await c.settle(failed(grant, f"k{i}", "connection"))
        probe = await c.claim("p", 0, 1)
        rest = asyncio.create_task(c.claim("q", 0, 1))
        await asyncio.sleep(0.2)
        assert probe.what == "grant" and not rest.done(), "one probe at a time"
        await c.settle(failed(probe, "p", "connection"))
        decision = await rest
        while decision.what == "grant":
            await c.settle(failed(decision, "q", "connection"))
            decision = await c.claim("q", 0, 1)
        assert decision.what == "stopped" and decision.kind == "server" and "why" in decision.reason

    with_broker(tmp_path, scenario)


def test_the_address_is_the_owners_alone_and_a_stranger_is_refused(tmp_path):
    async def scenario(path):
        import aiohttp

        client = Client(path, hello())
        await client.ask(stats="s")
        lease = Lease(path)
        assert stat.S_IMODE(lease.address_path.stat().st_mode) == 0o600 and lease.address().host == "127.0.0.1"
        async with aiohttp.ClientSession() as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                async with http.get(lease.address().url + "/broker", headers=headers) as reply:
                    assert reply.status == 401
        assert not lease.acquire(), "the kernel's lock is held"

    with_broker(tmp_path, scenario)


HOLDER = """
import asyncio, sys, threading
from pathlib import Path
from graft.data.api.client import Client
from graft.data.api.keeper import keep
sys.path.insert(0, sys.argv[2])
from test_broker import hello
async def main():
    path = Path(sys.argv[1])
    keeper = asyncio.create_task(keep(path))
    client = Client(path, hello("holder", "recipe", budget_usd=1.0))
    await client.claim("killed", 0.4, 10)
    print("granted", flush=True)
    await keeper
asyncio.run(main())
"""


def test_a_killed_holder_is_followed_and_what_it_had_under_way_counts_at_its_worst(tmp_path):
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "granted\n"

    async def go():
        async with broker(path):
            client = Client(path, hello("next", budget_usd=1.0))
            mine = await client.claim("mine", 0.1, 10)  # still by the holder that will be killed
            process.send_signal(signal.SIGKILL)
            process.wait()
            await asyncio.wait_for(client.settle(paid(mine, "mine", usd=0.05)), 10)  # by its successor
            assert (await client.ask(answers=["mine"])) == {"mine": "{}"}
            figures = await client.ask(stats="next")
            assert figures["spent_usd"] == pytest.approx(0.45) and figures["presumed"] == 1
            assert (await asyncio.wait_for(client.claim("killed", 0.4, 10), 5)).what == "grant", "its request is asked again at once"

    asyncio.run(go())


def test_a_message_that_the_broker_cannot_read_is_told_to_its_sender_alone(tmp_path):
    async def scenario(path):
        good, bad = Client(path, hello("a")), Client(path, {**hello("b"), "limits": {}})
        with pytest.raises(ArtifactError, match="run one version of graft"):
            await bad.claim("k", 1, 10)
        assert (await good.claim("l", 1, 10)).what == "grant"

    with_broker(tmp_path, scenario)


def test_without_any_holder_the_client_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.data.api.client.PATIENCE_S", 0.3)

    async def go():
        client = Client(tmp_path / "ledger.sqlite", hello())
        with pytest.raises(ArtifactError, match="nobody writes"):
            await client.claim("k", 0, 1)
        with pytest.raises(ArtifactError, match="nobody writes"):
            await client.ask(stats="s")

    asyncio.run(go())


def test_processes_are_told_apart():
    assert not surely_dead(this_process())
    host, pid, _ = this_process().rsplit(":", 2)
    assert surely_dead(f"{host}:{pid}:1"), "the same number, another process"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert surely_dead(f"{host}:{gone.pid}:5") and not surely_dead("elsewhere:1:1")
