"""Equal and nearly equal documents, of all sources together: of each cluster the first stays, by file and row.

Four steps, each of parts (parts.py) with bounded memory. `unpack` lays a file's fingerprints out to be mapped, and is done
again for new files alone. `find_equal` sorts the keys of all documents. `find_near` sorts the keys of some bands of the
signatures; documents of one key are confirmed by the agreement of their signatures, whose error is √(s (1 - s) / 128): of
pairs 0.7 alike 0.6 % are taken for 0.8 alike, of pairs 0.6 alike 2e-6. `cluster` joins all pairs: connected components, so
a chain A ~ B ~ C is one cluster though A and C may be less alike; what each has in common with the one kept is recorded.
A worker needs about 100 bytes a document: 2 M fit in 0.4 GiB. All steps take about 10 µs a document, 0.8 s at least.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graft.core.recipe import Dedup
from graft.data.compiled import compiled
from graft.data.minhash import band_keys, bands_and_rows
from graft.data.parts import Part, Spec, make

VERSION = 1
KEPT, EXACT, NEAR = 0, 1, 2  # what a mask says of a document
CLUSTERS = "clusters.parquet"
_AT_ONCE = 1 << 15  # signatures in memory
_BANDS = 5  # of a part: what all bands need is read once
_MOST = 64  # documents of one band key that a further one is held against: the work stays linear

_SCHEMA = pa.schema(
    [
        ("cluster", pa.int64()),  # the number of the document that is kept; documents are numbered by file, then row
        ("document", pa.int64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("of_file", pa.int32()),  # of the one that is kept
        ("of_row", pa.int64()),
        ("similarity", pa.float32()),  # to the one that is kept
        ("kind", pa.string()),
    ]
)


class Result(NamedTuple):
    """What deduplicate() found. Lists are by file."""

    masks: list[Path]  # of a uint8 array [rows]: KEPT, EXACT or NEAR; the path is named by what decides the content
    kept: list[int]  # documents
    clusters: Path  # a row for each document that is dropped
    counts: list[dict[str, Any]]  # {"kept": file, "dropped": file, "exact": documents, "near": documents}, files by number
    parts: list[Part]


def deduplicate(files: Sequence[Path], store: Path, dedup: Dedup) -> Result:
    """Find the duplicates among the documents of Parquet `files` with the columns of minhash.fingerprint_columns().

    Each file must lie in a folder named by what decides its content, as parts do. Runs inside a Ray cluster.
    """
    rule = {"near": dedup.near, "permutations": dedup.permutations}
    unpacked = make(unpack, VERSION, [{"file": str(path), **rule} for path in files], store)
    folders = {"folders": [str(part.path) for part in unpacked], "rows": [part.report["rows"] for part in unpacked], **rule}
    (equal,) = make(find_equal, VERSION, [folders], store)
    bands = bands_and_rows(dedup.permutations, dedup.near)[0] if dedup.near < 1 else 0
    some = [list(range(start, min(start + _BANDS, bands))) for start in range(0, bands, _BANDS)]
    near_specs = [{**folders, "equal": str(equal.path), "bands": numbers} for numbers in some]
    near = make(find_near, VERSION, near_specs, store)
    (clusters,) = make(cluster, VERSION, [{**folders, "equal": str(equal.path), "near": [str(part.path) for part in near]}], store)
    masks = make(write_mask, VERSION, [{"mask": mask} for mask in clusters.report["masks"]], store)
    return Result(
        [part.path / "mask.npy" for part in masks],
        [part.report["kept"] for part in masks],
        clusters.path / CLUSTERS,
        clusters.report["counts"],
        [*unpacked, equal, *near, clusters, *masks],
    )


# ---- parts ------------------------------------------------------------------------------------------------------------
def unpack(spec: Spec, folder: Path) -> dict[str, Any]:
    """keys.npy [rows, 2] uint64, bands.npy [bands, rows] uint64, signatures.npy [rows, permutations] uint32 of one file."""
    near, width = spec["near"] < 1, spec["permutations"]
    with pq.ParquetFile(spec["file"]) as file, ExitStack() as stack:
        rows, at = file.metadata.num_rows, 0
        keys = stack.enter_context(_Array(folder / "keys.npy", np.uint64, (rows, 2)))
        if near:
            signatures = stack.enter_context(_Array(folder / "signatures.npy", np.uint32, (rows, width)))
            bands = stack.enter_context(_Array(folder / "bands.npy", np.uint64, (bands_and_rows(width, spec["near"])[0], rows)))
        for batch in file.iter_batches(_AT_ONCE, columns=["key", "signature"] if near else ["key"]):
            keys.write((at, 0), _numbers(batch["key"], np.uint64, 2))
            if near:
                some = _numbers(batch["signature"], np.uint32, width)
                signatures.write((at, 0), some)
                for band, of_band in enumerate(band_keys(some, spec["near"])):
                    bands.write((band, at), of_band)
            at += len(batch)
    return {"rows": rows}


def find_equal(spec: Spec, folder: Path) -> dict[str, Any]:
    """first.npy [documents] int64: the first document with the same key."""
    keys = np.concatenate([np.empty((0, 2), np.uint64), *(np.load(f"{path}/keys.npy", mmap_mode="r") for path in spec["folders"])])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equal ones leads
    keys = keys[order]
    leads = np.ones(len(keys), bool)
    leads[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[leads][np.cumsum(leads) - 1]
    np.save(folder / "first.npy", first)
    return {}


def find_near(spec: Spec, folder: Path) -> dict[str, Any]:
    """pairs.npy [pairs, 2] int64: documents of one key of one of `bands` whose signatures agree, the earlier one first."""
    single = _single(spec["equal"])
    signatures, width = _Signatures(spec), spec["permutations"]
    least = math.ceil(spec["near"] * width - 1e-9)
    state = np.empty((_MOST, width), np.uint32), np.empty(_MOST, np.int64), np.zeros(1, np.uint64), np.zeros(1, np.int64)
    pairs, candidates = [np.empty((0, 2), np.int64)], 0
    for band in spec["bands"]:
        documents, keys = _sharing(spec["folders"], band, single)
        candidates += len(documents)
        state[2][:], state[3][:] = 0, 0
        for start in range(0, len(documents), _AT_ONCE):
            some = documents[start : start + _AT_ONCE]
            pairs.append(_confirm(some, keys[start : start + _AT_ONCE], signatures.of(some), least, *state))
    np.save(folder / "pairs.npy", np.unique(np.concatenate(pairs), axis=0))
    return {"candidates": candidates, "pairs": sum(map(len, pairs))}


def _single(equal: str) -> np.ndarray:
    """The documents that are the first of their key."""
    first = np.load(f"{equal}/first.npy")
    return np.flatnonzero(first == np.arange(len(first)))


def _sharing(folders: list[str], band: int, single: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents of `single` that share their key of a band with another, their keys), by key, then number."""
    keys = np.concatenate([np.empty(0, np.uint64), *(np.load(f"{path}/bands.npy", mmap_mode="r")[band] for path in folders)])[single]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    shared = np.zeros(len(keys), bool)
    shared[1:] = same
    shared[:-1] |= same
    return single[order[shared]], keys[shared]


