"""Secrets made up for a test, and the search of every file under a folder for what is left of them.

Files are read whole: 2,000 files of 80 MB take about 2 s.
"""

import base64
import gzip
import io
import math
import secrets
import sqlite3
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

PIECE = 24  # characters: a message cut in the middle of a key gives it away too


def new_key(name):
    """As keys look, with characters that URLs quote."""
    return f"sk-{name[:4].lower()}/{secrets.token_hex(20)}+{secrets.token_hex(8)}"


def forms(text: str) -> set[bytes]:
    """`text` as it may stand in a file: plain, URL-quoted, in UTF-16, and in base64 wherever a group of three begins."""
    raw = text.encode()
    found = {raw, quote(text, safe="").encode(), text.encode("utf-16-le"), raw.replace(b"/", rb"\/")}
    for offset in range(3):
        whole = slice(math.ceil(offset * 4 / 3), (offset + len(raw)) * 4 // 3)  # characters that hang on `text` alone
        coded = bytes(offset) + raw
        found |= {base64.b64encode(coded)[whole], base64.urlsafe_b64encode(coded)[whole]}
    return found


def contents(data: bytes, name: str, depth: int = 3) -> Iterator[tuple[str, bytes]]:
    """The bytes themselves, and what they hold where they are packed or a database."""
    yield name, data
    if depth and data[:2] == b"\x1f\x8b":
        with io.BytesIO(data) as file:
            try:
                yield from contents(gzip.GzipFile(fileobj=file).read(), f"{name}, unpacked", depth - 1)
            except (EOFError, OSError, zlib.error):  # not gzip after all
                return
    elif depth and data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(archive.read(member), f"{name}/{member}", depth - 1)
    elif data[:15] == b"SQLite format 3":  # a long value is cut in pages
        with sqlite3.connect(":memory:") as db:
            db.deserialize(data[:18] + b"\1\1" + data[20:])  # no write-ahead log: in memory there is none
            yield f"{name}, rows", "\n".join(db.iterdump()).encode()


def search(root: Path, wanted: dict[str, str]) -> tuple[Counter[str], set[tuple[str, str]]]:
    """(files searched, by ending; (name of what was wanted, where) for every find) of all files under `root`."""
    pieces = {name: forms(text[:PIECE]) | forms(text[-PIECE:]) for name, text in wanted.items()}
    searched: Counter[str] = Counter()
    found = set()
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        searched[path.suffix] += 1
        for where, data in contents(path.read_bytes(), str(path.relative_to(root))):
            found |= {(name, where) for name, all_forms in pieces.items() if any(form in data for form in all_forms)}
        found |= {(name, f"name of {path}") for name, text in wanted.items() if text[:PIECE] in str(path)}
    return searched, found
