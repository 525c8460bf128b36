"""Broken input: each record that cannot be read is counted with its reason, the rest is unharmed, and memory stays bounded."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from graft.core.errors import DataError
from graft.data.readers import streams
from graft.data.readers.files import Piece, pieces, records, sample

LINES = [json.dumps({"text": f"row {i}"}).encode() for i in range(20_000)]


def found(path: Path, piece_bytes: int = 64 << 20) -> list[str]:
    """Each record's text, or its reason in angle brackets."""
    read = [r for piece in pieces(path, piece_bytes=piece_bytes) for r in records(piece)]
    assert all((r.value is None) == bool(r.reason) and len(r.excerpt) <= 200 for r in read)
    return [f"<{r.reason}>" if r.value is None else str(r.value["text"]) for r in read]


@pytest.mark.parametrize("wrap", [lambda lines: b"\n".join(lines), lambda lines: b"[" + b",".join(lines) + b"]"], ids=["jsonl", "list"])
def test_a_broken_record_spoils_itself_alone(tmp_path: Path, wrap: Callable[[list[bytes]], bytes]) -> None:
    path = tmp_path / "rows.json"
    bad = [
        b'{"text": "\xff\xfe"}',
        b"  ",
        b'{"text" "x"}',
        b'["text"]',
        b"null",
        b"[" * 5000 + b"]" * 5000,
        b'{"text": "is\\ud800"}',
        b'{"text": NaN}',
    ]
    path.write_bytes(wrap([LINES[0], *bad, LINES[1]]))
    want = ["row 0", "<invalid UTF-8>", "<empty>", "<no JSON>", "<no object>", "<no object>", "<no JSON>", "is\ud800", "nan", "row 1"]
    if wrap([b""]) == b"":
        path = path.rename(tmp_path / "rows.jsonl")
    assert found(path) == want
    assert found(path, piece_bytes=5) == want


def test_broken_rows_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [b"id,text", b'1,"one"', b"2", b"", b"3,three,3", b"4,\xff\xfe", b'5,"fi"ve', b'6,"six\nlines"', b'7,"never closed', b"8,eight"]
    path.write_bytes(b"\r\n".join(rows))
    assert found(path) == [
        "one",
        "<other columns than the header>",
        "<empty>",
        "<other columns than the header>",
        "<invalid UTF-8>",
        "<a quote out of place>",
        "six\nlines",
        "<a quote that is never closed>",
    ]


@pytest.mark.parametrize(
    ("header", "says"), [(b"a,b,a\n1,2,3\n", "two columns 'a'"), ("題,文\n1,2\n".encode("big5"), "no UTF-8"), (b'a,"b"c\n', "no header")]
)
def test_a_bad_csv_header_is_one_clear_line(tmp_path: Path, header: bytes, says: str) -> None:
    (tmp_path / "rows.csv").write_bytes(header)
    with pytest.raises(DataError, match=says) as e:
        pieces(tmp_path / "rows.csv")
    assert "\n" not in str(e.value)


def test_broken_text(tmp_path: Path) -> None:
    blocks, lines = tmp_path / "blocks.txt", tmp_path / "lines.txt"
    blocks.write_bytes("一段\n\n".encode() + b"\xe4\xb8\n\n" + "三段".encode())
    assert found(blocks) == ["一段", "<invalid UTF-8>", "三段"]
    lines.write_bytes(b"\n".join([b"a" * 999, b"\xff" + b"b" * 998, b"c" * 999]))
    assert found(lines) == ["a" * 999, "<invalid UTF-8>", "c" * 999]


