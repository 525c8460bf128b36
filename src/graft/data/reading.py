"""Pieces of a corpus to one documents file: records are read, laid out, cleaned, held against the evaluation sets and fingerprinted.

The work of a part (see parts.py). `documents.parquet` has a row a document, with fingerprints in files beside it (dedup.py),
`rejected.jsonl` a line for each record and each document that cannot be used. 1,000 documents are in memory at a time, or 64 Mi characters; cleaning alone runs
at 20 to 30 MB/s a core.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graft.core.errors import DataError
from graft.core.rows import in_texts, is_unicode, write_jsonl
from graft.core.sections import Clean, Corpus, Decontaminate, Dedup
from graft.data.cleaning.document import clean_document
from graft.data.corpora import made
from graft.data.decontaminate import Gate
from graft.data.dedup import FingerprintWriter
from graft.data.minhash import exact_key
from graft.data.parts import Spec
from graft.data.pictures import FOLDER, Pictures
from graft.data.readers.files import Piece, Record, records
from graft.data.readers.layouts import excerpt, to_messages, to_text
from graft.data.readers.mcq import Refused, text_of
from graft.data.readers.mcq import texts as mcq_texts
from graft.model.chat import files_of
from graft.model.pixels import Unusable, normalise

VERSION = 3
DOCUMENTS, REJECTED, TEXTS = "documents.parquet", "rejected.jsonl", "texts.jsonl"
BATCH = 1000  # documents
BATCH_CHARACTERS = 64 << 20  # or so many of their characters: of a compressed file, a thousand books would be in memory else
PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "write_statistics": False}
COLUMNS = pa.schema([("text", pa.large_string()), ("number", pa.int64())])
EXCERPT = 200  # characters of a rejected text that are kept
AS_MADE = Clean(steps=("nfc", "control", "whitespace"), min_chars=2, max_chars=None)  # of text that graft makes itself


class Document(NamedTuple):
    """What one record gave: a text, or a conversation; `reason` says why it is none."""

    file: str
    number: int  # of its record in the piece
    text: str  # the text, or the messages as JSON
    compared: str  # what is held against other documents and the evaluation sets
    reason: str = ""
    alike: str | None = None  # what near duplicates are told by, where not by `compared`: many questions may share an article


def read_pieces(spec: Spec, folder: Path) -> dict[str, Any]:
    """The part: fill `folder` with DOCUMENTS and REJECTED, and images/ where the corpus shows some; returns counts.

    spec: corpus, layout, pieces (none: a corpus that is made), dedup and decontaminate (as in the recipe), gate (file of texts); of a
    corpus with a folder of images, images (its path and digest).
    """
    corpus, dedup = Corpus.model_validate(spec["corpus"]), Dedup.model_validate(spec["dedup"])
    gate = Gate.of_file(Path(spec["gate"]), Decontaminate.model_validate(spec["decontaminate"]))
    counts: Counter[str] = Counter(records=0, documents=0, characters=0)
    changed: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    root = Path(spec["images"]["path"]) if "images" in spec else None
    pictures = Pictures(folder / FOLDER, root, changed) if corpus.shows_images else None
    with (folder / REJECTED).open("w", encoding="utf-8") as bad, _Writer(folder, dedup) as writer:
        found = _documents(_counted(_records(spec["pieces"], corpus), counts), corpus, spec["layout"], changed, pictures)
        for batch in _batches(found):
            usable = [d for d in batch if not d.reason]
            hits = dict(zip(map(id, usable), gate.hits([d.compared for d in usable]), strict=True))
            for d in batch:
                if reason := d.reason or ("contaminated" if hits[id(d)] else ""):
                    rejected[reason] += 1
                    line = {"file": d.file, "number": d.number, "reason": reason, "text": d.text[:EXCERPT]}
                    bad.write(json.dumps(line, ensure_ascii=not is_unicode(d.text[:EXCERPT])) + "\n")
            kept = [d for d in usable if not hits[id(d)]]
            writer.add(kept)
            counts.update(documents=len(kept), characters=sum(len(d.compared) for d in kept))
    return {**counts, "rejected": dict(sorted(rejected.items())), "changed": dict(sorted(changed.items()))}


def _records(pieces: list[list[Any]], corpus: Corpus) -> Iterator[tuple[str, Record]]:
    """(file name, record) of all pieces, or of the corpus that is made."""
    for piece in pieces:
        name = os.fsencode(Path(piece[0]).name).decode("utf-8", "backslashreplace")  # one that is no UTF-8 can be written so
        yield from ((name, record) for record in records(Piece(*piece)))
    if not pieces:
        yield from ((corpus.kind, Record(n, value, "", "")) for n, value in enumerate(made(corpus)))


def _counted(source: Iterator[tuple[str, Record]], counts: Counter[str]) -> Iterator[tuple[str, Record]]:
    for item in source:
        counts["records"] += 1
        yield item


def _documents(
    source: Iterator[tuple[str, Record]], corpus: Corpus, layout: str, changed: Counter[str], pictures: Pictures | None
) -> Iterator[Document]:
    if layout != "text":
        to_chat = pictures.messages if pictures else to_messages
        for file, record in source:
            messages, reason = to_chat(record.value, layout, corpus.mcq) if record.value is not None else (None, record.reason)
            if messages is None:
                yield Document(file, record.number, _excerpt(record), "", reason)
            else:
                contents = "\n".join([m["content"] for m in in_texts(messages)] + files_of(messages))
                yield Document(file, record.number, json.dumps(messages, ensure_ascii=False), contents, alike=exact_key(contents).hex())
        return
    clean = corpus.clean or (Clean() if corpus.path else AS_MADE)
    for file, number, text, reason in _texts(source, corpus.text, clean.merge_by):
        if not reason:
            pieces, reason, steps = clean_document(text, clean)
            changed.update(steps)
            yield from (Document(file, number, piece, piece) for piece in pieces)
        if reason:
            yield Document(file, number, text[:EXCERPT], "", reason)


def _batches(found: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents by row group."""
    batch: list[Document] = []
    characters = 0
    for document in found:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(source: Iterator[tuple[str, Record]], key: str, merge_by: str | None) -> Iterator[tuple[str, int, str, str]]:
    """(file, record number, text, reason); neighbours of one title are one text, numbered as their first, a refused record between them or not."""
    group: tuple[str, int, Any, list[str]] | None = None
    for file, record in source:
        text, reason = to_text(record.value, key) if record.value is not None else ("", record.reason)
        if reason:
            yield file, record.number, _excerpt(record), reason
            continue
        title = (record.value or {}).get(merge_by) or None if merge_by else None  # an empty cell of a CSV file is no title
        if group and (title is None or (file, title) != (group[0], group[2])):
            yield group[0], group[1], "\n\n".join(group[3]), ""
            group = None
        if title is None:
            yield file, record.number, text, ""
        elif group:
            group[3].append(text)
        else:
            group = (file, record.number, title, [text])
    if group:
        yield group[0], group[1], "\n\n".join(group[3]), ""


