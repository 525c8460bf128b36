"""CSV to records: {column: text} by the header, quoted line breaks included. Columns end at `,`, tab or `;`: what the header has most of.

Read strictly: a row with other columns than the header, or with a quote out of place, is refused rather than guessed at.
100 MB/s a core for rows of 500 bytes, 200 for rows of 1,300. A quote that is never closed takes up to 64 Mi characters with it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from graft.core.errors import DataError
from graft.data.readers.streams import (
    EXCERPT,
    MAX_RECORD_BYTES,
    BrokenFile,
    Outcome,
    Oversized,
    Piece,
    chunks,
    codec_of,
    cut,
    delimited,
    oversized,
    whole,
)

_LINE = re.compile(rb"\n")


def pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Cuts at line ends in a file without any quote, which is read for it at 2 GB/s; else one piece. DataError for a bad header."""
    try:
        header(path)
        if not codec_of(path) and not any(b'"' in chunk for chunk in chunks(whole(path, "csv"))):
            return cut(path, "csv", piece_bytes, _LINE)
    except BrokenFile:
        pass
    return [whole(path, "csv")]


def rows(piece: Piece) -> Iterator[Outcome]:
    """Of format `csv`: every row behind the header."""
    names, delimiter = header(piece.path)
    lines = _Lines(piece)
    found = csv.reader(lines, delimiter=delimiter, strict=True)
    if piece.start == 0:
        next(found, None)
    while True:
        lines.head, lines.invalid = "", False
        try:
            row = next(found)
        except StopIteration:
            return
        except csv.Error as e:  # the reader goes on with the next line
            yield oversized(lines.oversized) if lines.oversized else (None, _reason(e), lines.head[:EXCERPT])
            lines.oversized = None
            continue
        if lines.invalid:
            yield None, "invalid UTF-8", lines.head[:EXCERPT]
        elif not row:
            yield None, "empty", ""
        elif len(row) != len(names):
            yield None, "other columns than the header", lines.head[:EXCERPT]
        else:
            yield dict(zip(names, row, strict=True)), "", ""


def header(path: Path | str) -> tuple[list[str], str]:
    """(names of the columns, what ends a column); DataError where the first line is no header: of no UTF-8, or a name comes twice."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        delimiter = max(",\t;", key=next(_Lines(whole(path, "csv")), "").count)
        lines = _Lines(whole(path, "csv"))
        names = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except csv.Error as e:
        raise DataError(f"{path}: the first line is no header ({_reason(e)}): name every column there, once") from None
    if lines.invalid:
        raise DataError(f"{path}: the header is no UTF-8: save the file as UTF-8")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the header has two columns {twice!r}: name every column on the first line, once")
    return names, delimiter


class _Lines:
    """The lines of a piece for csv.reader, and what there is to say of the record that they make up."""

    def __init__(self, piece: Piece):
        self._found = delimited(chunks(piece), lambda raw: raw.split(b"\n"))
        self.head = ""  # its first line
        self.invalid = False  # some of it is no UTF-8
        self.oversized: Oversized | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = next(self._found)
        if isinstance(raw, Oversized):
            self.oversized = raw
            raise csv.Error("too long")
        try:
            line = raw.decode() + "\n"
        except UnicodeDecodeError:
            line = raw.decode("utf-8", "replace") + "\n"
            self.invalid = True
        self.head = self.head or line
        return line


def _reason(error: csv.Error) -> str:
    message = str(error)
    if "field limit" in message or "too long" in message:
        return f"a record over {MAX_RECORD_BYTES >> 20} MiB"
    if "end of data" in message:
        return "a quote that is never closed"
    return "a quote out of place" if "expected after" in message else "no CSV"
