"""What an answer says: a JSON Schema is asked for, and what came back is read tolerantly and checked against it.

Servers differ: some hold an answer to the schema, some know `json_object` only, some neither. So `read` forgives what
models do around and between the values (code fences, text before and after, trailing commas, full-width punctuation,
curly quotes as delimiters) and nothing that could lose a value: an object that does not close, a key given twice or two
objects that both fit are refused. json_repair was tried for this and closes a cut-off object silently. 20 to 60 us an answer.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from functools import partial
from typing import Any

from graft.core.json_schema import Schema, check, loads, one_line, wrong
from graft.core.rows import is_unicode

_CLOSING = {'"': '"', "＂": "＂", "“": "”"}  # delimiters of a string, as found; a curly pair may hold another curly pair
_loads = partial(loads, strict=False)


def structured(schema: Schema, name: str) -> dict[str, Any]:
    """The `response_format` that asks for an answer by `schema`; `name` of at most 64 letters, digits, `_` and `-`.

    It is strict where the schema keeps to what strict servers demand: each object closed, with every property required.
    Raises DataError for a schema that is no JSON Schema.
    """
    check(schema, f"the answer schema {name!r}")
    return {"type": "json_schema", "json_schema": {"name": name, "strict": _is_strict(schema), "schema": schema}}


def read(response: dict[str, Any], schema: Schema | None) -> tuple[Any, str | None]:
    """(what the answer says, None), or (None, why it cannot be used) in one line.

    response: the server's JSON. schema: what the value must satisfy; None: the value is the text itself, stripped.
    Raises DataError where the schema itself refers to what cannot be found.
    """
    text, reason = _text(response)
    if reason or schema is None:
        return text, reason
    return _value(text or "", schema)


def _text(response: dict[str, Any]) -> tuple[str | None, str | None]:
    choices = response.get("choices") if isinstance(response, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        error = response.get("error") if isinstance(response, dict) else None
        return None, one_line(f"malformed: the server reports {error}" if error else "malformed: the response holds no message")
    ended = choice.get("finish_reason")
    if ended == "content_filter":
        return None, "filtered"
    if message.get("refusal"):
        return None, one_line(f"refused: {message['refusal']}")
    if ended == "length":
        return None, "truncated"
    if ended not in ("stop", None):
        return None, one_line(f"malformed: the answer ended by {ended!r}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return None, "malformed: the answer is empty"
    if not is_unicode(content):
        return None, "malformed: the answer holds half a character"
    return content.strip(), None


def _value(text: str, schema: Schema) -> tuple[Any, str | None]:
    """The one JSON value in `text` that satisfies the schema."""
    try:
        try:
            found = [_loads(text)]
        except ValueError:
            found = list(_values(text))
    except (ValueError, RecursionError) as e:
        return None, one_line(f"malformed: {e}")
    if not found:
        return None, "malformed: no JSON in the answer"
    reasons = [wrong(value, schema) for value in found]
    fits = [value for value, reason in zip(found, reasons, strict=True) if reason is None]
    if not fits:
        return None, one_line(f"wrong schema: {reasons[-1]}")  # text comes first, the answer last
    if any(value != fits[0] for value in fits[1:]):
        return None, f"malformed: {len(fits)} different values fit the schema"
    return fits[0], None


def _values(text: str) -> Iterator[Any]:
    """Every object and array that stands in `text`, outermost only; ValueError where one does not close."""
    at = 0
    while at < len(text):
        if unicodedata.normalize("NFKC", text[at]) not in ("{", "["):
            at += 1
            continue
        plain, at = _plain(text, at)
        try:
            yield _loads(plain)
        except json.JSONDecodeError:
            continue  # braces in prose


def _plain(text: str, at: int) -> tuple[str, int]:
    """(the value that starts at `at` as plain JSON, where it ends); ValueError where the text ends before it does."""
    out: list[str] = []
    depth = 0
    while at < len(text):
        if text[at] in _CLOSING:
            string, at = _string(text, at)
            out.append(string)
            continue
        c = "," if text[at] == "、" else unicodedata.normalize("NFKC", text[at])
        at += 1
        if c in ("}", "]"):
            while out and out[-1].isspace():
                out.pop()
            if out and out[-1] == ",":
                out.pop()
        out.append(c)
        depth += (c in ("{", "[")) - (c in ("}", "]"))
        if depth == 0:
            return "".join(out), at
    raise ValueError("the JSON does not close")


def _string(text: str, at: int) -> tuple[str, int]:
    """(the string that starts at `at`, between plain quotes, where it ends)."""
    opening, closing = text[at], _CLOSING[text[at]]
    out, depth, at = ['"'], 1, at + 1
    while at < len(text):
        c = text[at]
        if c == "\\" and at + 1 < len(text):
            escaped = text[at + 1]
            out.append(escaped if escaped in "“”＂" else c + escaped)
            at += 2
            continue
        at += 1
        depth += (c == opening) - (c == closing) if opening != closing else -(c == closing)
        if depth == 0:
            out.append('"')
            return "".join(out), at
        out.append('\\"' if c == '"' else c)
    raise ValueError("a string of the JSON does not close")


def _is_strict(schema: Any) -> bool:
    if isinstance(schema, list):
        return all(map(_is_strict, schema))
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    is_object = schema.get("type") == "object" or isinstance(properties, dict)
    if is_object and (schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(properties or ())):
        return False
    inner = [*(properties or {}).values(), *(v for k, v in schema.items() if k != "properties")]
    return all(map(_is_strict, inner))
