"""JSON objects to records: one a line (JSONL), or the elements of one list (JSON), neither ever read whole.

A list is cut at its top-level commas by counting brackets outside strings, so a broken element spoils itself alone
as long as its brackets and quotes are in pairs.
JSONL passes at 270 (chats of 600 bytes) to 420 MB/s a core up to parsed objects, a JSON list at 80 to 140; orjson parses
(https://github.com/ijl/orjson), and the standard library what orjson refuses: NaN, lone surrogates, very large integers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from graft.core.errors import DataError
from graft.data.readers.streams import (
    BrokenFile,
    Gathered,
    Outcome,
    Oversized,
    Piece,
    chunks,
    codec_of,
    cut,
    delimited,
    excerpt,
    oversized,
    whole,
)

_LINE = re.compile(rb"\n")
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRING = rb'"' + _STRING_REST.pattern + rb'"'
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+', re.DOTALL)  # inside an element
_TO_COMMA = re.compile(rb'[^"\[\]{},]*+(?:' + _STRING + rb'[^"\[\]{},]*+)*+', re.DOTALL)  # between elements
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPENING = b"[{"


def line_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Cuts at line ends; a compressed file is one piece."""
    return [whole(path, "jsonl")] if codec_of(path) else cut(path, "jsonl", piece_bytes, _LINE)


def list_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Of a `.json` file: one piece where it is a list, cuts at line ends where each line is an object; else DataError."""
    try:
        begins = next((text[:1] for chunk in chunks(whole(path, "json")) if (text := chunk.lstrip())), b"")
        if begins in (b"", b"["):
            return [whole(path, "json")]
        if begins == b"{" and _is_lines(path):
            return line_pieces(path, piece_bytes)
    except BrokenFile:
        return [whole(path, "json")]
    raise DataError(f"{path} is no JSON list of objects: write a list, or one object a line and name it .jsonl")


def _is_lines(path: Path) -> bool:
    """Whether a line ends an object and the next one begins another."""
    lines = (line for line in delimited(chunks(whole(path, "json")), _lines) if isinstance(line, Oversized) or line.strip())
    first, second = [*islice(lines, 2), b"", b""][:2]
    return isinstance(first, bytes) and first.rstrip().endswith(b"}") and (second.head if isinstance(second, Oversized) else second).startswith(b"{")


def lines(piece: Piece) -> Iterator[Outcome]:
    """Of format `jsonl`: every line is a record, a blank one too."""
    return map(_parsed, delimited(chunks(piece), _lines))


def elements(piece: Piece) -> Iterator[Outcome]:
    """Of format `json`: the elements of the list."""
    return map(_parsed, _elements(chunks(piece)))


def _lines(raw: bytes) -> list[bytes]:
    return raw.split(b"\n")


def _parsed(raw: Any) -> Outcome:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _explained(raw)
    return (value, "", "") if type(value) is dict else (None, "no object", excerpt(raw))


def _explained(raw: bytes | Oversized) -> Outcome:
    """Why the fast parser refused it, or the value where the standard library takes it."""
    if isinstance(raw, Oversized):
        return oversized(raw)
    if not raw.strip():
        return None, "empty", ""
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        return None, "invalid UTF-8", excerpt(raw)
    except (ValueError, RecursionError):
        return None, "no JSON", excerpt(raw)
    return (value, "", "") if isinstance(value, dict) else (None, "no object", excerpt(raw))


def _elements(found: Iterable[bytes]) -> Iterator[bytes | Oversized]:
    """What stands between the commas of the outermost list; BrokenFile where the list does not end."""
    depth, quoted = 0, False  # open brackets; whether a string is open
    element = Gathered()
    escape = b""  # a backslash that ends a chunk
    for chunk in found:
        chunk, start, at = escape + chunk, 0, 0
        escape = b""
        while at < len(chunk):
            pattern = _STRING_REST if quoted else _TO_COMMA if depth == 1 else _TO_BRACKET
            at = pattern.match(chunk, at).end()  # type: ignore[union-attr]  # all three match the empty string
            if at == len(chunk):
                break
            mark = chunk[at]
            if quoted and mark == _BACKSLASH:
                chunk, escape = chunk[:at], chunk[at:]
                break
            at += 1
            if mark == _QUOTE:
                quoted = not quoted
            elif mark == _COMMA:
                yield element.end(chunk[start : at - 1])
                start = at
            elif mark in _OPENING:
                depth += 1
                start = at if depth == 1 else start
            else:
                depth -= 1
                if depth == 0:
                    last, behind = element.end(chunk[start : at - 1]), chunk[at:]
                    yield from (e for e in (last, behind) if isinstance(e, Oversized) or e.strip())  # `[]` and `[…,]` have no last
                    return
        element.add(chunk[start:])
    if depth:
        raise BrokenFile("truncated JSON")
