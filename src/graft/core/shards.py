"""Shards: token bins in Arrow IPC *stream* files, memory-mapped without a copy, refused by name when not whole.

One row is one bin of exactly `seq_len` tokens: `input_ids` fixed_size_list<int32>, `loss_mask` fixed_size_list<uint8>,
`doc_lens` list<int32> and `sources` list<string>, one entry a packed document. sum(doc_lens) tokens are used; the tail
behind them is padding. A folder of shards has an `index.json`. (The IPC *file* format does not open in
`datasets.Dataset.from_file`, the stream format does.)

Random bins of 4k tokens: about 5 GB/s. `verify` hashes every shard once, 1 to 1.5 s a GB.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from graft.core.artifact import sha256_file
from graft.core.errors import ArtifactError, DataError

FORMAT = 1
INDEX = "index.json"
_TOKENS_A_BATCH = 1 << 22  # a record batch holds at most 20 MiB, which bounds the writer's memory


class Bin(NamedTuple):
    """One bin. `sources` is filled by the writer; the reader leaves it to `ShardSet.sources`."""

    input_ids: np.ndarray  # [seq_len] int32
    loss_mask: np.ndarray  # [seq_len] uint8, 1 where the token is supervised
    doc_lens: np.ndarray  # [documents] int32
    sources: Sequence[str] = ()


def schema(seq_len: int) -> pa.Schema:
    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32(), seq_len)),
            ("loss_mask", pa.list_(pa.uint8(), seq_len)),
            ("doc_lens", pa.list_(pa.int32())),
            ("sources", pa.list_(pa.string())),
        ]
    )


def write_shard(path: Path, bins: Iterable[Bin], seq_len: int) -> dict[str, Any]:
    """Write one shard and return its entry of the index: file, bins, sha256, bytes. The same bins give the same bytes.

    Raises DataError for a bin that is not `seq_len` long or whose doc_lens do not fit it.
    """
    bins, count = iter(bins), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema(seq_len)) as writer:
        while group := list(islice(bins, max(1, _TOKENS_A_BATCH // seq_len))):
            for b in group:
                if len(b.input_ids) != seq_len or len(b.loss_mask) != seq_len or b.doc_lens.sum() > seq_len or len(b.sources) != len(b.doc_lens):
                    raise DataError(
                        f"{path.name}: a bin of {len(b.input_ids)} tokens, doc_lens {b.doc_lens.tolist()}: expected {seq_len} tokens and a source a document"
                    )
            ids = np.concatenate([b.input_ids for b in group]).astype(np.int32, copy=False)
            mask = np.concatenate([b.loss_mask for b in group]).astype(np.uint8, copy=False)
            ends = np.cumsum([0, *(len(b.doc_lens) for b in group)], dtype=np.int32)
            lens = np.concatenate([b.doc_lens for b in group]).astype(np.int32, copy=False)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(ids), seq_len),
                pa.FixedSizeListArray.from_arrays(pa.array(mask), seq_len),
                pa.ListArray.from_arrays(pa.array(ends), pa.array(lens)),
                pa.ListArray.from_arrays(pa.array(ends), pa.array([s for b in group for s in b.sources], pa.string())),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema(seq_len)))
            count += len(group)
    return {"file": path.name, "bins": count, "sha256": sha256_file(path), "bytes": path.stat().st_size}


def write_index(
    folder: Path, *, seq_len: int, pad_id: int, tokenizer: str, shards: list[dict[str, Any]], documents: int, tokens: int, supervised_tokens: int
) -> dict[str, Any]:
    """Write `index.json` and return it.

    tokenizer: digest of the tokenizer and its chat template; documents: packed ones, a split text counts once a piece;
    supervised_tokens: what the loss counts, that is mask 1 and not the first token of its document.
    """
    bins = sum(s["bins"] for s in shards)
    index = {
        "format": FORMAT,
        "seq_len": seq_len,
        "pad_id": pad_id,
        "tokenizer": tokenizer,
        "shards": shards,
        "bins": bins,
        "documents": documents,
        "tokens": tokens,
        "supervised_tokens": supervised_tokens,
        "utilisation": round(tokens / (bins * seq_len), 6) if bins else 0.0,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return index


class ShardSet:
    """All bins of a folder under one index, in the order of `index.json`."""

    def __init__(self, index: dict[str, Any], batches: list[pa.RecordBatch]):
        self.index, self._batches = index, batches
        self._starts = np.cumsum([0, *(b.num_rows for b in batches)]).tolist()
        length = index["seq_len"]
        self._ids = [b.column(0).flatten().to_numpy(zero_copy_only=True).reshape(-1, length) for b in batches]
        self._mask = [b.column(1).flatten().to_numpy(zero_copy_only=True).reshape(-1, length) for b in batches]
        self._ends = [b.column(2).offsets.to_numpy(zero_copy_only=True) for b in batches]
        self._lens = [b.column(2).values.to_numpy(zero_copy_only=True) for b in batches]

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
            batches = [b for entry in index["shards"] for b in _map(folder / entry["file"], entry, index["seq_len"], verify, mend)]
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
        return Bin(self._ids[k][row], self._mask[k][row], self._lens[k][ends[row] : ends[row + 1]])

    def sources(self, i: int) -> list[str]:
        """Where each document of bin `i` comes from."""
        k, row = self._find(i)
        return self._batches[k].column(3)[row].as_py()

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"bin {i} of {len(self)}")
        k = bisect_right(self._starts, i) - 1
        return k, i - self._starts[k]


def _map(path: Path, entry: dict[str, Any], seq_len: int, verify: bool, mend: str) -> list[pa.RecordBatch]:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(f"{path} has {size} bytes, the index says {entry['bytes']}: it is truncated or altered; {mend}")
    if verify and sha256_file(path) != entry["sha256"]:
        raise ArtifactError(f"{path} was altered: its SHA-256 is not the index's; {mend}")
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            batches = list(reader) if reader.schema.equals(schema(seq_len)) else None
    except (pa.ArrowInvalid, OSError) as e:
        raise ArtifactError(f"{path} is no Arrow stream ({str(e).splitlines()[0]}): {mend}") from None
    if batches is None or sum(b.num_rows for b in batches) != entry["bins"]:
        raise ArtifactError(f"{path} does not hold {entry['bins']} bins of {seq_len} tokens: {mend}")
    return batches
