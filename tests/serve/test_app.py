"""The server on a real Ray, asked through the official client; and the addresses that it refuses before Ray is even loaded."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import stat
import sys
import tempfile
import urllib.request
from pathlib import Path

import openai
import pytest

from graft.core.errors import ServeError
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request
from graft.model.chat import load_tokenizer, render_prompt
from graft.serve.app import check_address, start
from graft.serve.probe import ask, where

MESSAGES = [{"role": "user", "content": "畫 sea"}]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(spec):
    """A server with its own home folder; the folder for Ray's sockets must be short, so it is not pytest's."""
    short = tempfile.mkdtemp(prefix="ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", short)
        patch.delenv("GRAFT_API_KEY", raising=False)
        with start(dataclasses.replace(spec, port=free_port()), temp_dir=short, timeout_s=120) as server:
            yield server
    import ray

    assert not ray.is_initialized()
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) != 0  # nothing listens any more
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(spec):
    """{model: its greedy answer of 16 tokens, from an engine in this process}"""
    tokenizer = load_tokenizer(spec.tokenizer)
    engine = HFEngine(spec.base, None, "fp32", spec.adapters, tokenizer, device="cpu")
    prompt = render_prompt(tokenizer, MESSAGES)
    return {m: engine.generate([Request(prompt, 16, adapter=a)])[0].text for m, a in spec.models().items()}


def test_the_client_lists_asks_and_streams(server, client, expected):
    assert [m.id for m in client.models.list()] == list(expected) and len(set(expected.values())) == 3
    for model, text in expected.items():
        assert ask(server.url, model, MESSAGES[0]["content"], 16)["reply"] == text
    question = {"model": "two", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    stream = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content or "" for e in stream[:-1]) == expected["two"]
    assert stream[-1].usage == client.chat.completions.create(**question).usage


def test_many_clients_at_once(server, expected):
    async def scene():
        direct = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=direct, max_retries=0) as client:

            async def one(model):
                reply = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=16, temperature=0)
                return reply.choices[0].message.content

            models = list(expected) * 8
            assert await asyncio.gather(*map(one, models)) == [expected[m] for m in models]

    asyncio.run(scene())


def test_the_client_raises_what_openai_would(client):
    with pytest.raises(openai.NotFoundError, match="'three' does not exist"):
        client.chat.completions.create(model="three", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="unsupported field 'tools'") as e:
        client.chat.completions.create(model="one", messages=MESSAGES, tools=[])
    assert e.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="the model holds"):
        client.chat.completions.create(model="one", messages=MESSAGES, max_tokens=10_000)


def test_a_client_that_leaves_does_not_hold_up_the_next(client):
    stream = client.chat.completions.create(model="base", messages=MESSAGES, temperature=2, seed=1, stream=True)
    next(iter(stream))
    stream.close()
    assert client.with_options(timeout=10).chat.completions.create(model="base", messages=MESSAGES, max_tokens=1).usage.completion_tokens <= 1


def test_the_page_the_dashboard_and_the_token(server):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{server.url}/", timeout=10) as page:
        assert page.headers["content-type"].startswith("text/html") and "送出 Send" in page.read().decode()
    assert server.dashboard_url.startswith("http://127.0.0.1:") and server.dashboard_url in where(server, "one")
    token = Path(os.environ["HOME"]) / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_second_server_on_the_same_port_is_one_line(server, spec):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ServeError, match=rf"port {port} on 127.0.0.1 is in use.*--set serve.port=N"):
        start(dataclasses.replace(spec, port=port))


def test_addresses(monkeypatch):
    check_address("127.0.0.1", port := free_port(), None)
    check_address("localhost", port, None)
    check_address("0.0.0.0", port, "key")
    with pytest.raises(ServeError, match="GRAFT_API_KEY"):
        check_address("0.0.0.0", port, None)
    with pytest.raises(ServeError, match="no address"):
        check_address("my host", port, None)
    with pytest.raises(ServeError, match="203.0.113.7"):
        check_address("203.0.113.7", port, "key")  # an address that no interface has


def test_a_model_that_does_not_load_ends_the_start_and_what_it_started(spec, server):
    # the module's server runs in this process: its Ray is used, and must be left alone
    import ray

    assert ray.is_initialized() and "ray" in sys.modules
