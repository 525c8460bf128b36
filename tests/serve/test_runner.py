"""The engine's thread: requests join while others run, what leaves is dropped, and nobody waits for an engine that ended."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
from starlette.testclient import TestClient

from graft.core.errors import ServeError
from graft.engine.protocol import Request
from graft.serve.api import build
from graft.serve.app import Replica
from graft.serve.guard import Keys
from graft.serve.runner import IDLE_S, Overloaded, Runner

PROMPT = [5, 6, 7]


def wait(condition, seconds=30.0):
    async def poll():
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    return poll()


async def read(ticket, pause_s=0.0):
    return [chunk async for burst in ticket.bursts(pause_s) for chunk in burst]


def test_requests_join_what_runs_and_too_many_are_refused(spec):
    async def scene():
        runner = Runner(dataclasses.replace(spec, max_batch=3))
        with pytest.raises(ServeError, match="loading"):
            await runner.submit(Request(PROMPT, 1))
        await wait(lambda: runner.state != "loading")
        sizes, step, held = [], runner.engine.step, True
        runner.engine.step = lambda: [] if held else (step(), sizes.append(len(runner.engine._rows)))[0]  # counts, and waits for all
        busy = await runner.submit(Request(PROMPT, 200, ends=()))
        others = [await runner.submit(Request(PROMPT, 2, ends=())) for _ in range(26)]
        with pytest.raises(Overloaded, match="27 requests"):
            await runner.submit(Request(PROMPT, 2))
        held = False
        long, *short = await asyncio.gather(*map(read, [busy, *others]))
        assert max(sizes) == 3 and [len(s) for s in short] == [2] * 26 and len(long) == 200
        assert len(sizes) < 240, "others ran while the long one did: one after the other they take 252 steps"
        await wait(lambda: runner.under_way == 0)
        runner.stop()
        with pytest.raises(ServeError, match=r"stopping|failed"):
            await runner.submit(Request(PROMPT, 2))
        await wait(lambda: not runner.thread.is_alive())

    asyncio.run(scene())


def test_a_reader_that_leaves_frees_its_row(spec):
    async def scene():
        runner = Runner(spec)
        await wait(lambda: runner.state == "ready")
        ticket = await runner.submit(Request(PROMPT, 250, ends=()))
        reader = asyncio.create_task(read(ticket))
        await asyncio.sleep(0.02)
        reader.cancel()
        assert (await asyncio.gather(reader, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        assert ticket.dropped
        await read(await runner.submit(Request(PROMPT, 1)))
        await wait(lambda: runner.under_way == 0, 5)
        assert ticket.chunks.qsize() < 250 and not runner.engine.busy  # it did not run to its end
        runner.stop()

    asyncio.run(scene())


def test_a_client_that_leaves_while_its_request_is_taken_gives_one_place_back(spec):
    async def scene():
        runner = Runner(spec)
        await wait(lambda: runner.state == "ready")
        taking, may, add = threading.Event(), threading.Event(), runner.engine.add

        def slow(request):  # as where its adapter is loaded first
            taking.set()
            may.wait(10)
            return add(request)

        runner.engine.add = slow
        submitting = asyncio.create_task(runner.submit(Request(PROMPT, 4)))
        await wait(taking.is_set)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        assert runner.under_way == 0
        may.set()
        await runner.call(lambda engine: None)
        await wait(lambda: not runner._tickets)  # the step found that it has left
        await runner.call(lambda engine: None)
        assert runner.under_way == 0
        runner.stop()

    asyncio.run(scene())


def test_what_is_called_comes_between_two_steps_and_its_errors_come_back(spec):
    async def scene():
        runner = Runner(spec)
        await wait(lambda: runner.state == "ready")
        ticket = await runner.submit(Request(PROMPT, 30, ends=()))
        assert await runner.call(lambda engine: engine.max_length) == 256
        with pytest.raises(ServeError, match="no way"):
            await runner.call(lambda engine: (_ for _ in ()).throw(ServeError("no way")))
        assert len(await read(ticket)) == 30
        runner.stop()

    asyncio.run(scene())


def test_those_under_way_end_when_the_runner_stops(spec):
    async def scene():
        runner = Runner(spec)
        await wait(lambda: runner.state == "ready")
        tickets = [await runner.submit(Request(PROMPT, 40, ends=())) for _ in range(9)]
        runner.stop()
        assert [len(chunks) for chunks in await asyncio.gather(*map(read, tickets))] == [40] * 9
        await wait(lambda: not runner.thread.is_alive())

    asyncio.run(scene())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_every_reader(spec):
    async def scene():
        replica = Replica(spec, Keys())
        runner = replica.runner
        await wait(lambda: runner.state == "ready")
        replica.check_health()
        bad = await runner.submit(Request([10**6], 5))  # no such token: the embedding raises
        with pytest.raises(ServeError, match="stopped while"):
            await read(bad)
        runner.thread.join(10)
        assert runner.state == "failed" and not runner.thread.is_alive()
        with pytest.raises(ServeError, match="stopped"):
            replica.check_health()  # so Ray Serve replaces it
        with pytest.raises(ServeError, match="failed"):
            await runner.submit(Request(PROMPT, 1))
        client = TestClient(build(runner), base_url="http://localhost")
        reply = client.post("/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "x"}]})
        assert reply.status_code == 503 and reply.headers["retry-after"] and "failed" in reply.json()["error"]["message"]

    asyncio.run(scene())


def test_an_engine_that_ends_while_nobody_asks_is_found_out(spec):
    async def scene():
        runner = Runner(spec)
        await wait(lambda: runner.state == "ready")
        gone = False

        def step():
            if gone:
                raise ServeError("its process has ended")
            return []

        runner.engine.step = step
        await asyncio.sleep(1.5 * IDLE_S)
        assert runner.state == "ready"
        gone = True
        await wait(lambda: runner.state == "failed", 10)
        assert runner.error == "its process has ended"

    asyncio.run(scene())


def test_a_base_that_does_not_load_says_why(spec):
    async def scene():
        runner = Runner(dataclasses.replace(spec, base="/nonexistent"))
        await wait(lambda: runner.state != "loading")
        assert runner.state == "failed" and "is no folder" in runner.error

    asyncio.run(scene())