def _excerpt(record: Record) -> str:
    return record.excerpt if record.value is None else excerpt(record.value)


class _Writer:
    """A documents file, a row group a batch: text and number of the record; beside it what dedup compares."""

    def __init__(self, folder: Path, dedup: Dedup):
        self.file, self.fingerprints = pq.ParquetWriter(folder / DOCUMENTS, COLUMNS, **PARQUET), FingerprintWriter(folder, dedup)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.fingerprints.__exit__()

    def add(self, documents: list[Document]) -> None:
        if not documents:
            return
        self.file.write_table(pa.table([[d.text for d in documents], [d.number for d in documents]], schema=COLUMNS))
        alike = [d.alike for d in documents if d.alike]
        self.fingerprints.add([d.compared for d in documents], alike or None)


def text_sizes(documents: pq.FileMetaData) -> list[int]:
    """Bytes of text, and a few more, by row group of a documents file."""
    return [documents.row_group(i).total_byte_size for i in range(documents.num_row_groups)]


def runs(documents: Path, text_bytes: int) -> list[tuple[range, int]]:
    """(row groups, their rows) of a documents file: all of them, or, of what holds more than half as much again, runs of about `text_bytes` bytes of text."""
    meta = pq.read_metadata(documents)
    sizes = np.array(text_sizes(meta), np.int64)
    count = max(1, round(sizes.sum() / text_bytes))
    # a group belongs to the run in whose share of the bytes it begins
    of = (np.cumsum(sizes) - sizes) * count // max(1, sizes.sum())
    ends = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(sizes)]
    return [(range(a, b), sum(meta.row_group(i).num_rows for i in range(a, b))) for a, b in pairwise(ends)]


