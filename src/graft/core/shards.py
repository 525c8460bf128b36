"""Shards: token bins in Arrow IPC *stream* files, memory-mapped without a copy, refused by name when not whole.

One row is one bin of exactly `seq_len` tokens: `input_ids` fixed_size_list<int32> and `loss_mask` fixed_size_list<uint8>;
`doc_lens`, `sources` (list<int32>, a place in the shard's own list of names) and `rows` (list<int64>, the document's
number in that source) have one entry a packed document; `cost` is the bin's attention cost, the sum of its squared
doc_lens. sum(doc_lens) tokens are used; the tail behind them is padding. A folder of shards has an `index.json`. (The IPC
*file* format does not open in `datasets.Dataset.from_file`, the stream format does, but for dictionaries.)

Image rows are another kind of shard, told by "images" in the index: one document a bin, never packed, and two more columns.
`images` (list<string>) names the row's images in the order they are shown, as files `images/<sha256>.<jpg|png|…>` of the
artifact that holds the shards' folder; `grids` (list<int32>, three for each image) is each one's grid of patches t, h, w, as
the base's image processor resizes it. Each image stands in input_ids as t h w / merge² placeholder tokens, already expanded,
none of them supervised. A trainer cuts the padding behind the longest row of a micro-batch to a multiple of BUCKET tokens,
and decodes beside its steps. A row without images, in such a shard, is one of text.

Written at 0.8 GB/s, half of it SHA-256. Random bins of 4k tokens, copied out of the map: 3.5 GB/s on one core. `verify` hashes every shard once, 1 to
1.5 s a GB.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from graft.core.artifact import sha256_file
from graft.core.errors import ArtifactError, DataError

FORMAT = 2
BUCKET = 64  # tokens
INDEX = "index.json"
_TOKENS_A_BATCH = 1 << 22  # a record batch holds at most 20 MiB of tokens


class Image(NamedTuple):
    """An image of a row, by reference."""

    file: str  # <sha256>.<suffix>
    grid: tuple[int, int, int]  # t, h, w, in patches


class Bin(NamedTuple):
    """One bin."""

    input_ids: np.ndarray  # [seq_len] int32
    loss_mask: np.ndarray  # [seq_len] uint8, 1 where the token is supervised
    doc_lens: np.ndarray  # [documents] int32
    images: tuple[Image, ...] = ()

    @property
    def targets(self) -> int:
        """Supervised tokens but those that begin a document, which nothing predicts."""
        return int(self.loss_mask.sum(dtype=np.int64) - self.loss_mask[np.cumsum(self.doc_lens) - self.doc_lens].sum(dtype=np.int64))


class Columns(NamedTuple):
    """Many bins, as the writer takes them; bin b holds the documents ends[b] .. ends[b + 1] - 1."""

    input_ids: np.ndarray  # [bins, seq_len] int32
    loss_mask: np.ndarray  # [bins, seq_len] uint8
    doc_lens: np.ndarray  # [documents], tokens
    ends: np.ndarray  # [bins + 1]
    sources: np.ndarray  # [documents], a place in the list of names
    rows: np.ndarray  # [documents], the document's number in its source
    images: Sequence[Sequence[Image]] | None = None  # of each bin; None: a shard of text


def schema(seq_len: int, images: bool = False) -> pa.Schema:
    fields = [
        ("input_ids", pa.list_(pa.int32(), seq_len)),
        ("loss_mask", pa.list_(pa.uint8(), seq_len)),
        ("doc_lens", pa.list_(pa.int32())),
        ("sources", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.int64())),
        ("cost", pa.int64()),
    ]
    return pa.schema([*fields, *([("images", pa.list_(pa.string())), ("grids", pa.list_(pa.int32()))] if images else [])])


def write_shard(path: Path, bins: Columns, names: Sequence[str]) -> dict[str, Any]:
    """Write one shard and return its entry of the index. The same bins give the same bytes.

    names: of the sources. The entry: file, bins, documents, tokens, supervised_tokens (mask 1 and not the first of its
    document, which nothing predicts), cost, sources (name, documents and tokens of each), sha256, bytes; of image rows images.
    Raises DataError where the columns do not fit each other.
    """
    seq_len = bins.input_ids.shape[1]
    lens, ends = bins.doc_lens.astype(np.int64), bins.ends.astype(np.int64)
    if wrong := _wrong(bins, lens, ends, len(names)):
        raise DataError(f"{path.name}: {wrong}")
    cost = _sums(lens**2, ends)
    offsets = pa.array(ends, pa.int32())
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(bins.input_ids.reshape(-1), pa.int32()), seq_len),
        pa.FixedSizeListArray.from_arrays(pa.array(bins.loss_mask.reshape(-1), pa.uint8()), seq_len),
        pa.ListArray.from_arrays(offsets, pa.array(lens, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(bins.sources, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(bins.rows, pa.int64())),
        pa.array(cost, pa.int64()),
    ]
    if bins.images is not None:
        columns.append(pa.array([[image.file for image in row] for row in bins.images], pa.list_(pa.string())))
        columns.append(pa.array([[n for image in row for n in image.grid] for row in bins.images], pa.list_(pa.int32())))
    of_images = bins.images is not None
    batch, size = pa.RecordBatch.from_arrays(columns, schema=schema(seq_len, of_images)), max(1, _TOKENS_A_BATCH // seq_len)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        for start in range(0, len(cost), size):
            writer.write_batch(batch.slice(start, size))
    begins = np.cumsum(lens) - lens  # of each document in its shard, then in its row of [bins, seq_len]
    firsts = begins + np.repeat(np.arange(len(cost)) * seq_len - begins[ends[:-1]], np.diff(ends))
    by_source = [np.bincount(bins.sources, weights, len(names)).astype(np.int64).tolist() for weights in (None, lens)]
    return {
        "file": path.name,
        "bins": len(cost),
        "documents": len(lens),
        "tokens": int(lens.sum()),
        "supervised_tokens": int(bins.loss_mask.sum(dtype=np.int64) - bins.loss_mask.reshape(-1)[firsts].sum(dtype=np.int64)),
        "cost": int(cost.sum()),
        **({} if bins.images is None else {"images": sum(map(len, bins.images))}),
        "sources": [{"name": n, "documents": d, "tokens": t} for n, d, t in zip(names, *by_source, strict=True)],
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
    }


def _wrong(bins: Columns, lens: np.ndarray, ends: np.ndarray, names: int) -> str | None:
    """What is wrong with the columns, None where they can be written."""
    count, seq_len = bins.input_ids.shape
    if bins.loss_mask.shape != (count, seq_len) or len(ends) != count + 1:
        return f"input_ids {bins.input_ids.shape}, loss_mask {bins.loss_mask.shape} and {len(ends)} ends are not of the same bins"
    if not len(lens) == len(bins.sources) == len(bins.rows) == ends[-1] or ends[0] or (np.diff(ends) < 1).any():
        return f"{len(lens)} doc_lens, {len(bins.sources)} sources, {len(bins.rows)} rows: expected one a document, and a document a bin"
    used = _sums(lens, ends)
    unfit = (used > seq_len) | (np.minimum.reduceat(lens, ends[:-1]) < 1) if count else used > seq_len
    if unfit.any():
        bad = int(np.argmax(unfit))
        return f"doc_lens {lens[ends[bad] : ends[bad + 1]].tolist()} of bin {bad}: expected 1 or more each, {seq_len} at most in all"
    if (bins.loss_mask > (np.arange(seq_len) < used[:, None])).any():
        return "loss_mask is neither 0 nor 1, or supervises padding"
    if bins.images is not None and (len(bins.images) != count or (np.diff(ends) != 1).any()):
        return f"{len(bins.images)} lists of images and {len(lens)} documents of {count} bins: image rows are one a bin"
    if len(lens) and not 0 <= bins.sources.min() <= bins.sources.max() < names:
        return f"a source is not among the {names} names"
    return None


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum of `values` over each bin, int64 [bins]."""
    total = np.concatenate([[0], np.cumsum(values)])
    return total[ends[1:]] - total[ends[:-1]]