@pytest.mark.parametrize(("codec", "compress"), [("gzip", gzip.compress), ("zstd", lambda raw: pa.Codec("zstd").compress(raw).to_pybytes())])
def test_a_broken_compressed_file_gives_all_before_the_break(tmp_path: Path, codec: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows.jsonl.{codec.replace('gzip', 'gz').replace('zstd', 'zst')}"
    whole = compress(b"\n".join(LINES))
    path.write_bytes(whole[: len(whole) // 2])
    got = found(path)
    assert got[:-1] == [json.loads(line)["text"] for line in LINES[: len(got) - 1]]
    assert got[-1] == f"<truncated {codec} after {len(got) - 1:,} records>"
    assert len(got) > 5000
    path.write_bytes(whole + b"this is no member of it")
    assert found(path)[-2:] == [f"row {len(LINES) - 2}", f"<corrupt {codec} after {len(LINES) - 1:,} records>"]
    path.write_bytes(b"")
    assert found(path) == [f"<truncated {codec} after 0 records>"]


def test_truncated_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b", ".join(LINES[:50])[:-3])
    assert found(path)[-2:] == ["row 48", "<truncated JSON after 49 records>"]
    path.write_bytes(b"[" + LINES[0] + b",]\n[" + LINES[1])
    assert found(path) == ["row 0", "<no JSON>"]
    for text in ('{"version": 1, "data": []}\n', json.dumps({"a": 1, "b": [2]}, indent=1), "some words"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"no JSON list of objects.*\.jsonl"):
            pieces(path)


def test_broken_parquet_and_arrow(tmp_path: Path) -> None:
    rows = pa.table({"text": [f"row {i}" for i in range(3000)], "n": list(range(3000))})
    parquet, arrow = tmp_path / "rows.parquet", tmp_path / "rows.arrow"
    pq.write_table(rows, parquet, row_group_size=1000, compression="zstd", use_dictionary=False)
    raw = bytearray(parquet.read_bytes())
    start = pq.read_metadata(parquet).row_group(1).column(0).data_page_offset
    raw[start + 200 : start + 300] = b"x" * 100
    parquet.write_bytes(raw)
    for piece_bytes in (1, 64 << 20):
        assert found(parquet, piece_bytes) == [f"row {i}" for i in range(1000)] + ["<corrupt Parquet row group>"] + [
            f"row {i}" for i in range(2000, 3000)
        ]
    parquet.write_bytes(raw[:-10])
    assert found(parquet) == ["<truncated or corrupt Parquet after 0 records>"]
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        with pa.OSFile(str(arrow), "wb") as sink, new(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=1000)
        arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
        assert found(arrow) == [f"row {i}" for i in range(1000)] + ["<truncated or corrupt Arrow after 1,000 records>"]
    arrow.write_bytes(b"")
    assert found(arrow) == ["<truncated or corrupt Arrow after 0 records>"]


def test_bytes_in_a_table_that_are_no_utf8(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 2, 4, 6], np.int32).tobytes())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ab\xff\xfecd")])})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert found(tmp_path / "rows.parquet") == found(tmp_path / "rows.arrow") == ["ab", "<invalid UTF-8>", "cd"]


def test_arrow_offsets_that_point_outside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": ["a", "bc", "d"]}))
    good, bad = (np.array(offsets, np.int32).tobytes() for offsets in ([0, 1, 3, 4], [0, 1, 1 << 30, 4]))
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, bad))
    assert found(path) == ["a", "<corrupt Arrow row>", "<corrupt Arrow row>"]


