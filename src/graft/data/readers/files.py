"""Files of a corpus to records: which files, how they are cut into pieces, and the stream of records of a piece.

    for path in find(corpus, plan.beside):
        for piece in pieces(path, corpus.format):
            for record in records(piece): …

A piece is read alone, on any machine that sees the file. The records of a file's pieces are the file's records in their
order, however it was cut (windows of a text without blank lines apart, which begin anew with a piece). What cannot be
read comes as a record with its reason. Cutting costs a look at a few places of the file, at most one pass at 2 GB/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from graft.core.errors import ConfigError, DataError
from graft.core.files import files_at
from graft.core.sections import Corpus
from graft.data.readers import csv_rows, jsonl, tables, text
from graft.data.readers.streams import CODECS, MAX_RECORD_BYTES, BrokenFile, Outcome, Piece, codec_of

__all__ = ["MAX_RECORD_BYTES", "Piece", "Record", "find", "format_of", "pieces", "records", "sample"]

PIECE_BYTES = 64 << 20
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSIBLE = ("text", "json", "jsonl", "csv")
_CUTS: dict[str, Callable[[Path, int], list[Piece]]] = {
    "text": text.pieces,
    "json": jsonl.list_pieces,
    "jsonl": jsonl.line_pieces,
    "csv": csv_rows.pieces,
    "parquet": tables.parquet_pieces,
    "arrow": tables.arrow_pieces,
}
_READERS: dict[str, Callable[[Piece], Iterator[Outcome]]] = {
    "text": text.blocks,
    "lines": text.windows,
    "json": jsonl.elements,
    "jsonl": jsonl.lines,
    "csv": csv_rows.rows,
    "parquet": tables.row_groups,
    "arrow": tables.batches,
}


class Record(NamedTuple):
    """One record of a piece: a value, or None with the reason and the record's first 200 characters."""

    number: int  # in the piece, from 0
    value: dict[str, Any] | None
    reason: str
    excerpt: str


def find(corpus: Corpus, beside: Callable[[str], Path]) -> list[Path]:
    """The files of `corpus.path`, as `files_at` finds them. Raises its errors, and ConfigError in one line where nothing is found or a name
    tells no known format."""
    assert corpus.path is not None  # the recipe demands it of files
    path = beside(corpus.path)
    found = files_at(path)
    if corpus.format == "dataset" and not all(file.suffix == ".arrow" for file in found):
        raise ConfigError(f"{path} is no folder that Dataset.save_to_disk wrote: name one, or leave format out")
    if not found:
        raise ConfigError(f"no file at {path}: mend the path of the corpus, a file, a folder or a pattern relative to the recipe")
    for file in found:
        format_of(file, corpus.format)
    return found


def format_of(path: Path, forced: str = "auto") -> str:
    """The format of a file by its name, or `forced`; ConfigError for a name that tells none."""
    if forced not in ("auto", "dataset"):
        return forced
    compressed = codec_of(path) is not None
    format = SUFFIXES.get((path.with_suffix("") if compressed else path).suffix.lower())
    if format is None or (compressed and format not in _COMPRESSIBLE):
        raise ConfigError(
            f"{path}: the name tells no format: known are {', '.join(SUFFIXES)}, text and JSON also with {' or '.join(CODECS)}; "
            'set format = "…", or a pattern as path that leaves the file out'
        )
    return format


def pieces(path: Path, format: str = "auto", piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The pieces of a file in order, at least one; the same file gives the same pieces.

    A compressed file, a JSON list and a CSV file with quotes are one piece. Raises DataError in one line for a file that can
    never give a record: one that cannot be opened, a CSV file with a bad header, a JSON file that is no list.
    """
    try:
        return _CUTS[format_of(path, format)](path, piece_bytes)
    except OSError as e:
        raise _unreadable(path, e) from None


def records(piece: Piece) -> Iterator[Record]:
    """The records of a piece in order, a few MB in memory; of a broken file those before the break, then one with the reason.

    Raises DataError where the file cannot be opened.
    """
    count = 0
    try:
        for value, reason, excerpt in _READERS[piece.format](piece):
            yield Record(count, value, reason, excerpt)
            count += 1
    except BrokenFile as e:
        yield Record(count, None, f"{e} after {count:,} records", "")
    except OSError as e:
        raise _unreadable(piece.path, e) from None


def sample(found: Iterable[Piece], count: int = 100) -> list[dict[str, Any]]:
    """The first `count` readable values, of at most 100 times as many records: what the layout is detected by."""
    read = islice(chain.from_iterable(map(records, found)), 100 * count)
    return list(islice((r.value for r in read if r.value is not None), count))


def _unreadable(path: Path | str, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror or error}): mend the path in [corpora], or the file's permissions")