def write_index(folder: Path, *, seq_len: int, pad_id: int, tokenizer: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `index.json` over the entries that `write_shard` returned, with their sums, and return it.

    tokenizer: digest of the tokenizer and its chat template. A text that was split counts as a document once a piece.
    """
    summed = ("bins", "documents", "tokens", "supervised_tokens", "cost", *(["images"] if shards and "images" in shards[0] else []))
    total = {key: sum(s[key] for s in shards) for key in summed}
    sources: dict[str, dict[str, Any]] = {}
    for found in (source for s in shards for source in s["sources"]):
        sum_of = sources.setdefault(found["name"], {"name": found["name"], "documents": 0, "tokens": 0})
        sum_of["documents"] += found["documents"]
        sum_of["tokens"] += found["tokens"]
    index = {
        "format": FORMAT,
        "seq_len": seq_len,
        "pad_id": pad_id,
        "tokenizer": tokenizer,
        **total,
        "utilisation": round(total["tokens"] / (total["bins"] * seq_len), 6) if total["bins"] else 0.0,
        "sources": list(sources.values()),
        "shards": shards,
    }
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1), encoding="utf-8")
    return index


class ShardSet:
    """All bins of a folder under one index, in the order of `index.json`."""

    def __init__(self, index: dict[str, Any], batches: list[tuple[list[str], pa.RecordBatch]]):
        self.index, self._names = index, [names for names, _ in batches]
        self._batches = [b for _, b in batches]
        self._starts = np.cumsum([0, *(b.num_rows for b in self._batches)]).tolist()
        length = index["seq_len"]
        self._ids = [np.from_dlpack(b.column(0).flatten()).reshape(-1, length) for b in self._batches]
        self._mask = [np.from_dlpack(b.column(1).flatten()).reshape(-1, length) for b in self._batches]
        self._ends = [np.from_dlpack(b.column(2).offsets) for b in self._batches]
        self._lens = [np.from_dlpack(b.column(2).values) for b in self._batches]
        self.of_images = "images" in index

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> ShardSet:
        """Map every shard of `folder`; `verify` compares SHA-256 sums, else sizes and row counts alone.

        Raises ArtifactError that names the first file that is missing, truncated, altered or of another format.
        """
        folder = Path(folder)
        mend = "make the shards again with `graft run`"
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ArtifactError(f"{folder / INDEX} has format {index['format']}, this graft reads {FORMAT}: {mend}")
            batches = [
                ([source["name"] for source in entry["sources"]], batch)
                for entry in index["shards"]
                for batch in _map(folder / entry["file"], entry, schema(index["seq_len"], "images" in index), verify, mend)
            ]
        except FileNotFoundError as e:
            raise ArtifactError(f"{e.filename} is missing: {mend}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
            raise ArtifactError(f"{folder / INDEX} cannot be read ({e!r}): {mend}") from None
        return cls(index, batches)

    @property
    def seq_len(self) -> int:
        return self.index["seq_len"]

    def __len__(self) -> int:
        return self._starts[-1]

    def bin(self, i: int) -> Bin:
        """Bin `i` as read-only views of the mapped file; IndexError outside 0 .. len - 1."""
        k, row = self._find(i)
        ends = self._ends[k]
        return Bin(self._ids[k][row], self._mask[k][row], self._lens[k][ends[row] : ends[row + 1]], self._images(k, row))

    def _images(self, k: int, row: int) -> tuple[Image, ...]:
        if not self.of_images:
            return ()
        files, grids = (self._batches[k].column(name)[row].as_py() for name in ("images", "grids"))
        return tuple(Image(file, (t, h, w)) for file, t, h, w in zip(files, grids[::3], grids[1::3], grids[2::3], strict=True))

    def sources(self, i: int) -> list[str]:
        """Where each document of bin `i` comes from, as name/number."""
        k, row = self._find(i)
        batch, names = self._batches[k], self._names[k]
        return [f"{names[source]}/{number}" for source, number in zip(batch.column(3)[row].as_py(), batch.column(4)[row].as_py(), strict=True)]

    def costs(self) -> np.ndarray:
        """[len] int64: the attention cost of every bin, the sum of its squared document lengths."""
        return np.concatenate([np.zeros(0, np.int64), *(np.from_dlpack(b.column(5)) for b in self._batches)])

    def doc_lens(self) -> np.ndarray:
        """[documents] int32: the tokens of every document, bin after bin."""
        return np.concatenate([np.zeros(0, np.int32), *self._lens])

    def largest_id(self) -> int:
        """The largest token id, padding included; reads every bin. -1 where there is none."""
        return max((int(ids.max(initial=-1)) for ids in self._ids), default=-1)

    def used(self) -> np.ndarray:
        """[len] int64: the tokens of every bin that are no padding."""
        return np.concatenate([np.zeros(0, np.int64), *map(_sums, self._lens, self._ends)])

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"bin {i} of {len(self)}")
        k = bisect_right(self._starts, i) - 1
        return k, i - self._starts[k]


def _map(path: Path, entry: dict[str, Any], fields: pa.Schema, verify: bool, mend: str) -> list[pa.RecordBatch]:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(f"{path} has {size} bytes, the index says {entry['bytes']}: it is truncated or altered; {mend}")
    if verify and sha256_file(path) != entry["sha256"]:
        raise ArtifactError(f"{path} was altered: its SHA-256 is not the index's; {mend}")
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            batches = list(reader) if reader.schema.equals(fields) else None
    except (pa.ArrowInvalid, OSError) as e:
        raise ArtifactError(f"{path} is no Arrow stream ({str(e).splitlines()[0]}): {mend}") from None
    if batches is None or sum(b.num_rows for b in batches) != entry["bins"]:
        raise ArtifactError(f"{path} does not hold {entry['bins']} bins of {fields.field('input_ids').type.list_size} tokens: {mend}")
    return batches