def test_a_null_column_and_a_dictionary_come_as_they_are(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", None, "a"]).dictionary_encode(), "none": pa.nulls(3)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert sample(pieces(tmp_path / "rows.parquet")) == [{"text": t, "none": None} for t in ("a", None, "a")]


def test_a_file_that_is_gone_is_one_clear_line(tmp_path: Path) -> None:
    for format in ("jsonl", "text", "csv", "json", "parquet", "arrow"):
        with pytest.raises(DataError, match="cannot be read"):
            list(records(Piece(str(tmp_path / "gone"), format, 0, 1)))


# ---- large records ---------------------------------------------------------------------------------------------------
def test_a_record_over_the_limit_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit and small reads, so that every way of splitting a record over reads is met."""
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1 << 20)
    for module in ("csv_rows", "tables"):
        monkeypatch.setattr(f"graft.data.readers.{module}.MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr("graft.data.readers.tables._BATCH_BYTES", 1 << 16)
    for chunk in (1000, 4096, 1 << 20):
        monkeypatch.setattr(streams, "_CHUNK", chunk)
        texts = ["before", "x" * (3 << 20), "between", "y" * ((1 << 20) - 12), "z" * ((1 << 20) + 1), "after"]
        for name, raw in _large(texts):
            (tmp_path / name).write_bytes(raw)
            over = [f"<a record of {size:.1f} MiB, over 1 MiB>" for size in (3, 1)]
            want = ["before", over[0], "between", texts[3], over[1], "after"]
            assert found(tmp_path / name) == want, (name, chunk)


def _large(texts: list[str]) -> Iterator[tuple[str, bytes]]:
    rows = [json.dumps({"text": t}) for t in texts]
    yield "rows.jsonl", "\n".join(rows).encode()
    yield "rows.jsonl.gz", gzip.compress("\n".join(rows).encode(), 1)
    yield "list.json", f"[{','.join(rows)}]".encode()
    yield "rows.csv", "\n".join(["text", *texts]).encode()
    yield "blocks.txt", "\n\n".join(texts).encode()
    table, parquet, arrow = pa.table({"text": texts}), pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    yield "rows.parquet", parquet.getvalue().to_pybytes()
    yield "rows.arrow", arrow.getvalue().to_pybytes()


PROBE = """
import resource, sys
from pathlib import Path
import csv, orjson, pyarrow.parquet
from graft.data.readers.files import pieces, records
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for name in sys.argv[1:]:
    before = peak()
    got = [r.value["text"] if r.value else r.reason for p in pieces(Path(name)) for r in records(p)]
    print(round(peak() - before), got)
"""
LARGE = {
    "rows.jsonl": (b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n'),
    "list.json": (b'[{"text": "a"}, {"text": "', b'"}, {"text": "b"}]'),
    "rows.csv": (b"text\na\n", b"\nb\n"),
    "blocks.txt": (b"a\n\n", b"\n\nb\n"),
    "rows.jsonl.zst": (b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n'),
}


def test_a_record_of_200_mb_is_never_in_memory(tmp_path: Path) -> None:
    """The peak of a process of its own, over what it had before it read: at most the 64 MiB of a record, and the same once more as they are joined."""
    for name, (before, after) in LARGE.items():
        if name.endswith("zst"):
            with pa.CompressedOutputStream(str(tmp_path / name), "zstd") as out:
                out.write(before + bytes(200 << 20) + after)
        else:
            with (tmp_path / name).open("wb") as f:
                f.write(before)
                f.seek(200 << 20, os.SEEK_CUR)  # a hole of zero bytes, which takes no disk
                f.write(after)
    done = subprocess.run([sys.executable, "-c", PROBE, *(str(tmp_path / name) for name in LARGE)], capture_output=True, text=True, check=True)
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [got for _, got in lines] == ["['a', 'a record of 200.0 MiB, over 64 MiB', 'b']"] * len(LARGE)
    assert sum(int(used_mib) for used_mib, _ in lines) < 160


@pytest.mark.parametrize(("name", "write"), [("n.parquet", pq.write_table), ("n.arrow", feather.write_feather)])
def test_a_table_with_a_wrong_bit_anywhere_in_its_schema_is_read_or_told(tmp_path: Path, name: str, write: Callable[..., None]) -> None:
    path = tmp_path / name
    write(pa.table({"n": [1, 2, 3]}), path)
    whole = path.read_bytes()
    start = whole.index(b"ARROW:schema") if name == "n.parquet" else 0
    reasons = set()
    for at in range(start, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        reasons.update(r.reason for piece in pieces(path) for r in records(piece))
    assert any("corrupt" in reason for reason in reasons) and "" in reasons
