"""Bytes of a piece of a file, cut at borders: what the readers of text, JSON and CSV stand on.

Memory is bounded whatever the file holds: less than 160 MB where a record is too large or nearly so, a few MB else.
A record over MAX_RECORD_BYTES is passed over and comes as `Oversized`. A compressed file that is truncated or corrupt
gives all bytes before the break, then raises `BrokenFile`. Plain files pass at 1 GB/s a core, gzip at 0.25, zstd at 0.9.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_RECORD_BYTES = 64 << 20
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
EXCERPT = 200  # characters
_HEAD = 4 * EXCERPT  # bytes of that many characters at most
_CHUNK = 1 << 20  # bytes a read
_TAIL = 64  # bytes: no border is longer
_BOM = b"\xef\xbb\xbf"

Outcome = tuple[dict[str, Any] | None, str, str]  # (value, reason, excerpt): a value, or the reason why there is none


class Piece(NamedTuple):
    """A part of a file that can be read alone. `start` and `end` count bytes, row groups or record batches, as the format has it."""

    path: str
    format: str  # a reader's name: a format of the recipe but "auto" and "dataset", or "lines" (text without blank lines)
    start: int
    end: int  # behind the last; all of a compressed file is (0, 0)


class Oversized(NamedTuple):
    """What is left of a record over MAX_RECORD_BYTES."""

    head: bytes
    size_bytes: int


class BrokenFile(Exception):
    """The rest of a file cannot be read; says why in a few words, for the reason of the last record."""


def codec_of(path: Path | str) -> str | None:
    """`gzip`, `zstd` or None, by the name."""
    return CODECS.get(Path(path).suffix.lower())


def excerpt(raw: bytes) -> str:
    """The first characters, whatever the bytes are."""
    return raw[:_HEAD].decode("utf-8", "replace")[:EXCERPT]


def oversized(record: Oversized) -> Outcome:
    size, most = record.size_bytes / 2**20, MAX_RECORD_BYTES >> 20
    return None, f"a record of {size:.1f} MiB, over {most} MiB", excerpt(record.head)


def chunks(piece: Piece) -> Iterator[bytes]:
    """The bytes of a piece, decompressed, without a byte order mark; BrokenFile behind the last good byte of a broken file."""
    codec = codec_of(piece.path)
    found = _decompressed(piece.path, codec) if codec else _plain(piece.path, piece.start, piece.end)
    if piece.start == 0:
        yield next(found, b"").removeprefix(_BOM)
    yield from found


def whole(path: Path | str, format: str) -> Piece:
    """All of a file that is read by bytes."""
    return Piece(str(path), format, 0, 0 if codec_of(path) else Path(path).stat().st_size)


def _plain(path: str, start: int, end: int) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as f:
        f.seek(start)
        while chunk := f.read(min(_CHUNK, end - start)):
            start += len(chunk)
            yield chunk


def _decompressed(path: str, codec: str) -> Iterator[bytes]:
    import pyarrow as pa

    with pa.OSFile(path) as file:
        if file.size() == 0:
            raise BrokenFile(f"truncated {codec}")
        stream = pa.CompressedInputStream(file, codec)  # of many members or frames too
        buffer = bytearray(_CHUNK)
        # a read that fails does not tell how much it had written; 0xFF, which no UTF-8 text holds, marks what it had not
        untouched = b"\xff" * _CHUNK
        while True:
            buffer[:] = untouched
            try:
                size = stream.readinto(buffer)
            except OSError as e:
                yield bytes(buffer).rstrip(b"\xff")
                raise BrokenFile(f"{'truncated' if 'runcated' in str(e) else 'corrupt'} {codec}") from None
            if not size:
                return
            yield bytes(memoryview(buffer)[:size])


class Gathered:
    """The bytes of one record as they come; of one over MAX_RECORD_BYTES its head alone."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size_bytes = 0

    def add(self, raw: bytes) -> None:
        self._parts.append(raw)
        self.size_bytes += len(raw)
        if self.size_bytes > MAX_RECORD_BYTES:
            self._parts = [b"".join(self._parts)[:_HEAD]]

    def end(self, raw: bytes) -> bytes | Oversized:
        """The record that ends with `raw`; the next one begins."""
        if not self._parts:
            return raw
        self.add(raw)
        parts, size_bytes = self._parts, self.size_bytes
        self._parts, self.size_bytes = [], 0
        return Oversized(parts[0], size_bytes) if size_bytes > MAX_RECORD_BYTES else b"".join(parts)


def delimited(found: Iterable[bytes], split: Callable[[bytes], list[bytes]]) -> Iterator[bytes | Oversized]:
    """What stands between the borders; the last one may lack its border, and is left out where it is empty.

    split: cuts bytes at all borders and leaves them out; a border has at most 64 bytes, or is found where a chunk holds it.
    """
    record, tail = Gathered(), b""
    for chunk in found:
        *done, rest = split(tail + chunk)
        if done:
            yield record.end(done[0])
            yield from done[1:]
        record.add(rest[:-_TAIL])
        tail = rest[-_TAIL:]  # a border may begin in it
    if record.size_bytes or tail:
        yield record.end(tail)


def cut(path: Path | str, format: str, piece_bytes: int, border: re.Pattern[bytes]) -> list[Piece]:
    """Pieces of an uncompressed file that end behind the first border at or after `piece_bytes`, and the file's end."""
    path = Path(path)
    size, start, pieces = path.stat().st_size, 0, []
    with path.open("rb") as f:
        while size - start > piece_bytes:
            end = _behind_border(f, start + piece_bytes, border, size)
            pieces.append(Piece(str(path), format, start, end))
            start = end
    return pieces if pieces and start == size else [*pieces, Piece(str(path), format, start, size)]


def _behind_border(f: BinaryIO, position: int, border: re.Pattern[bytes], size: int) -> int:
    f.seek(position)
    tail = b""
    while chunk := f.read(_CHUNK):
        buffer = tail + chunk
        if found := border.search(buffer):
            return position - len(tail) + found.end()
        position += len(chunk)
        tail = buffer[-_TAIL:]
    return size