def cluster(spec: Spec, folder: Path) -> dict[str, Any]:
    """CLUSTERS of all pairs; returns the masks by file, packed, and the counts by pair of files."""
    first = np.load(f"{spec['equal']}/first.npy")
    parents = first.copy()
    for path in spec["near"]:
        _join(parents, np.load(f"{path}/pairs.npy"))
    _flatten(parents)
    numbers = np.arange(len(first))
    kinds = np.where(parents == numbers, KEPT, np.where(first == numbers, NEAR, EXACT)).astype(np.uint8)
    ends = np.cumsum([0, *spec["rows"]])
    masks = [_packed(kinds[start:end]) for start, end in pairwise(ends.tolist())]
    signatures = _Signatures(spec) if spec["near"] else None
    dropped = np.flatnonzero(kinds)
    counts = Counter[int]()
    with pq.ParquetWriter(folder / CLUSTERS, _SCHEMA, compression="zstd") as out:
        for start in range(0, len(dropped), _AT_ONCE):
            documents = dropped[start : start + _AT_ONCE]
            rows, codes = _rows(documents, parents[documents], kinds[documents], ends, signatures)
            out.write_table(rows)
            counts.update(dict(zip(*map(np.ndarray.tolist, np.unique(codes, return_counts=True)), strict=True)))
    return {"masks": masks, "counts": _by_pair(counts, len(spec["rows"]))}


def write_mask(spec: Spec, folder: Path) -> dict[str, Any]:
    """mask.npy of a packed mask: a part of its own, so that its path does not change with other files."""
    mask = np.frombuffer(zlib.decompress(base64.b64decode(spec["mask"])), np.uint8)
    np.save(folder / "mask.npy", mask)
    return {"kept": int((mask == KEPT).sum())}