def write_evaluation_texts(spec: Spec, folder: Path) -> dict[str, Any]:
    """The part of the evaluation sets: TEXTS, which every gate is built from; of a question that shows images these by their SHA-256, not its words.

    spec: texts; sets, each as a reading part's (corpus, layout, pieces, digest, images); sent: max_side and max_bytes of the images that augment
    makes rows of, whose files are others than those it is given, or None. Questions need no answers. Reports how many records were `refused`, by
    reason; DataError for a set of which nothing can be read.
    """
    found, refused = list(spec["texts"]), Counter[str]()
    for own in spec["sets"]:
        corpus, layout = Corpus.model_validate(own["corpus"]), own["layout"]
        pictures = Pictures(folder / FOLDER, Path(own["images"]["path"]) if "images" in own else None, Counter()) if corpus.shows_images else None
        before, unread = len(found), Counter[str]()
        for _, record in _records(own["pieces"], corpus):
            try:
                found += _protected(record, corpus, layout, pictures, spec["sent"])
            except Refused as e:
                unread[str(e)] += 1
        if len(found) == before:
            raise DataError(
                f"{corpus.path}: no question and no text of this evaluation set can be read, so nothing would be kept out of training "
                f"(refused: {dict(unread) or 'nothing, it is empty'}): mend the file, or how the recipe says it is read"
            )
        refused += unread
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    texts = write_jsonl(folder / TEXTS, ({"text": text} for text in dict.fromkeys(found)))
    return {"texts": texts, "refused": dict(sorted(refused.items()))}


def _protected(record: Record, corpus: Corpus, layout: str, pictures: Pictures | None, sent: dict[str, int] | None) -> list[str]:
    """What no training text may hold of an evaluation record; Refused where it cannot be read."""
    if record.value is None:
        raise Refused(record.reason)
    if layout == "text":
        return [text_of(record.value, corpus.text)]
    messages, reason = (pictures.messages if pictures else to_messages)(record.value, layout, corpus.mcq, answered=False)
    if messages is None:
        raise Refused(reason)
    if shown := [name for file in files_of(messages) for name in _known_by(pictures.folder / file, sent)] if pictures else []:
        return shown
    # without the template, which training rows of another content have too
    turns = mcq_texts(record.value, corpus.mcq) if layout == "mcq" else [m["content"] for m in messages if m["role"] == "user"]
    # together, so that "Continue." is not sought in every text; the longest by itself, as short turns with answers between have no n-gram
    return ["\n".join(turns), max(turns, key=len)]


def _known_by(image: Path, sent: dict[str, int] | None) -> Iterator[str]:
    """The SHA-256 that a training row's file of this image has: its own, or that of the JPEG that augment makes of it."""
    yield image.stem
    if sent:
        with suppress(Unusable), image.open("rb") as file:
            yield normalise(file, sent["max_side"], sent["max_bytes"]).sha256
