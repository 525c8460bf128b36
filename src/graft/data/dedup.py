"""Equal and nearly equal documents, of all sources together: of each cluster the first stays, by file and row.

Whoever makes documents leaves their fingerprints beside them (FingerprintWriter). Two steps follow, of parts (parts.py) with
bounded memory. `find` takes the keys of all documents, or some bands of their signatures: documents of one band key are
confirmed by the agreement of their signatures, whose error is √(s (1 - s) / 128): of pairs 0.7 alike 0.6 % are taken for 0.8
alike, of pairs 0.6 alike 2e-6. `cluster` joins all pairs: connected components, so a chain A ~ B ~ C is one cluster though
A and C may be less alike; what each has in common with the one kept is recorded.
A worker needs about 110 bytes a document: 2 M took 0.45 GiB. Both steps take about 5 µs a document, 0.4 s at least.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graft.core.sections import Dedup
from graft.data.compiled import compiled
from graft.data.minhash import band_keys, bands_and_rows, fingerprints
from graft.data.parts import Part, Spec, make

VERSION = 2
KEPT, EXACT, NEAR = 0, 1, 2  # what a mask says of a document
CLUSTERS, KEYS, SIGNATURES = "clusters.parquet", "keys", "signatures"
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
    """What deduplicate() found. Lists are by folder."""

    masks: list[str]  # for mask_of()
    clusters: Path  # a row for each document that is dropped
    counts: list[dict[str, Any]]  # {"kept": file, "dropped": file, "exact": documents, "near": documents}, files by number
    parts: list[Part]


class FingerprintWriter:
    """KEYS, [documents, 2] uint64, and SIGNATURES, [documents, permutations] uint32, of a folder's documents; raw, little-endian.

    Both lie in files of their own to be mapped: deduplicate() reads some columns of all and all columns of some.
    """

    def __init__(self, folder: Path, dedup: Dedup):
        self.dedup, self.equal = dedup, dedup.model_copy(update={"near": 1.0})
        self.keys, self.signatures = (folder / KEYS).open("wb"), (folder / SIGNATURES).open("wb")

    def __enter__(self) -> FingerprintWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.keys.close()
        self.signatures.close()

    def add(self, texts: Sequence[str], alike: Sequence[str] | None = None) -> None:
        """alike: what near ones are told by, where it is not `texts`."""
        keys, signed = fingerprints(texts, self.dedup if alike is None else self.equal)
        self.keys.write(keys.data)
        self.signatures.write((signed if alike is None else fingerprints(alike, self.dedup)[1]).data)


def deduplicate(folders: Sequence[Path], rows: Sequence[int], store: Path, dedup: Dedup) -> Result:
    """Find the duplicates among the documents whose fingerprints lie in `folders`, so many `rows` in each.

    Each folder must be named by what decides its content, as parts are. Runs inside a Ray cluster.
    """
    common = {"folders": list(map(str, folders)), "rows": list(rows), "near": dedup.near, "permutations": dedup.permutations}
    bands = bands_and_rows(dedup.permutations, dedup.near)[0] if dedup.near < 1 else 0
    some = [[start, min(start + _BANDS, bands)] for start in range(0, bands, _BANDS)]
    equal, *near = found = make(find, VERSION, [{**common, "bands": numbers} for numbers in [None, *some]], store)
    (clusters,) = make(cluster, VERSION, [{**common, "equal": str(equal.path), "pairs": [str(part.path) for part in near]}], store)
    return Result(clusters.report["masks"], clusters.path / CLUSTERS, clusters.report["counts"], [*found, clusters])


def mask_of(packed: str) -> np.ndarray:
    """[rows] uint8: KEPT, EXACT or NEAR."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)


def packed(mask: np.ndarray) -> str:
    """A mask as a specification holds it, for mask_of()."""
    return base64.b64encode(zlib.compress(mask.tobytes(), 6)).decode()


# ---- parts ------------------------------------------------------------------------------------------------------------
def find(spec: Spec, folder: Path) -> dict[str, Any]:
    """first.npy of all keys, or, where the specification names bands, pairs.npy of them."""
    return find_near(spec, folder) if spec["bands"] else find_equal(spec, folder)