# ---- what they share --------------------------------------------------------------------------------------------------
class _Array:
    """A .npy file that is written piece by piece, with nothing in memory."""

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, int]):
        self.file, self.dtype, self.columns = path.open("wb"), np.dtype(dtype), shape[1]
        np.lib.format.write_array_header_1_0(self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": shape})
        self.start = self.file.tell()

    def __enter__(self) -> _Array:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, at: tuple[int, int], values: np.ndarray) -> None:
        """Put `values`, in C order, where (row, column) `at` begins."""
        self.file.seek(self.start + (at[0] * self.columns + at[1]) * self.dtype.itemsize)
        self.file.write(np.ascontiguousarray(values, self.dtype).data)


class _Signatures:
    """The signatures of any documents, read from the mapped files of `unpack`; no map outlives a call."""

    def __init__(self, spec: Spec):
        self.folders, self.width, self.ends = spec["folders"], spec["permutations"], np.cumsum([0, *spec["rows"]])

    def of(self, documents: np.ndarray) -> np.ndarray:
        """[documents, permutations] uint32."""
        files = np.searchsorted(self.ends, documents, "right") - 1
        order = np.argsort(files, kind="stable")
        out = np.empty((len(documents), self.width), np.uint32)
        for here in np.split(order, np.flatnonzero(np.diff(files[order])) + 1) if len(documents) else ():
            file = files[here[0]]
            out[here] = np.load(f"{self.folders[file]}/signatures.npy", mmap_mode="r")[documents[here] - self.ends[file]]
        return out


def _numbers(column: pa.Array, dtype: Any, width: int) -> np.ndarray:
    start = column.offset * column.type.byte_width
    return np.frombuffer(column.buffers()[1], dtype, len(column) * width, start).reshape(len(column), width)


def _packed(mask: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(mask.tobytes(), 6)).decode()


def _rows(
    documents: np.ndarray, clusters: np.ndarray, kinds: np.ndarray, ends: np.ndarray, signatures: _Signatures | None
) -> tuple[pa.Table, np.ndarray]:
    """(rows of CLUSTERS, [documents] the pair of files and the kind as one number)."""
    files, of_files = (np.searchsorted(ends, numbers, "right") - 1 for numbers in (documents, clusters))
    alike = (signatures.of(documents) == signatures.of(clusters)).mean(axis=1) if signatures else np.ones(len(documents))
    columns = [
        clusters,
        documents,
        files.astype(np.int32),
        documents - ends[files],
        of_files.astype(np.int32),
        clusters - ends[of_files],
        alike.astype(np.float32),
        pa.array(["", "exact", "near"]).take(pa.array(kinds)),
    ]
    return pa.table(columns, schema=_SCHEMA), (of_files * (len(ends) - 1) + files) * 3 + kinds


def _by_pair(counts: Counter[int], files: int) -> list[dict[str, Any]]:
    pairs: dict[tuple[int, int], dict[str, Any]] = {}
    for code, count in sorted(counts.items()):
        kept, dropped = divmod(code // 3, files)
        pair = pairs.setdefault((kept, dropped), {"kept": kept, "dropped": dropped, "exact": 0, "near": 0})
        pair["exact" if code % 3 == EXACT else "near"] += count
    return list(pairs.values())


# ---- compiled ---------------------------------------------------------------------------------------------------------
@compiled
def _confirm(documents, keys, signatures, least, leaders, numbers, key, count):
    """[pairs, 2]: each document and the earliest leader of its key with which it agrees in `least` columns or more.

    A document that agrees with none becomes a leader; from the 65th on, in place of the one that was made longest ago.
    leaders, their numbers, key [1], count [1] of its leaders so far: left for the next call, where the key may go on.
    """
    pairs = np.empty((documents.size, 2), np.int64)
    found = 0
    for i in range(documents.size):
        if keys[i] != key[0]:
            key[0], count[0] = keys[i], 0
        leader = -1
        for k in range(min(count[0], _MOST)):
            agree = 0
            for p in range(signatures.shape[1]):
                agree += signatures[i, p] == leaders[k, p]
            if agree >= least:
                leader = numbers[k]
                break
        if leader < 0:
            place = count[0] % _MOST
            leaders[place], numbers[place] = signatures[i], documents[i]
            count[0] += 1
        else:
            pairs[found, 0], pairs[found, 1] = leader, documents[i]
            found += 1
    return pairs[:found]


@compiled
def _root(parents, i):
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


@compiled
def _join(parents, pairs):
    """Union-find in which the smallest number is its cluster's root."""
    for n in range(pairs.shape[0]):
        a, b = _root(parents, pairs[n, 0]), _root(parents, pairs[n, 1])
        parents[max(a, b)] = min(a, b)


@compiled
def _flatten(parents):
    for i in range(parents.size):
        parents[i] = parents[parents[i]]  # a parent is smaller, so it is flat already
