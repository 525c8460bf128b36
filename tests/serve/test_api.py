"""The HTTP side over a real runner and a real (tiny) engine, without Ray: what is answered, and how what is not is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient
from tiny_model import MAX_LENGTH

from graft.core.errors import ConfigError
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request
from graft.model.chat import load_tokenizer, render_prompt
from graft.serve.api import build
from graft.serve.guard import MAX_BODY, Keys
from graft.serve.runner import Runner

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
ASK = {"model": "one", "messages": [{"role": "user", "content": "畫 sea"}], "temperature": 0, "max_tokens": 12}
URL = "data:image/png;base64,iVBORw0KGgo="


def showing(image, role="user", **other):
    """A request whose one message is a word and an image."""
    return {"messages": [{"role": role, "content": [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": image, **other}]}]}


@pytest.fixture(scope="module")
def client(spec):
    runner = Runner(spec)
    with TestClient(build(runner), base_url="http://localhost") as client:
        until_ready(client)
        yield client
    runner.thread.join(10)
    assert not runner.thread.is_alive()


def until_ready(client):
    while (state := client.get("/ready").json())["status"] == "loading":
        time.sleep(0.02)
    assert state["status"] == "ready", state


def events(reply):
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]


def test_the_reply_is_the_engines(client, spec, tiny):
    tokenizer = load_tokenizer(spec.tokenizer)
    engine = HFEngine(spec.base, None, "fp32", tiny[1], tokenizer, device="cpu")
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
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include": True}, "stream": True}, "stream_options.include", "unsupported_parameter"),
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
        (showing({"url": URL}), "messages.0.content.1", "invalid_value"),  # the base is of text alone
        (showing({"url": URL}, role="system"), "messages.0.content.1", "invalid_value"),
        (showing({"url": URL}, role="assistant"), "messages.0.content.1", "invalid_value"),
        (showing({"url": URL, "detail": "high"}), "messages.0.content.1.image_url.detail", "invalid_value"),
        (showing({"url": URL, "size": 3}), "messages.0.content.1.image_url.size", "unsupported_parameter"),
        (showing({"url": URL}, cache=True), "messages.0.content.1.cache", "unsupported_parameter"),
        (showing({}), "messages.0.content.1.image_url.url", "missing_required_parameter"),
        (showing(URL), "messages.0.content.1.image_url", "invalid_value"),
        (showing({"url": URL}, type="input_audio"), "messages.0.content.1", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]}, "messages.0.content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "bold": 1}]}]},
            "messages.0.content.0.bold",
            "unsupported_parameter",
        ),
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
    reply = client.post(CHAT, content=body, headers=JSON)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_other_errors_have_the_same_shape(client):
    unknown = client.post(CHAT, json={**ASK, "model": "three"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "one, two, base" in unknown.json()["error"]["message"]
    assert client.get("/v1/models/three").status_code == 404
    for reply, status in (
        (client.get("/v1/nothing"), 404),
        (client.get(CHAT), 405),
        (client.post(CHAT, content=b" " * (MAX_BODY + 1), headers=JSON), 413),
        (client.post(CHAT, content=b"{}"), 415),
    ):
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
    assert '<textarea id="system" rows="2"></textarea>' in page.text
    assert 'lang="zh-Hant"' in page.text and "://" not in page.text  # it loads nothing from elsewhere


def test_the_page_begins_with_the_recipes_system_prompt(spec):
    with TestClient(build(Runner(dataclasses.replace(spec, system="</textarea><b>一道菜"))), base_url="http://localhost") as client:
        assert '<textarea id="system" rows="2">&lt;/textarea&gt;&lt;b&gt;一道菜</textarea>' in client.get("/").text


def test_a_key_is_demanded_everywhere(spec):
    keys = Keys.of({"GRAFT_API_KEY": "secret, other", "GRAFT_ADMIN_KEY": "boss"})
    runner = Runner(spec)
    with TestClient(build(runner, keys), base_url="http://example.org") as guarded:
        for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/v1/nothing", "/admin/adapters"):
            reply = guarded.get(path)
            assert reply.json()["error"]["code"] == "invalid_api_key" and "Basic" in reply.headers["www-authenticate"]
        for header in ("Bearer wrong", "Bearer ", "secret", "Basic secret", "Basic !", "Bearer sécret".encode(), "Bearer secret, other"):
            assert guarded.get("/v1/models", headers={"Authorization": header}).status_code == 401
        basic = "Basic " + base64.b64encode(b"anyone:other").decode()
        for header in ("Bearer secret", "bearer other", "Bearer boss", basic):
            assert guarded.get("/v1/models", headers={"Authorization": header}).status_code == 200
        for header, status in (("Bearer secret", 403), (basic, 403), ("Bearer boss", 200)):
            assert guarded.get("/admin/adapters", headers={"Authorization": header}).status_code == status
    with pytest.raises(ConfigError, match="GRAFT_API_KEY is not"):
        Keys.of({"GRAFT_ADMIN_KEY": "boss"})


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "127.0.0.2", ""])
def test_without_keys_another_name_for_this_machine_is_not_answered(client, host):
    assert client.get("/v1/models", headers={"Host": host}).status_code == 403
    for own in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert client.get("/v1/models", headers={"Host": own}).status_code == 200


def test_several_choices_are_each_of_their_own_seed(client):
    one = {**ASK, "temperature": 1.3, "seed": 11}
    alone = [client.post(CHAT, json={**one, "seed": 11 + i}).json()["choices"][0]["message"]["content"] for i in range(3)]
    together = client.post(CHAT, json={**one, "n": 3}).json()
    assert [c["message"]["content"] for c in together["choices"]] == alone and [c["index"] for c in together["choices"]] == [0, 1, 2]
    streamed = ["", "", ""]
    for event in events(client.post(CHAT, json={**one, "n": 3, "stream": True}))[:-1]:
        for choice in json.loads(event)["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == alone and together["usage"]["completion_tokens"] > 3


def test_logprobs_whole_and_streamed(client):
    asked = {**ASK, "logprobs": True, "top_logprobs": 2}
    whole = client.post(CHAT, json=asked).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"] and all(len(c["top_logprobs"]) == 2 and c["logprob"] <= 0 for c in content)
    assert all(c["token"] == c["top_logprobs"][0]["token"] and bytes(c["bytes"]).decode("utf-8", "replace") == c["token"] for c in content), (
        "greedy takes the likeliest"
    )
    assert bytes(b for c in content for b in c["bytes"]).decode("utf-8", "ignore") == whole["choices"][0]["message"]["content"]
    streamed = [json.loads(e)["choices"][0]["logprobs"] for e in events(client.post(CHAT, json={**asked, "stream": True}))[:-1]]
    assert [c["token"] for e in streamed if e for c in e["content"]] == [c["token"] for c in content]


def test_completions_continue_a_text_or_tokens(client, spec):
    tokenizer = load_tokenizer(spec.tokenizer)
    prompt = tokenizer("Draw me", add_special_tokens=False)["input_ids"]
    asked = {"model": "two", "prompt": "Draw me", "temperature": 0, "max_tokens": 8, "logprobs": 1}
    by_text, by_ids = client.post("/v1/completions", json=asked).json(), client.post("/v1/completions", json={**asked, "prompt": prompt}).json()
    assert by_text["choices"] == by_ids["choices"] and by_text["object"] == "text_completion" and by_text["usage"]["prompt_tokens"] == len(prompt)
    told = by_text["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == by_text["usage"]["completion_tokens"]
    streamed = "".join(json.loads(e)["choices"][0]["text"] for e in events(client.post("/v1/completions", json={**asked, "stream": True}))[:-1])
    assert streamed == by_text["choices"][0]["text"]
    assert client.post("/v1/completions", json={**asked, "prompt": [5, 10**6]}).json()["error"]["param"] == "prompt"
    assert client.post("/v1/completions", json={**asked, "echo": True}).json()["error"]["code"] == "unsupported_parameter"


def test_a_version_is_asked_by_its_name(client, spec):
    card = client.get("/v1/models/one").json()
    assert card["version"].startswith("one@") and card["verified"] and card["gate"]["difference_nats"] < 1e-4 < 0.1 < card["gate"]["effect_nats"]
    by_alias, by_version = (client.post(CHAT, json={**ASK, "model": name}).json() for name in ("one", card["version"]))
    assert by_alias["choices"] == by_version["choices"] and by_alias["system_fingerprint"] == by_version["system_fingerprint"] == card["fingerprint"]
    assert client.get(f"/v1/models/{card['version']}").json()["version"] == card["version"]


def test_parts_of_text_are_one_content(client):
    parts = [{"type": "text", "text": "畫 "}, {"type": "text", "text": "sea"}]
    assert (
        client.post(CHAT, json={**ASK, "messages": [{"role": "user", "content": parts}]}).json()["choices"]
        == client.post(CHAT, json=ASK).json()["choices"]
    )


def test_metrics_are_told_by_model(client):
    before = client.get("/metrics").text
    client.post(CHAT, json=ASK)
    client.post(CHAT, json={**ASK, "stream": True})
    client.post(CHAT, json={**ASK, "model": "nobody"})

    def of(text, line):
        return next((float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line)), 0.0)

    after = client.get("/metrics").text
    for line, more in (('graft_requests_total{model="one",status="200"}', 2), ('graft_requests_total{model="unknown",status="404"}', 1)):
        assert of(after, line) - of(before, line) == more
    first = 'graft_first_token_seconds_count{model="one"}'
    assert of(after, first) - of(before, first) == 1, "of the streamed one alone"
    assert of(after, 'graft_completion_tokens_total{model="one"}') > of(before, 'graft_completion_tokens_total{model="one"}')
    assert of(after, 'graft_adapters{state="ready"}') == 2


def test_too_many_requests_of_one_key_are_refused(tiny, spec):
    runner = Runner(dataclasses.replace(spec, max_concurrent=3))
    with TestClient(build(runner), base_url="http://localhost") as few:
        until_ready(few)
        with ThreadPoolExecutor(12) as pool:
            long = {**ASK, "model": "base", "max_tokens": 150, "temperature": 1.0}
            replies = list(pool.map(lambda n: few.post(CHAT, json={**long, "seed": n}), range(12)))
    refused = [r for r in replies if r.status_code != 200]
    assert refused and len(refused) < 12
    assert all((r.status_code, r.json()["error"]["code"], r.headers["retry-after"]) == (429, "overloaded", "1") for r in refused)


def test_a_deadline_ends_a_request(spec):
    runner = Runner(dataclasses.replace(spec, deadline_s=0.3))
    with TestClient(build(runner), base_url="http://localhost") as hasty:
        until_ready(hasty)
        runner.engine.ends = frozenset()
        asked = {**ASK, "model": "base", "max_tokens": 230, "n": 8, "temperature": 2.0, "top_k": 50}
        step = runner.engine.step
        runner.engine.step = lambda: (time.sleep(0.02), step())[1]
        reply = hasty.post(CHAT, json=asked)
        assert reply.status_code == 503 and "longer than 0.3 s" in reply.json()["error"]["message"]
        assert not runner.engine.busy or hasty.post(CHAT, json={**asked, "max_tokens": 1, "n": 1}).status_code == 200
