"""The server on a real Ray, asked through the official client; and the addresses that it refuses before Ray is even loaded."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from graft.core.errors import ServeError
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request
from graft.model.chat import load_tokenizer, render_prompt
from graft.serve.app import check_address, spec_of, start
from graft.serve.probe import ask

MESSAGES = [{"role": "user", "content": "畫 sea"}]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def plan(tiny, finished):
    return finished(tiny[1]["two"])


@pytest.fixture(scope="module")
def url(plan, process):
    """What `graft serve RECIPE` starts; it must say where it is, answer until SIGTERM, and leave nothing behind."""
    url = f"http://127.0.0.1:{plan.recipe.serve.port}"
    served = process("from graft.serve.probe import serve_forever; serve_forever(plan)", plan)
    try:
        said = [served.stdout.readline() for _ in range(4)]
        assert f"{url}/v1  (model 'tiny')" in said[0] and f"{url}/" in said[1] and "http://127.0.0.1:" in said[2], said
        yield url
        with ThreadPoolExecutor(1) as pool:  # what is under way ends as it would have
            asking = pool.submit(long_answer, url)
            time.sleep(0.3)
            assert not asking.done()
            served.send_signal(signal.SIGTERM)
            assert sum(choice.finish_reason in ("length", "stop") for choice in asking.result(60).choices) == 8
        assert served.wait(40) == 0 and served.stdout.read().endswith("stopping\n")  # behind what Ray says of the replica that was killed
        with pytest.raises(urllib.error.URLError):
            DIRECT.open(f"{url}/health", timeout=2)
    finally:
        served.kill()
        served.wait()


def long_answer(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0) as client:
        return client.chat.completions.create(model="base", messages=MESSAGES, temperature=2, seed=1, n=8, max_tokens=200, extra_body={"top_k": 90})


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(plan):
    """{model: its greedy answer of 16 tokens, from an engine in this process}"""
    spec = spec_of(plan)
    tokenizer = load_tokenizer(spec.tokenizer)
    engine = HFEngine(spec.base, None, "fp32", {"tiny": plan.artifact("sft").path}, tokenizer, device="cpu")
    prompt = render_prompt(tokenizer, MESSAGES)
    return {m: engine.generate([Request(prompt, 16, adapter=a)])[0].text for m, a in (("tiny", "tiny"), ("base", None))}


def test_the_client_lists_asks_and_streams(url, client, expected):
    assert [m.id for m in client.models.list()] == list(expected) == ["tiny", "base"]
    assert expected["tiny"] != expected["base"]
    for model, text in expected.items():
        assert ask(url, model, MESSAGES[0]["content"], 16)["reply"] == text
    question = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    stream = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content or "" for e in stream[:-1]) == expected["tiny"]
    assert stream[-1].usage == client.chat.completions.create(**question).usage


def test_many_clients_at_once(url, expected):
    async def scene():
        direct = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=direct, max_retries=0) as client:

            async def one(model):
                reply = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=16, temperature=0)
                return reply.choices[0].message.content

            models = list(expected) * 12
            assert await asyncio.gather(*map(one, models)) == [expected[m] for m in models]

    asyncio.run(scene())


def test_the_client_raises_what_openai_would(client):
    with pytest.raises(openai.NotFoundError, match="'three' does not exist"):
        client.chat.completions.create(model="three", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="unsupported field 'tools'") as e:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[])
    assert e.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="the model holds"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10_000)


def test_a_client_that_leaves_does_not_hold_up_the_next(client):
    stream = client.chat.completions.create(model="base", messages=MESSAGES, temperature=2, seed=1, stream=True)
    next(iter(stream))
    stream.close()
    assert client.with_options(timeout=10).chat.completions.create(model="base", messages=MESSAGES, max_tokens=1).usage.completion_tokens <= 1


def test_the_page_the_probes_and_the_token(url, plan):
    with DIRECT.open(f"{url}/", timeout=10) as page:
        assert page.headers["content-type"].startswith("text/html") and "送出 Send" in page.read().decode()
    assert DIRECT.open(f"{url}/health", timeout=10).status == DIRECT.open(f"{url}/ready", timeout=10).status == 200
    assert stat.S_IMODE((plan.root / ".ray" / "auth_token").stat().st_mode) == 0o600


def replica_pid(plan):
    """Of the engine's replica of this plan's server."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            home = f"HOME={plan.root}".encode()
            if b"ServeReplica:graft" in (entry / "cmdline").read_bytes() and home in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
    return None


def test_a_replica_killed_under_load_gives_no_wrong_answer_and_comes_back(url, plan, expected):
    async def scene():
        direct = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=direct, max_retries=0, timeout=60) as client:
            over, right, failed = False, [], []

            async def ask(model):
                while not over:
                    try:
                        reply = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=16, temperature=0)
                        assert reply.choices[0].message.content == expected[model], "a wrong answer"
                        right.append(time.monotonic())
                    except openai.APIError as e:
                        failed.append(e)
                        await asyncio.sleep(0.05)

            asking = [asyncio.create_task(ask(model)) for model in expected for _ in range(3)]
            async with asyncio.timeout(120):
                while len(right) < 12:
                    await asyncio.sleep(0.05)
                killed, before = time.monotonic(), replica_pid(plan)
                os.kill(before, signal.SIGKILL)
                while not right or right[-1] < killed + 0.5:  # answered by another one
                    await asyncio.sleep(0.05)
                back_s = next(at for at in right if at > killed + 0.5) - killed
            over = True
            await asyncio.gather(*asking)
            assert replica_pid(plan) not in (None, before)
            return back_s, len(right), len(failed)

    back_s, right, failed = asyncio.run(scene())
    print(f"replica killed under load: answers again after {back_s:.1f} s; {right} right, {failed} failed, 0 wrong")
    assert failed


def test_a_second_server_on_the_same_port_is_one_line(url, plan):
    with pytest.raises(ServeError, match=rf"port {plan.recipe.serve.port} on 127.0.0.1 is in use.*--set serve.port=N"):
        start(spec_of(plan))


def test_addresses():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    check_address("127.0.0.1", port, None)
    check_address("localhost", port, None)
    check_address("0.0.0.0", port, "key")
    for host, key, words in (("0.0.0.0", None, "GRAFT_API_KEY"), ("my host", None, "no address"), ("203.0.113.7", "key", "cannot be had")):
        with pytest.raises(ServeError, match=words):
            check_address(host, port, key)