def find_equal(spec: Spec, folder: Path) -> dict[str, Any]:
    """first.npy [documents] int64: the first document with the same key."""
    keys = np.concatenate([np.empty((0, 2), np.uint64), *(np.fromfile(f"{path}/{KEYS}", np.uint64).reshape(-1, 2) for path in spec["folders"])])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equal ones leads
    keys = keys[order]
    leads = np.ones(len(keys), bool)
    leads[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[leads][np.cumsum(leads) - 1]
    np.save(folder / "first.npy", first)
    return {}


def find_near(spec: Spec, folder: Path) -> dict[str, Any]:
    """pairs.npy [pairs, 2] int64: documents of one key of a band whose signatures agree, the earlier one first. bands: [first, end)."""
    signatures, width = _Signatures(spec), spec["permutations"]
    least = math.ceil(spec["near"] * width - 1e-9)
    state = np.empty((_MOST, width), np.uint32), np.empty(_MOST, np.int64), np.zeros(1, np.uint64), np.zeros(1, np.int64)
    pairs, candidates = [np.empty((0, 2), np.int64)], 0
    for of_band in signatures.band_keys(range(*spec["bands"]), spec["near"]):
        documents, keys = _sharing(of_band)
        candidates += len(documents)
        state[2][:], state[3][:] = 0, 0
        for start in range(0, len(documents), _AT_ONCE):
            some = documents[start : start + _AT_ONCE]
            pairs.append(_confirm(some, keys[start : start + _AT_ONCE], signatures.of(some), least, *state))
    np.save(folder / "pairs.npy", np.unique(np.concatenate(pairs), axis=0))
    return {"candidates": candidates, "pairs": sum(map(len, pairs))}


def _sharing(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents that share their key with another, their keys), by key, then number."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    shared = np.zeros(len(keys), bool)
    shared[1:] = same
    shared[:-1] |= same
    return order[shared], keys[shared]


def cluster(spec: Spec, folder: Path) -> dict[str, Any]:
    """CLUSTERS of all pairs; returns the masks by file, packed, and the counts by pair of files."""
    first = np.load(f"{spec['equal']}/first.npy")
    parents = first.copy()
    for path in spec["pairs"]:
        _join(parents, np.load(f"{path}/pairs.npy"))
    _flatten(parents)
    numbers = np.arange(len(first))
    kinds = np.where(parents == numbers, KEPT, np.where(first == numbers, NEAR, EXACT)).astype(np.uint8)
    ends = np.cumsum([0, *spec["rows"]])
    masks = [kinds[start:end] for start, end in pairwise(ends.tolist())]
    signatures = _Signatures(spec) if spec["pairs"] else None
    dropped = np.flatnonzero(kinds)
    counts = Counter[int]()
    with pq.ParquetWriter(folder / CLUSTERS, _SCHEMA, compression="zstd") as out:
        for start in range(0, len(dropped), _AT_ONCE):
            documents = dropped[start : start + _AT_ONCE]
            rows, codes = _rows(documents, parents[documents], kinds[documents], ends, signatures)
            out.write_table(rows)
            counts.update(dict(zip(*map(np.ndarray.tolist, np.unique(codes, return_counts=True)), strict=True)))
    return {"masks": list(map(packed, masks)), "counts": _by_pair(counts, len(masks))}


# ---- what they share --------------------------------------------------------------------------------------------------
class _Signatures:
    """The signatures of all documents, in files that are mapped a block at a time: however large a file is, little of it is resident."""

    def __init__(self, spec: Spec):
        self.width = spec["permutations"]
        self.blocks = [
            (f"{path}/{SIGNATURES}", first, min(_AT_ONCE, rows - first))
            for path, rows in zip(spec["folders"], spec["rows"], strict=True)
            for first in range(0, rows, _AT_ONCE)
        ]
        self.ends = np.cumsum([0, *(rows for _, _, rows in self.blocks)])

    def _block(self, number: int) -> np.ndarray:
        path, first, rows = self.blocks[number]
        return np.asarray(np.memmap(path, np.uint32, "r", offset=4 * self.width * first, shape=(rows, self.width)))

    def band_keys(self, bands: range, threshold: float) -> np.ndarray:
        """[len(bands), documents] uint64."""
        out = np.empty((len(bands), self.ends[-1]), np.uint64)
        for number, (start, end) in enumerate(pairwise(self.ends.tolist())):
            out[:, start:end] = band_keys(self._block(number), threshold, bands)
        return out

    def of(self, documents: np.ndarray) -> np.ndarray:
        """[documents, permutations] uint32."""
        blocks = np.searchsorted(self.ends, documents, "right") - 1
        order = np.argsort(blocks, kind="stable")
        out = np.empty((len(documents), self.width), np.uint32)
        for here in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1) if len(documents) else ():
            block = blocks[here[0]]
            out[here] = self._block(block)[documents[here] - self.ends[block]]
        return out


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
