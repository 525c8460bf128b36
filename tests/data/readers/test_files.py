"""Every format: its records come as written and in order, however the file is cut."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.readers.files import Record, pieces, records
from graft.data.readers.jsonl import _elements

ROWS = [{"id": i, "text": f"第{i}段 “quoted”, and\nmore — 🎨" * (i % 7 + 1)} for i in range(500)]


def read(path: Path, piece_bytes: int = 64 << 20) -> list[Record]:
    return [r for piece in pieces(path, piece_bytes=piece_bytes) for r in records(piece)]


def values(path: Path, piece_bytes: int = 64 << 20) -> list[Any]:
    return [r.value for r in read(path, piece_bytes)]


def zstd(raw: bytes) -> bytes:
    return pa.Codec("zstd").compress(raw).to_pybytes()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_arrow(rows: list[dict[str, Any]], new: Callable[..., Any] = pa.ipc.new_stream, batch: int = 50) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue().to_pybytes()


def as_parquet(rows: list[dict[str, Any]], group: int = 50) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=group)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": as_jsonl,
    "rows.ndjson": as_jsonl,
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows),
    "lines.json": as_jsonl,
    "list.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "indented.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode(),
    "rows.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "members.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows[:99])) + gzip.compress(as_jsonl(rows[99:])),
    "frames.jsonl.zst": lambda rows: zstd(as_jsonl(rows[:99])) + zstd(as_jsonl(rows[99:])),
    "list.json.zst": lambda rows: zstd(json.dumps(rows).encode()),
    "rows.parquet": as_parquet,
    "stream.arrow": as_arrow,
    "file.arrow": lambda rows: as_arrow(rows, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_records_come_as_written_however_the_file_is_cut(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[name](ROWS))
    whole = read(path)
    assert [r.value for r in whole] == ROWS
    assert [r.number for r in whole] == list(range(len(ROWS)))
    assert values(path, piece_bytes=3000) == ROWS
    if not name.endswith((".gz", ".zst")) and name not in ("list.json", "indented.json"):
        assert len(pieces(path, piece_bytes=3000)) > 5


@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t"), ("semicolons.csv", ";"), ("rows.csv.gz", ",")])
def test_csv_with_quoted_line_breaks(tmp_path: Path, name: str, delimiter: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([r["id"], r["text"]] for r in ROWS)
    raw = b"\xef\xbb\xbf" + out.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert values(tmp_path / name, piece_bytes=3000) == [{"id": str(r["id"]), "text": r["text"]} for r in ROWS]


def test_csv_without_quotes_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    path.write_text("a,b\r\n" + "".join(f"{i},列{i}\r\n" for i in range(1000)), encoding="utf-8")
    assert len(pieces(path, piece_bytes=1000)) > 5
    assert values(path, piece_bytes=1000) == values(path) == [{"a": str(i), "b": f"列{i}"} for i in range(1000)]


def test_text_is_blocks_or_windows_of_lines(tmp_path: Path) -> None:
    blocks, lines = tmp_path / "blocks.txt", tmp_path / "lines.txt"
    blocks.write_bytes("\ufeff\n\n一段\r\n還是一段\r\n \u3000\r\n二段\n\n\n\n三段\n\n".encode())
    assert [v["text"] for v in values(blocks)] == ["一段\n還是一段", "二段", "三段"]
    assert pieces(blocks)[0].format == "text"
    written = [f"line {i} " + "字" * (i % 40 + 1) for i in range(400)]
    lines.write_text("\n\n" + "\n".join(written) + "\n\n", encoding="utf-8")
    windows = [v["text"] for v in values(lines)]
    assert pieces(lines)[0].format == "lines"
    assert "\n".join(windows) == "\n".join(written)
    assert all(1000 <= len(w) + 1 < 1050 for w in windows[1:-1])
    assert len(pieces(lines, piece_bytes=5000)) > 2
    assert "\n".join(v["text"] for v in values(lines, piece_bytes=5000)) == "\n".join(written)


# ---- properties ------------------------------------------------------------------------------------------------------
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TABLES = st.lists(st.fixed_dictionaries({"a": TEXTS, "b": TEXTS}), min_size=1, max_size=30)
ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY
@given(rows=TABLES, piece_bytes=st.integers(1, 400), writer=st.sampled_from(["x.jsonl", "x.parquet", "x.arrow", "x.json"]))
def test_pieces_concatenate_to_the_whole(tmp_path: Path, rows: list[dict[str, str]], piece_bytes: int, writer: str) -> None:
    write = {"x.jsonl": as_jsonl, "x.parquet": lambda r: as_parquet(r, 3), "x.arrow": lambda r: as_arrow(r, batch=3), "x.json": json.dumps}[writer]
    raw = write(rows)
    path = tmp_path / writer
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    assert values(path, piece_bytes=piece_bytes) == rows


@ANY
@given(rows=TABLES, piece_bytes=st.integers(1, 400))
def test_csv_pieces_concatenate_to_the_whole(tmp_path: Path, rows: list[dict[str, str]], piece_bytes: int) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(as_csv(rows))
    assert values(path, piece_bytes=piece_bytes) == rows


@ANY
@given(raw=st.text(" \n\r\t　ab字", max_size=300), piece_bytes=st.integers(1, 100))
def test_text_pieces_concatenate_to_the_whole(tmp_path: Path, raw: str, piece_bytes: int) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(raw.encode())
    if pieces(path)[0].format == "text":
        assert values(path, piece_bytes=piece_bytes) == values(path)
    assert "\n".join(v["text"] for v in values(path, piece_bytes=piece_bytes)).split() == raw.split()


@settings(ANY, max_examples=25)
@given(
    elements=st.lists(
        st.recursive(st.none() | st.integers() | TEXTS, lambda s: st.lists(s, max_size=3) | st.dictionaries(TEXTS, s, max_size=3), max_leaves=8)
    ),
    chunk=st.integers(1, 40),
)
def test_a_json_list_is_cut_at_its_own_commas(elements: list[Any], chunk: int) -> None:
    for ascii_only in (True, False):
        raw = json.dumps(elements, ensure_ascii=ascii_only, indent=1 if chunk % 2 else None).encode()
        found = list(_elements(raw[i : i + chunk] for i in range(0, len(raw), chunk)))
        assert [json.loads(e) for e in found if isinstance(e, bytes)] == elements
