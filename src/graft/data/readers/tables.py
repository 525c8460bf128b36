"""Parquet and Arrow files to records, a few MB of rows at a time.

A Parquet file is cut at row groups, an Arrow file (stream or IPC file, as `datasets` and `pyarrow` write them) at record
batches. Behind what is broken the next row group is read; in an Arrow file nothing can be found behind a break.
Counted as JSONL, Parquet passes at 150 (chats) to 320 MB/s a core, Arrow at 280 to 390. A Parquet cell is decoded before
its size is known: one of 200 MB takes 0.8 GB for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from graft.data.readers.streams import MAX_RECORD_BYTES, BrokenFile, Outcome, Oversized, Piece, oversized

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES = 4 << 20  # of rows that are Python objects at a time


def parquet_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Runs of row groups; a file whose footer cannot be read is one piece, for `row_groups` to say so."""
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(path)
    except _broken():
        return [Piece(str(path), "parquet", 0, 1)]
    return _runs(path, "parquet", [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)], piece_bytes)


def row_groups(piece: Piece) -> Iterator[Outcome]:
    """Of format `parquet`: the rows of the row groups start .. end - 1."""
    import pyarrow.parquet as pq

    open(piece.path, "rb").close()  # an OSError of this is no broken file
    try:
        file = pq.ParquetFile(piece.path, buffer_size=1 << 20)  # streams a column chunk rather than reading it whole
    except _broken():
        raise BrokenFile("truncated or corrupt Parquet") from None
    with file:
        for i in range(piece.start, piece.end):
            group = file.metadata.row_group(i)
            few = max(1, min(10_000, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
            read = 0
            try:
                for batch in file.iter_batches(few, row_groups=[i], use_threads=False):
                    yield from _rows(batch)
                    read += batch.num_rows
            except _broken():
                yield None, "corrupt Parquet row group", f"{group.num_rows - read:,} rows"


def arrow_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Runs of record batches, whose sizes stand in the messages' heads; a break is the last piece's to report."""
    import pyarrow as pa

    sizes: list[int] = []
    try:
        with _stream_of(path) as source:
            messages = pa.ipc.MessageReader.open_stream(source)
            sizes.extend(m.body.size for m in messages if m.type == "record batch")
    except _broken():
        sizes.append(0)  # the batch that cannot be read
    return _runs(path, "arrow", sizes, piece_bytes)


def batches(piece: Piece) -> Iterator[Outcome]:
    """Of format `arrow`: the rows of the record batches start .. end - 1."""
    import pyarrow as pa

    open(piece.path, "rb").close()  # an OSError of this is no broken file
    with _stream_of(piece.path) as source:
        try:
            reader = pa.ipc.open_stream(source)
            for i in range(piece.end):
                batch = reader.read_next_batch()
                if i >= piece.start:
                    yield from _valid_rows(batch)
        except StopIteration:
            return
        except _broken():
            raise BrokenFile("truncated or corrupt Arrow") from None


def _broken() -> tuple[type[Exception], ...]:
    """What is raised on a file that is not as it should be; Arrow's kinds include those of types, keys and memory that are none."""
    import pyarrow as pa

    return OSError, ValueError, pa.ArrowException


def _runs(path: Path, format: str, sizes: list[int], piece_bytes: int) -> list[Piece]:
    ends, waiting = [0], 0
    for count, size in enumerate(sizes, 1):
        waiting += size
        if waiting >= piece_bytes:
            ends.append(count)
            waiting = 0
    if len(ends) == 1 or waiting or ends[-1] < len(sizes):
        ends.append(len(sizes))
    return [Piece(str(path), format, start, end) for start, end in pairwise(ends)]


def _stream_of(path: Path | str) -> pa.MemoryMappedFile:
    """Where the stream begins: an IPC file holds one behind its magic bytes, https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    source.seek(8 if source.read(6) == b"ARROW1" else 0)
    return source


def _valid_rows(batch: pa.RecordBatch) -> Iterator[Outcome]:
    """The rows of a mapped batch, whose bytes nobody has checked: offsets that are wrong would end the process."""
    try:
        batch.validate(full=True)
    except ValueError as e:
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            yield from _valid_rows(batch.slice(0, half))
            yield from _valid_rows(batch.slice(half))
        else:
            yield None, "invalid UTF-8" if "UTF8" in str(e) else "corrupt Arrow row", ""
        return
    yield from _rows(batch)


def _rows(batch: pa.RecordBatch) -> Iterator[Outcome]:
    """The rows as Python objects, a few MB at a time; one that cannot be such an object is found by halving."""
    import pyarrow as pa

    for i, field in enumerate(batch.schema):
        if pa.types.is_dictionary(field.type):  # each slice would count the whole dictionary
            batch = batch.set_column(i, field.name, batch.column(i).dictionary_decode())
    single = batch.num_rows == 1
    reason = ""
    if single and batch.nbytes > MAX_RECORD_BYTES:
        yield oversized(Oversized(b"", batch.nbytes))
        return
    if single or batch.nbytes <= _BATCH_BYTES:
        try:
            yield from [(value, "", "") for value in batch.to_pylist()]
            return
        except UnicodeDecodeError:
            reason = "invalid UTF-8"
        except (ValueError, OverflowError):
            reason = "a value that cannot be read"
    if single:
        yield None, reason, ""
        return
    half = batch.num_rows // 2
    yield from _rows(batch.slice(0, half))
    yield from _rows(batch.slice(half))
