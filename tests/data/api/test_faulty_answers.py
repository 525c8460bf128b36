"""The fault-injecting endpoint answers as a function of the request, and by its schema."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import jsonschema
import pytest

from graft.core.artifact import digest_of

from .faulty_client import ask, bill_usd, body, endpoint, status_of


def test_structured_answers_satisfy_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "objects": {"type": "array", "items": {"$ref": "#/$defs/thing"}, "minItems": 2, "maxItems": 4},
            "scene": {"enum": ["indoors", "outdoors"]},
            "sure": {"type": "boolean"},
            "people": {"type": "integer", "minimum": 0, "maximum": 3},
            "note": {"anyOf": [{"type": "string", "minLength": 3}, {"type": "null"}]},
        },
        "required": ["objects", "scene", "sure", "people", "note"],
        "additionalProperties": False,
        "$defs": {"thing": {"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "number"}}, "required": ["name", "size"]}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "picture", "schema": schema}}
    with endpoint(answers="vqa") as server:
        said = [ask(server, body(n, response_format=form, max_tokens=2000)).json()["choices"][0]["message"]["content"] for n in range(30)]
        free = ask(server, body(0)).json()["choices"][0]["message"]["content"]
    for text in said:
        jsonschema.validate(json.loads(text), schema)
    assert len(set(said)) == 30
    assert free.startswith("The picture shows")


def test_an_image_counts_by_its_content() -> None:
    image = bytes(range(256)) * 8
    sha = hashlib.sha256(image).hexdigest()

    def with_url(url: str) -> dict[str, Any]:
        return body(messages=[{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]}])

    with endpoint(answers="vqa") as server:
        answer = ask(server, with_url("data:image/png;base64," + base64.b64encode(image).decode())).json()
        report = server.report()
    assert list(report["by_key"]) == [digest_of(with_url(f"sha256:{sha}"))]
    assert answer["usage"]["prompt_tokens"] <= 1105 + 17


def test_rewrites_by_grammar_and_a_key_that_must_be_right() -> None:
    seed = json.dumps({"user": "幫我畫一隻貓", "assistant": 'call("generate_image", {"prompt": "貓"})'}, ensure_ascii=False)
    with endpoint(answers="grammar", api_key="k") as server:
        reply = ask(server, {"model": "m", "messages": [{"role": "user", "content": f"請改寫 3 則\n{seed}"}]}).json()
        assert len(json.loads(reply["choices"][0]["message"]["content"])["rewrites"]) == 3
        server.control(api_key="another")
        assert status_of(server, body()) == 401
        with pytest.raises(ValueError, match="sum to at most 1"):
            server.control(faults={"nonsense": 0.5})


def test_flex_is_billed_as_it_was_served() -> None:
    with endpoint() as server:
        answers = [ask(server, body(n, service_tier="flex")).json() for n in range(30)]
        billed_usd = server.report()["billed_usd"]
    tiers = [a["service_tier"] for a in answers]
    assert 0 < tiers.count("default") < 30
    assert billed_usd == pytest.approx(sum(bill_usd(a) * (0.5 if t == "flex" else 1) for a, t in zip(answers, tiers, strict=True)))


def test_an_answer_ends_at_the_limit_that_the_request_set() -> None:
    with endpoint() as server:
        for name in ("max_tokens", "max_completion_tokens"):
            whole, cut = (ask(server, {**body(), "max_tokens": None, name: limit}).json() for limit in (500, 3))
            assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 3
            assert 0 < len(cut["choices"][0]["message"]["content"]) < len(whole["choices"][0]["message"]["content"])
            assert whole["choices"][0]["finish_reason"] == "stop" and 3 < whole["usage"]["completion_tokens"] < 500
