"""Augmentation against a real local server over Ray Data: reproducible, never paid twice, refused in one line."""

import asyncio
import json
import shutil
import threading
from pathlib import Path

import pytest

from graft.core.errors import CredentialError, DataError
from graft.core.rows import read_jsonl
from graft.core.stages import Plan
from graft.data import augment
from graft.data.api import Caller, check_credentials
from graft.data.endpoint import complete
from graft.data.ledger import Ledger, request_key

CONFIGS = Path(__file__).parents[2] / "configs"


class Server:
    """The embedded endpoint behind faults: `faults` maps the n-th request to (status, headers, body)."""

    def __init__(self, faults=None):
        self.faults, self.seen, self.times = faults or {}, [], []

    def __enter__(self):
        from aiohttp import web

        async def answer(request):
            body = await request.json()
            self.seen.append(request_key(body))
            self.times.append(asyncio.get_running_loop().time())
            fault = self.faults.get(len(self.seen)) or self.faults.get("all")
            if fault:
                return web.json_response(fault[2], status=fault[0], headers=fault[1])
            status, found = complete(body)
            return web.json_response(found, status=status)

        async def serve():
            app = web.Application()
            app.router.add_post("/v1/chat/completions", answer)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self.stop.wait()
            await runner.cleanup()

        ready = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()


def plan(root, *overrides):
    if not (root / "configs").exists():
        shutil.copytree(CONFIGS, root / "configs")
    small = ("augment.rows_per_class=60", "augment.calls_per_round=16", *overrides)  # later overrides win
    return Plan(root / "configs/recipes/image-intent-tiny.toml", small, root)


def fill(p):
    augment.run(p.resolve("augment"))
    return p.artifact("augment")


@pytest.fixture
def server(monkeypatch):
    with Server() as s:
        monkeypatch.setenv("OPENAI_BASE_URL", s.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield s


def test_rows_join_seeds_and_nothing_is_asked_twice(ray_local, server, tmp_path):
    p = plan(tmp_path, "augment.rows_per_class=130", "augment.calls_per_round=40")
    artifact = fill(p)
    rows = list(read_jsonl(artifact.path / "rows.jsonl"))
    assert artifact.counts["rows"] == {"call": 130, "text": 130} and len(rows) == len({r["id"] for r in rows}) == 260
    assert len({r["messages"][0]["content"] for r in rows}) == 260
    by_id = {r["id"]: r for r in rows}
    assert all(r["parent"] is None or by_id[r["parent"]]["family"] == r["family"] for r in rows if r["parent"] in by_id or r["parent"] is None)
    assert any(r["parent"] in by_id and by_id[r["parent"]]["parent"] for r in rows), "accepted rewrites are rewritten in their turn"
    assert len(server.seen) == len(set(server.seen)) == artifact.counts["requests"]
    answered = sum(r["accepted"] for r in read_jsonl(artifact.path / "requests.jsonl"))
    assert answered + artifact.counts["rejected"] == 4 * artifact.counts["requests"]

    first, digest = len(server.seen), artifact.digest
    shutil.rmtree(artifact.path)
    assert fill(p).digest == digest and len(server.seen) == first, "the ledger answered everything"
    (tmp_path / "data_shards/image-intent-tiny/ledger.sqlite").unlink()
    shutil.rmtree(artifact.path)
    assert fill(p).digest == digest and len(server.seen) == 2 * first, "asked again, the same rows"


def test_a_quota_stops_the_run_in_one_line_and_keeps_what_was_paid(ray_local, server, tmp_path):
    server.faults["all"] = (429, {}, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    p = plan(tmp_path)
    with pytest.raises(DataError, match="insufficient_quota"):
        fill(p)
    assert len(server.seen) <= 16 and not list(p.home("data_shards").glob("augment/*"))
    del server.faults["all"]
    server.faults[len(server.seen) + 5] = (401, {}, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
    with pytest.raises(CredentialError, match="401"):
        fill(p)
    paid = Ledger(p.home("data_shards") / "ledger.sqlite")
    assert len(paid) == 15
    before = len(server.seen)
    assert len(server.seen) - before + len(paid) + fill(p).counts["requests"] >= len(set(server.seen))
    assert len(server.seen) == len(set(server.seen)) + 16 + 1, "only the refused ones were sent again"


def ask(url, body):
    async def go():
        return await Caller(url, 10)._ask(body)

    return asyncio.run(go())


BODY = {"model": "m", "messages": [{"role": "user", "content": '4 則\n{"user": "你好嗎", "assistant": "很好"}'}]}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_waited_out_and_retry_after_is_kept(status):
    with Server({1: (status, {"Retry-After": "1"}, {"error": {"message": "wait"}})}) as s:
        raw, error = ask(s.url, BODY)
    assert not error and len(json.loads(json.loads(raw)["choices"][0]["message"]["content"])["rewrites"]) == 4
    assert len(s.seen) == 2 and s.times[1] - s.times[0] >= 1


@pytest.mark.parametrize(("status", "code"), [(401, "invalid_api_key"), (400, "bad"), (429, "insufficient_quota")])
def test_hopeless_faults_are_not_retried(status, code):
    with Server({"all": (status, {}, {"error": {"message": "no\nway", "code": code}})}) as s:
        raw, error = ask(s.url, BODY)
    assert raw == "" and error.startswith(str(status)) and code in error and "\n" not in error and len(s.seen) == 1


def test_a_remote_server_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(CredentialError, match=r"api\.example\.com.*OPENAI_API_KEY"):
        check_credentials("https://api.example.com/v1")
    check_credentials("http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk")
    check_credentials("https://api.example.com/v1")


def test_saturation_ends_in_one_line(ray_local, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    p = plan(tmp_path, "augment.max_rounds=1")
    with pytest.raises(DataError, match="missing after 1 rounds"):
        fill(p)
