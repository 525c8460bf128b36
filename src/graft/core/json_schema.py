"""JSON as it is written, and JSON Schemas: read and checked once, then what of a value is not by one.

A value is read by RFC 8259 (https://www.rfc-editor.org/rfc/rfc8259): NaN and Infinity are no numbers; a key that an object has twice is refused, as
readers differ over it. A schema refers to itself alone and reaches no network. 20 to 60 us a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError, DataError
from graft.core.rows import is_unicode

Schema = dict[str, Any]
REASON_CHARS = 200


def loads(text: str, strict: bool = True) -> Any:
    """The value; ValueError where the text is none, RecursionError where it is too deep. strict: else strings may hold control characters."""
    return json.loads(text, strict=strict, object_pairs_hook=_object, parse_constant=_no_constant)


def read_schema(path: Path, key: str) -> Schema:
    """A JSON Schema from the file that the recipe's `key` names; ConfigError in one line where it is none, or refers to what it does not hold."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    where = f"{key}: {path}"
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"{where} cannot be read ({e.strerror}): mend the path, it is relative to the recipe") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where} is no JSON ({e}): mend the file") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{where} is no JSON Schema: write an object")
    try:
        check(schema, where)
    except DataError as e:
        raise ConfigError(str(e)) from None
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).crawl().resolver()
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise ConfigError(f"{where} refers to {reference!r}, which it does not hold: write the definition into the file") from None
    return schema


def check(schema: Schema, name: str) -> None:
    """DataError that begins with the name where it is no JSON Schema."""
    from jsonschema import exceptions

    try:
        _class_of(schema).check_schema(schema)
    except exceptions.SchemaError as e:
        raise DataError(f"{name} is no JSON Schema: {_where(e)}: mend the file") from None


def wrong(value: Any, schema: Schema) -> str | None:
    """The worst that the schema finds in the value, in one line; None where it is by it. DataError where the schema refers to what it does not hold."""
    from jsonschema import exceptions
    from referencing.exceptions import Unresolvable

    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        return "the answer holds half a character"
    try:
        error = exceptions.best_match(_validator(json.dumps(schema)).iter_errors(value))
    except Unresolvable as e:
        raise DataError(f"the answer schema refers to {e.ref!r}, which it does not hold: write the definition into the file") from None
    return _where(error) if error else None


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARS else line[: REASON_CHARS - 1] + "…"


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _GivenTwice("an object of the JSON has a key twice")
    return found


class _GivenTwice(ValueError):
    """Not a matter of syntax: no second reading helps."""


def _no_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no JSON number", name, 0)


@lru_cache(maxsize=16)
def _validator(schema: str) -> Any:
    from referencing import Registry

    tree = json.loads(schema)
    return _class_of(tree)(tree, registry=Registry())  # an own registry: a `$ref` never reaches the network


def _class_of(schema: Schema) -> Any:
    from jsonschema import validators

    return validators.validator_for(schema, default=validators.Draft202012Validator)


def _where(error: Any) -> str:
    return one_line(f"{error.json_path}: {error.message}")
