"""The official client against a real socket: every route, and two hundred mixed requests that each give what they give alone."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time

import openai
import pytest

MESSAGES = [{"role": "user", "content": "畫 sea"}]


@pytest.fixture(scope="module")
def url(listening):
    with listening(max_batch=24, max_concurrent=256) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0) as client:
        yield client


def async_client(url, **more):
    limits = openai.DefaultAsyncHttpxClient(trust_env=False, limits=openai.DEFAULT_CONNECTION_LIMITS, timeout=120)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=limits, **{"max_retries": 0, **more})


def mixed(count):
    """Requests over the base and eight adapters: greedy and sampled, short and long, chats and completions."""
    rng = random.Random(0)
    found = []
    for n in range(count):
        model = ["base", *(f"a{i}" for i in range(8))][n % 9]
        asked = {"model": model, "max_tokens": rng.randint(1, 40), "seed": n, "temperature": rng.choice([0, 0.7, 1.3])}
        asked |= rng.choice([{}, {"top_p": 0.8}, {"stop": ["e"]}, {"extra_body": {"top_k": 20}}])
        text = "".join(rng.choice("abcde 海邊畫我") for _ in range(rng.randint(1, 60)))
        found.append({**asked, "messages": [{"role": "user", "content": text}]} if n % 4 else {**asked, "prompt": text})
    return found


def text_of(reply):
    choice = reply.choices[0]
    return (choice.message.content if hasattr(choice, "message") else choice.text), choice.finish_reason, reply.usage.completion_tokens


def test_two_hundred_staggered_requests_equal_their_solo_runs(url, client):
    asked = mixed(200)
    of = {True: client.chat.completions.create, False: client.completions.create}
    alone = [text_of(of["messages" in a](**a)) for a in asked]

    async def scene():
        async with async_client(url) as together:

            async def one(n, question):
                await asyncio.sleep(n * 0.004)
                create = together.chat.completions.create if "messages" in question else together.completions.create
                if n % 3:
                    return text_of(await create(**question))
                text, reason, usage = "", None, None
                async for event in await create(**question, stream=True, stream_options={"include_usage": True}):
                    usage = event.usage or usage
                    for choice in event.choices:
                        text += (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
                        reason = choice.finish_reason or reason
                return text, reason, usage.completion_tokens

            return await asyncio.gather(*(one(n, question) for n, question in enumerate(asked)))

    found = asyncio.run(scene())
    assert found == alone
    assert len({text for text, _, _ in alone}) > 150
    print(f"{len(found)} mixed requests over the base and 8 adapters, staggered: each equal to its solo run")


def test_the_client_knows_the_models(client):
    assert [m.id for m in client.models.list()] == [*(f"a{i}" for i in range(8)), "base"]
    assert client.models.retrieve("a3").model_extra["verified"] is True
    with pytest.raises(openai.NotFoundError, match="'three' does not exist"):
        client.models.retrieve("three")


def test_logprobs_and_choices_through_the_client(client):
    reply = client.chat.completions.create(model="a1", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, n=2)
    for choice in reply.choices:
        assert all(len(t.top_logprobs) == 3 and t.logprob == max(u.logprob for u in t.top_logprobs) for t in choice.logprobs.content)
    reply = client.completions.create(model="a1", prompt="sea", max_tokens=5, temperature=0, logprobs=2)
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.completion_tokens
    streamed = client.completions.create(model="a1", prompt="sea", max_tokens=5, temperature=0, logprobs=2, stream=True)
    told = [token for event in streamed for choice in event.choices if choice.logprobs for token in choice.logprobs.tokens]
    assert told == reply.choices[0].logprobs.tokens, "also of tokens that show no text"


def test_the_client_raises_what_openai_would(client):
    with pytest.raises(openai.BadRequestError, match="unsupported field 'tools'") as e:
        client.chat.completions.create(model="a0", messages=MESSAGES, tools=[])
    assert e.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="the model holds"):
        client.chat.completions.create(model="a0", messages=MESSAGES, max_tokens=10_000)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_frees_its_row(url, client, stream):
    def under_way():
        import urllib.request

        text = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/metrics", timeout=10).read().decode()
        return float(next(line for line in text.splitlines() if line.startswith("graft_requests_under_way ")).rsplit(" ", 1)[1])

    async def scene():
        async with async_client(url) as leaving:
            asked = {"model": "base", "messages": MESSAGES, "temperature": 2, "max_tokens": 200, "n": 8, "extra_body": {"top_k": 50}}
            asking = [asyncio.create_task(leaving.chat.completions.create(**asked, seed=s, stream=stream)) for s in range(3)]
            async with asyncio.timeout(30):
                while not (busy := await asyncio.to_thread(under_way)):
                    await asyncio.sleep(0.005)
            for task in asking:
                if task.done():
                    await task.result().close()
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            return busy

    busy = asyncio.run(scene())
    began = time.monotonic()
    while left := under_way():
        assert time.monotonic() < began + 10, f"{left} rows run on for nobody"
        time.sleep(0.01)
    assert busy > 0


def test_five_hundred_clients_meet_limits_and_no_error_of_the_server(listening):
    """Everything is answered by 200, 429 or 503, and the memory stays bounded."""

    def rss_mib():
        with open(f"/proc/{os.getpid()}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def scene(url):
        async with async_client(url) as many:

            async def one(n):
                try:
                    await many.chat.completions.create(model=f"a{n % 8}", messages=MESSAGES, max_tokens=8, seed=n)
                    return 200
                except openai.APIStatusError as e:
                    assert "retry-after" in e.response.headers
                    return e.status_code

            return await asyncio.gather(*map(one, range(500)))

    with listening(max_batch=8, max_concurrent=400) as url:
        asyncio.run(scene(url))
        before, highest, over = rss_mib(), [0.0], threading.Event()

        def watch():
            while not over.wait(0.02):
                highest[0] = max(highest[0], rss_mib())

        watching = threading.Thread(target=watch)
        watching.start()
        codes = [code for _ in range(3) for code in asyncio.run(scene(url))]
        over.set()
        watching.join()
    counts = {code: codes.count(code) for code in sorted(set(codes))}
    print(f"1,500 requests of 500 clients at once: {counts}, {highest[0] - before:.0f} MiB more at most than after the first 500")
    assert set(counts) <= {200, 429, 503} and counts[200] > 100 and counts[429] > 0
    assert highest[0] - before < 150
