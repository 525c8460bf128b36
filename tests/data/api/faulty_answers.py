"""What the fault-injecting endpoint answers: a chat completion that is a function of the request alone, and its usage.

`grammar` rewrites like the embedded endpoint (about 0.2 ms an answer), `canned` says the same words with the request's
hash in them (10 us), `vqa` makes a value by the request's JSON Schema, or a sentence where there is none (50 us).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from graft.core.artifact import digest_of
from graft.data.endpoint import complete

IMAGE_TOKENS = 1105  # at most, of one image


def share(*of: Any) -> float:
    """A number in [0, 1), evenly spread and always the same for the same arguments."""
    digest = hashlib.blake2b("\n".join(map(str, of)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def key_of(body: dict[str, Any]) -> str:
    """The request's key in the ledger: data URLs count as the hash of the image that they hold."""
    if not any(isinstance(m.get("content"), list) for m in body["messages"]):
        return digest_of(body)
    return digest_of({**body, "messages": [{**m, "content": _by_hash(m["content"])} for m in body["messages"]]})


def completion(body: dict[str, Any], key: str, style: str, fault: str | None) -> tuple[int, dict[str, Any]]:
    """(HTTP status, response); `fault` may be "refusal", "schema", "length" or "filter", any other changes nothing."""
    content: str | None
    if style == "grammar":
        status, answer = complete(body)
        if status != 200:
            return status, answer
        content = answer["choices"][0]["message"]["content"]
    else:
        content = f"answer {key[:16]} 的回答" if style == "canned" else _vqa(body, key)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 4096
    reason, refusal = "stop", None
    if fault == "refusal":
        content, refusal = None, "I'm sorry, I can't help with that."
    elif fault == "schema":
        content = json.dumps({"unexpected": [key[:8], None, 7]})
    elif fault == "filter":
        content, reason = "", "content_filter"
    elif fault == "length":
        content, reason = content[: len(content) // 2], "length"
    spoken = content or refusal or "."
    tokens = max(1, math.ceil(len(spoken.encode()) * (0.25 + 0.35 * share("out", key))))
    if tokens > limit and fault is None:
        content, reason = spoken[: len(spoken) * limit // tokens], "length"
    served = {"service_tier": _tier(body, key)} if "service_tier" in body else {}
    return 200, {
        "id": f"chatcmpl-{key[:24]}",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model"),
        "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, "refusal": refusal}}],
        "usage": _usage(body, key, limit if reason == "length" else min(tokens, limit)),
        **served,
    }


def most_tokens(body: dict[str, Any]) -> int:
    """What a server reserves of its tokens a minute for a request: the prompt's and the longest answer's."""
    return _most_prompt_tokens(body) + (body.get("max_completion_tokens") or body.get("max_tokens") or 0)


def _most_prompt_tokens(body: dict[str, Any]) -> int:
    """A byte-level BPE makes at most one token a byte; the schema of the answer is read as well."""
    total = 8
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        total += 8 + sum(IMAGE_TOKENS if p["type"] == "image_url" else len(p["text"].encode("utf-8", "surrogatepass")) for p in parts)
    if form := body.get("response_format"):
        total += len(json.dumps(form, ensure_ascii=False).encode())
    return total


def _usage(body: dict[str, Any], key: str, completion_tokens: int) -> dict[str, Any]:
    """Some servers' tokenizers come near a token a byte, most do not; a quarter of the prompts was in the cache."""
    prompt = max(1, math.floor(_most_prompt_tokens(body) * (0.25 + 0.75 * share("in", key))))
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": prompt + completion_tokens}
    if share("cache", key) < 0.25:
        usage["prompt_tokens_details"] = {"cached_tokens": prompt // 2}
    return usage


def _tier(body: dict[str, Any], key: str) -> str:
    """A server short of cheap capacity serves, and bills, some of the flex requests as default ones."""
    return "default" if body["service_tier"] == "flex" and share("tier", key) < 0.25 else body["service_tier"]


def _by_hash(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        url = part.get("image_url", {}).get("url", "")
        if url.startswith("data:"):
            image = base64.b64decode(url.partition(",")[2])
            part = {**part, "image_url": {**part["image_url"], "url": f"sha256:{hashlib.sha256(image).hexdigest()}"}}
        parts.append(part)
    return parts


def _vqa(body: dict[str, Any], key: str) -> str:
    form = body.get("response_format") or {}
    if form.get("type") != "json_schema":
        return f"The picture shows {1 + int(9 * share('n', key))} things, {_pick(('red', 'green', 'blue'), key, 'c')} in the main."
    schema = form["json_schema"]["schema"]
    return json.dumps(_value(schema, schema, key, "$"), ensure_ascii=False)


def _value(schema: dict[str, Any], root: dict[str, Any], key: str, path: str) -> Any:
    """A value that satisfies a schema of the usual words: types, enum, const, anyOf, items, bounds and local $refs."""
    if "$ref" in schema:
        found = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return _value(found, root, key, path)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return _pick(schema["enum"], key, path)
    for branch in ("anyOf", "oneOf"):
        if branch in schema:
            return _value(_pick(schema[branch], key, path), root, key, path)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = _pick(kind, key, path + "?") if isinstance(kind, list) else kind
    makers: dict[str, Callable[[], Any]] = {
        "object": lambda: {name: _value(s, root, key, f"{path}.{name}") for name, s in schema.get("properties", {}).items()},
        "array": lambda: _list(schema, root, key, path),
        "string": lambda: f"{path.rpartition('.')[2]} {key[:6]}".ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")],
        "integer": lambda: _number(schema, key, path),
        "number": lambda: _number(schema, key, path),
        "boolean": lambda: share(path, key) < 0.5,
        "null": lambda: None,
    }
    return makers[kind]()


def _list(schema: dict[str, Any], root: dict[str, Any], key: str, path: str) -> list[Any]:
    least = schema.get("minItems", 1)
    count = min(schema.get("maxItems", least + 2), least + int(3 * share(path, key)))
    return [_value(schema.get("items", {}), root, key, f"{path}.{i}") for i in range(count)]


def _number(schema: dict[str, Any], key: str, path: str) -> int:
    low = math.ceil(schema.get("minimum", schema.get("exclusiveMinimum", 0) + ("exclusiveMinimum" in schema)))
    high = math.floor(schema.get("maximum", schema.get("exclusiveMaximum", low + 10) - ("exclusiveMaximum" in schema)))
    return low + int((high - low + 1) * share(path, key))


def _pick(choices: Any, *of: str) -> Any:
    return choices[int(len(choices) * share(*of))]
