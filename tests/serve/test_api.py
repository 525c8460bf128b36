"""The HTTP side over a real runner and a real (tiny) engine, without Ray: what is answered, and how what is not is refused."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient
from tiny_model import MAX_LENGTH

from graft.engine.hf import HFEngine
from graft.engine.protocol import Request
from graft.model.chat import load_tokenizer, render_prompt
from graft.serve.api import MAX_BODY, build
from graft.serve.runner import Runner

CHAT = "/v1/chat/completions"
ASK = {"model": "one", "messages": [{"role": "user", "content": "畫 sea"}], "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def runner(spec):
    runner = Runner(spec)
    while runner.state == "loading":
        time.sleep(0.02)
    assert runner.state == "ready", runner.error
    yield runner
    runner.stop()
    runner.thread.join(10)
    assert not runner.thread.is_alive()


@pytest.fixture(scope="module")
def client(runner):
    return TestClient(build(runner))  # not entered: its lifespan would stop the runner


def events(reply):
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]


def test_the_reply_is_the_engines(client, spec):
    tokenizer = load_tokenizer(spec.tokenizer)
    engine = HFEngine(spec.base, None, "fp32", spec.adapters, tokenizer, device="cpu")
    prompt = render_prompt(tokenizer, ASK["messages"])
    replies = set()
    for model, adapter in (("one", "one"), ("two", "two"), ("base", None)):
        expected = engine.generate([Request(prompt, 12, adapter=adapter)])[0]
        reply = client.post(CHAT, json={**ASK, "model": model}).json()
        assert reply["choices"][0]["message"]["content"] == expected.text
        assert reply["choices"][0]["finish_reason"] == expected.finish_reason
        counted = (len(prompt), expected.completion_tokens)
        assert reply["usage"] == dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counted, sum(counted)), strict=True))
        replies.add(expected.text)
    assert len(replies) == 3


@pytest.mark.parametrize("usage", [True, False])
def test_the_stream_carries_the_same_text_and_ends_in_done(client, usage):
    whole = client.post(CHAT, json={**ASK, "temperature": 1.2, "seed": 5}).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    got = events(client.post(CHAT, json={**ASK, "temperature": 1.2, "seed": 5, "stream": True, **options}))
    assert got.pop() == "[DONE]"
    got = [json.loads(e) for e in got]
    assert [e.get("usage") for e in got] == ([None] * (len(got) - 1) + [whole["usage"]] if usage else [None] * len(got))
    if usage:
        assert got.pop()["choices"] == []
    choices = [e["choices"][0] for e in got]
    assert "".join(c["delta"].get("content", "") for c in choices) == whole["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(got) - 1) + [whole["choices"][0]["finish_reason"]]
    assert choices[0]["delta"]["role"] == "assistant"


def test_requests_at_once_give_what_they_give_alone(client):
    questions = [
        {**ASK, "model": m, "max_tokens": 4 + n, "seed": n, "temperature": 1.0, "stream": n % 2 == 0}
        for n in range(6)
        for m in ("one", "two", "base")
    ]

    def text(question):
        reply = client.post(CHAT, json=question)
        if not question["stream"]:
            return reply.json()["choices"][0]["message"]["content"]
        return "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events(reply)[:-1])

    alone = [text(q) for q in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(text, questions)) == alone


def test_stop_texts(client):
    content = client.post(CHAT, json=ASK).json()["choices"][0]["message"]["content"]
    for stop in (content[3:5], ["never there", content[3:5]]):
        choice = client.post(CHAT, json={**ASK, "stop": stop}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (content[: content.index(content[3:5])], "stop")


def test_without_a_limit_the_answer_may_fill_the_model(client):
    reply = client.post(CHAT, json={k: v for k, v in ASK.items() if k != "max_tokens"} | {"model": "base"}).json()
    assert reply["choices"][0]["finish_reason"] == "stop" or reply["usage"]["total_tokens"] == MAX_LENGTH


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"tools": []}, "tools", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"n": 2}, "n", "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop.0", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name", "unsupported_parameter"),
        ({"max_tokens": MAX_LENGTH}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 2 * MAX_LENGTH}]}, "messages", "context_length_exceeded"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, change, param, code):
    reply = client.post(CHAT, json={**ASK, **change})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"], error["type"]) == (400, param, code, "invalid_request_error")
    assert param.split(".")[0] in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN', b'{"model": "\\ud800"}'])
def test_a_body_that_is_no_request_is_a_400(client, body):
    reply = client.post(CHAT, content=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_other_errors_have_the_same_shape(client):
    unknown = client.post(CHAT, json={**ASK, "model": "three"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "one, two, base" in unknown.json()["error"]["message"]
    assert client.get("/v1/models/three").status_code == 404
    for reply, status in ((client.get("/v1/nothing"), 404), (client.get(CHAT), 405), (client.post(CHAT, content=b" " * (MAX_BODY + 1)), 413)):
        assert reply.status_code == status and "message" in reply.json()["error"]


def test_models_health_ready_and_the_page(client):
    cards = client.get("/v1/models").json()
    assert [(c["id"], c["object"], c["parent"]) for c in cards["data"]] == [
        ("one", "model", "base"),
        ("two", "model", "base"),
        ("base", "model", None),
    ]
    assert client.get("/v1/models/two").json() == cards["data"][1]
    assert client.get("/health").status_code == 200
    assert (client.get("/ready").status_code, client.get("/ready").json()["status"]) == (200, "ready")
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    assert 'lang="zh-Hant"' in page.text and "://" not in page.text  # it loads nothing from elsewhere


def test_a_key_is_demanded_everywhere_but_at_health(runner):
    guarded = TestClient(build(runner, hashlib.sha256(b"secret").hexdigest()))
    assert guarded.get("/health").status_code == 200
    for path in ("/", "/ready", "/v1/models", "/v1/nothing"):
        assert guarded.get(path).json()["error"]["code"] == "invalid_api_key"
    for header in ("Bearer wrong", "Bearer ", "secret", "Basic secret", "Bearer sécret".encode()):
        assert guarded.get("/v1/models", headers={"Authorization": header}).status_code == 401
    assert guarded.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert guarded.post(CHAT, json=ASK, headers={"Authorization": "Bearer secret"}).status_code == 200
