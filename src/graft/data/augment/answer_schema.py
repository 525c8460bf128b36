"""The JSON Schema that a user wants answers by: read and checked once, before anything is asked. Costs milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError, DataError
from graft.data.augment.answers import structured

Schema = dict[str, Any]


def read_schema(path: Path) -> Schema:
    """A JSON Schema from a file; ConfigError in one line where it is none, or refers to what it does not hold."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    where = f"augment.images.answer_schema: {path}"
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"{where} cannot be read ({e.strerror}): mend the path, it is relative to the recipe") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where} is no JSON ({e}): mend the file") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{where} is no JSON Schema: write an object")
    try:
        structured(schema, "answer")
    except DataError as e:
        raise ConfigError(f"{where}: {e}") from None
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).crawl().resolver()
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise ConfigError(f"{where} refers to {reference!r}, which it does not hold: write the definition into the file") from None
    return schema


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
