"""Adapters while the server runs: what is published is picked up, more of them than fit take turns, and nobody who asks notices."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from graft.core import store as stored
from graft.core.store import AdapterStore
from graft.serve.api import build
from graft.serve.probe import overridden
from graft.serve.runner import Runner

ASK = {"messages": [{"role": "user", "content": "sea"}], "max_tokens": 12, "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture
def serve(spec, tmp_path):
    """serve(adapters, its first state, **settings) -> (client, store), of a server of its own."""
    running = []

    def start(adapters, state="ready", **settings):
        store = AdapterStore(tmp_path / "store")
        for folder in adapters:
            store.add(folder.name, folder, {})
        own = {"store": str(store.root), "ready": (), **settings}
        client = TestClient(build(Runner(dataclasses.replace(spec, **own))), base_url="http://localhost")
        running.append(client.__enter__())
        assert until(lambda: (found := client.get("/ready").json()["status"]) != "loading" and found) == state
        return client, store

    yield start
    for client in running:
        client.__exit__(None, None, None)


def until(what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


def states(client):
    return {a["id"].partition("@")[0]: a["state"] for a in client.get("/admin/adapters").json()["data"]}


def said(client, model, **more):
    reply = client.post(CHAT, json={**ASK, "model": model, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_a_finished_training_run_is_picked_up_by_itself(serve, eight):
    client, store = serve(eight[:1])
    assert client.get("/v1/models").json()["data"][-1]["id"] == "base"
    store.add("fresh", eight[1], {})
    card = until(lambda: next((m for m in client.get("/v1/models").json()["data"] if m["id"] == "fresh" and m["state"] == "ready"), None))
    assert card["verified"]
    before = said(client, "fresh")
    store.add("fresh", eight[2], {})
    until(lambda: client.get("/v1/models/fresh").json()["version"] != card["version"])
    assert said(client, card["version"]) == before != said(client, "fresh"), "an older version is still there by its own name"


def test_more_adapters_than_fit_take_turns(serve, eight):
    alone = {}
    client, _ = serve(eight, max_adapters=8)
    for folder in eight:
        alone[folder.name] = said(client, folder.name)
    assert len(set(alone.values())) == 8
    small, _ = serve(eight, max_adapters=2)
    with ThreadPoolExecutor(8) as pool:
        names = [folder.name for folder in eight] * 4
        replies = list(pool.map(lambda name: small.post(CHAT, json={**ASK, "model": name}), names))
    for name, reply in zip(names, replies, strict=True):
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == alone[name], reply.text
    assert sum(state == "ready" for state in states(small).values()) <= 2
    for folder in eight:  # one after the other, all are answered
        assert said(small, folder.name) == alone[folder.name]


def test_reload_and_alias_under_load_fail_no_request(serve, eight):
    client, store = serve(eight[:3], max_adapters=4)
    one, two = (store.get(folder.name).id for folder in eight[:2])
    client.post("/admin/alias", json={"alias": "prod", "model": one})
    answers = {said(client, one), said(client, two)}
    over, replies = False, []

    def ask(n):
        while not over:
            replies.append(client.post(CHAT, json={**ASK, "model": "prod" if n % 2 else eight[2].name}))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, n) for n in range(4)]
        n = 0
        try:
            while n < 12 or len(replies) <= 12:  # however slow the machine answers
                assert client.post("/admin/reload", json={"model": one if n % 2 else eight[2].name}).status_code == 200
                assert client.post("/admin/alias", json={"alias": "prod", "model": two if n % 2 else one}).status_code == 200
                n += 1
        finally:
            over = True
        for done in asking:
            done.result()
    assert not [reply.text for reply in replies if reply.status_code != 200]
    assert {reply.json()["choices"][0]["message"]["content"] for reply in replies} == answers | {said(client, eight[2].name)}
    print(f"{len(replies)} requests answered while {n} reloads and {n} aliases were made, 0 failed")


def test_unload_takes_an_adapter_off_every_server_and_load_brings_it_back(serve, eight):
    client, store = serve(eight[:2])
    other, _ = serve(eight[:2])
    name = eight[0].name
    until(lambda: states(client)[name] == states(other)[name] == "ready")
    before = said(client, name)
    assert client.post("/admin/unload", json={"model": name}).json()["state"] == "cold"
    for server in (client, other):
        until(lambda server=server: name not in [m["id"] for m in server.get("/v1/models").json()["data"]])
        assert server.post(CHAT, json={**ASK, "model": name}).status_code == 404
        assert server.post(CHAT, json={**ASK, "model": store.get(name).id}).status_code == 404
    assert client.post("/admin/load", json={"model": name}).json()["state"] == "ready"
    assert said(client, name) == before
    until(lambda: name in [m["id"] for m in other.get("/v1/models").json()["data"]])
    assert said(other, name) == before


def test_a_restart_does_without_what_was_withdrawn(serve, eight):
    client, store = serve(eight[:2])
    name, own = eight[0].name, store.get(eight[0].name).id
    assert client.post("/admin/unload", json={"model": name}).status_code == 200
    again, _ = serve([], ready=(name, own, eight[1].name))
    assert again.post(CHAT, json={**ASK, "model": own}).status_code == 404 and said(again, eight[1].name)
    assert again.post("/admin/load", json={"model": name}).status_code == 200 and said(again, own)


@pytest.fixture
def foreign(eight, tmp_path):
    """A folder of an adapter that the gate refuses."""
    return shutil.copytree(eight[0], tmp_path / "foreign", ignore=shutil.ignore_patterns("parity.json"))


def test_a_server_whose_own_adapter_is_refused_waits_for_an_override(serve, spec, eight, foreign):
    client, store = serve([foreign], "failed", ready=("foreign",))
    assert "no parity.json" in (told := client.get("/ready").json()["error"]) and "`graft serve RECIPE --override WHY`" in told
    store.add("fresh", eight[1], {})
    until(lambda: states(client).get("fresh") == "ready")
    overridden(dataclasses.replace(spec, store=str(store.root), ready=(store.get("foreign").id,)), "checked by hand")
    assert until(lambda: (found := client.get("/ready").json())["status"] == "ready" and found)["error"] is None
    assert said(client, "foreign") and client.get("/v1/models/foreign").json()["override"] == "checked by hand"


def test_every_server_follows_an_override(serve, foreign):
    (client, store), (other, _) = serve([foreign]), serve([])
    for server in (client, other):
        assert server.post(CHAT, json={**ASK, "model": "foreign"}).status_code == 409
    assert client.post("/admin/load", json={"model": "foreign", "override": "checked by hand"}).status_code == 200
    until(lambda: states(other)["foreign"] == "ready")
    assert said(other, "foreign") == said(client, "foreign") and not other.get("/v1/models/foreign").json()["verified"]
    store.note("foreign", override=None)
    for server in (client, other):
        until(lambda server=server: server.post(CHAT, json={**ASK, "model": "foreign"}).status_code == 409)


def test_canaries_that_the_engine_cannot_hold_refuse_their_adapter_alone(serve, eight):
    client, store = serve(eight[:1], kv_tokens=24)
    until(lambda: states(client)[eight[0].name] == "refused")
    reply = client.post(CHAT, json={**ASK, "model": eight[0].name, "max_tokens": 1})
    assert reply.status_code == 409 and "canaries cannot be asked here (DataError: " in reply.json()["error"]["message"]
    store.add("fresh", eight[1], {})
    until(lambda: states(client).get("fresh") == "refused")  # so the store is followed still
    assert client.post("/admin/load", json={"model": "fresh", "override": "why not"}).json()["state"] == "ready"


def test_a_file_that_cannot_be_read_for_a_while_is_no_refusal(serve, eight, monkeypatch):
    client, store = serve([])
    hashed, stale = stored.sha256_file, True

    def on_nfs(file):
        if stale and file.parent.parent.name == "late":
            raise OSError(errno.ESTALE, "Stale file handle", str(file))
        return hashed(file)

    monkeypatch.setattr(stored, "sha256_file", on_nfs)
    store.add(eight[0].name, eight[0], {})
    shutil.copytree(store.root / eight[0].name, store.root / "late")
    store.alias("late", f"late@{store.get(eight[0].name).version}")
    until(lambda: "late" in client.get("/admin/adapters").json()["aliases"])
    reply = client.post(CHAT, json={**ASK, "model": "late"})
    assert reply.status_code == 503 and "Stale file handle" in reply.json()["error"]["message"]
    until(lambda: states(client)[eight[0].name] == "ready")
    assert states(client)["late"] == "cold"
    stale = False
    until(lambda: states(client)["late"] == "ready")


def test_one_bad_file_of_the_store_hides_no_other(serve, eight):
    client, store = serve(eight[:1])
    (store.root / "zzz").mkdir()
    (store.root / "zzz/alias").write_bytes(b"\xff\xfe")
    store.note(eight[0].name, evaluation={})
    store.get(eight[0].name).folder.with_suffix(".json").write_text("[]")
    store.add("late", eight[1], {})
    until(lambda: states(client).get("late") == "ready")
    assert client.post("/admin/load", json={"model": "zzz"}).status_code == 409


def test_a_store_that_cannot_be_written_says_so(serve, eight):
    client, store = serve(eight[:1])
    version = store.get(eight[0].name)
    version.folder.with_suffix(".json").mkdir()  # where its notes would go
    (store.root / "prod/alias").mkdir(parents=True)
    for route, asked in (("unload", {}), ("load", {"override": "why not"}), ("alias", {"alias": "prod"})):
        reply = client.post(f"/admin/{route}", json={"model": version.id, **asked})
        assert reply.status_code == 503 and reply.json()["error"]["message"].startswith("the store cannot be written: "), reply.text
    assert said(client, eight[0].name)


def test_a_model_trained_whole_takes_no_adapters(spec):
    whole = dataclasses.replace(spec, store=None, ready=(), base_name="whole")
    with TestClient(build(Runner(whole)), base_url="http://localhost") as client:
        until(lambda: client.get("/ready").json()["status"] == "ready")
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["whole"]
        assert client.post("/admin/load", json={"model": "one"}).json()["error"]["code"] == "no_adapters"
        assert client.post(CHAT, json={**ASK, "model": "whole"}).json()["usage"]["prompt_tokens"] > 3


def test_a_store_that_disappears_leaves_what_is_loaded(serve, eight):
    client, store = serve(eight[:1])
    version = store.get(eight[0].name).id
    until(lambda: states(client)[eight[0].name] == "ready")
    before = said(client, version)
    shutil.move(store.root, Path(store.root).with_name("gone"))
    time.sleep(1.2)
    assert said(client, version) == before
