"""The engine's thread: what waits becomes a batch, what leaves is dropped, and nobody waits for an engine that ended."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from graft.core.errors import ServeError
from graft.engine.protocol import Request
from graft.serve.api import build
from graft.serve.app import Replica
from graft.serve.runner import Overloaded, Runner

PROMPT = [5, 6, 7]


def wait(condition, seconds=30.0):
    async def poll():
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    return poll()


async def read(ticket, pause_s=0.0):
    return [chunk async for burst in ticket.bursts(pause_s) for chunk in burst]


def test_waiting_requests_become_one_batch_and_too_many_are_refused(spec):
    async def scene():
        runner = Runner(dataclasses.replace(spec, max_batch=3))
        with pytest.raises(ServeError, match="loading"):
            runner.submit(Request(PROMPT, 1))
        await wait(lambda: runner.state != "loading")
        sizes, stream = [], runner.engine.stream
        runner.engine.stream = lambda requests, **more: sizes.append(len(requests)) or stream(requests, **more)  # only counts
        busy = runner.submit(Request(PROMPT, 200))
        await wait(lambda: sizes == [1])
        others = [runner.submit(Request(PROMPT, 2)) for _ in range(24)]
        with pytest.raises(Overloaded, match="24 requests"):
            runner.submit(Request(PROMPT, 2))
        await asyncio.gather(*map(read, [busy, *others]))
        assert sizes == [1] + [3] * 8
        runner.stop()
        with pytest.raises(ServeError, match=r"stopping|failed"):
            runner.submit(Request(PROMPT, 2))
        await wait(lambda: not runner.thread.is_alive())

    asyncio.run(scene())


def test_a_reader_that_leaves_frees_its_row(spec):
    async def scene():
        runner = Runner(spec)
        await wait(lambda: runner.state == "ready")
        runner.engine.ends = frozenset()  # nothing but leaving ends the row before its length
        ticket = runner.submit(Request(PROMPT, 250))
        reader = asyncio.create_task(read(ticket))
        await asyncio.sleep(0.02)
        reader.cancel()
        assert (await asyncio.gather(reader, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        assert ticket.dropped
        await read(runner.submit(Request(PROMPT, 1)))
        assert ticket.chunks.qsize() < 250  # it did not run to its end
        runner.stop()

    asyncio.run(scene())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_every_reader(spec):
    async def scene():
        replica = Replica(spec, None)
        runner = replica.runner
        await wait(lambda: runner.state == "ready")
        replica.check_health()
        bad = runner.submit(Request([10**6], 5))  # no such token: the embedding raises
        with pytest.raises(ServeError, match="stopped while"):
            await read(bad)
        runner.thread.join(10)
        assert runner.state == "failed" and not runner.thread.is_alive()
        with pytest.raises(ServeError, match="stopped"):
            replica.check_health()  # so Ray Serve replaces it
        with pytest.raises(ServeError, match="failed"):
            runner.submit(Request(PROMPT, 1))
        reply = TestClient(build(runner)).post("/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "x"}]})
        assert reply.status_code == 503 and reply.headers["retry-after"] and "failed" in reply.json()["error"]["message"]

    asyncio.run(scene())


def test_a_model_that_does_not_load_says_why(spec):
    async def scene():
        runner = Runner(dataclasses.replace(spec, adapters={"one": "/nonexistent"}))
        await wait(lambda: runner.state != "loading")
        assert runner.state == "failed" and "holds no readable adapter" in runner.error

    asyncio.run(scene())


def test_a_model_is_named_by_the_fingerprint_of_its_artifact(spec, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"fingerprint": "abc"}))
    named = dataclasses.replace(spec, adapters={"x": str(tmp_path)}, base="owner/name", revision="r1")
    assert (named.fingerprint("x"), named.fingerprint("base"), spec.fingerprint("one")) == ("abc", "r1", None)
    assert not (Path(spec.base) / "manifest.json").exists()
