"""How fast corpora become shards: each step against what people use for it, side by side in one run.

    python benchmarks/data.py                             (about 25 minutes on two cores)
    python benchmarks/data.py --only packing loader

Both sides read the same files with as many processes or threads; imports are not timed. Best of --repeat, interleaved.
`chats` starts from a Ray cluster without workers, `texts` and `dedup` from loaded ones, as a bare call is. Ids and masks of
all rows must be equal, and bins as many: else the run exits with 1. Nothing is asserted of speed. Inputs are made here:
Python's docstrings, the grammar's Chinese, and words and characters drawn at random. Prints a Markdown table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_peers import CORES, FILES, PERMUTATIONS, SEQ_LEN, SIMILAR, make_documents, make_inputs, make_shard, peer, read_texts, rows_of, timed

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tokenizers", "transformers", "datasets", "trl", "datasketch", "fastokens", "ray", "pyarrow", "numpy", "numba", "torch")


class Line(NamedTuple):
    """A line of the table: the same work in seconds, `amount` of `unit`."""

    what: str
    against: str
    goal: str
    amount: float
    unit: str
    graft_s: float
    against_s: float
    equal: bool
    note: str

    def __str__(self) -> str:
        sides = [f"{s:.3g} s, {self.amount / s:,.3g} {self.unit}/s" for s in (self.graft_s, self.against_s)]
        said = self.note if self.equal else f"NOT EQUAL; {self.note}"
        return f"| {self.what} | {sides[0]} | {self.against}: {sides[1]} | {self.against_s / self.graft_s:,.2f} | {self.goal} | {said} |"


# ---- the sharding stage -----------------------------------------------------------------------------------------------
@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster without workers; its folder has a short name, sockets' paths have a limit."""
    import ray.data  # noqa: F401  before the clock runs

    from graft.data.cluster import ray_cluster

    with (
        tempfile.TemporaryDirectory(prefix="graft-", ignore_cleanup_errors=True) as own,
        ray_cluster(temp_dir=f"{own}/ray", include_dashboard=False),
    ):
        yield


def shard(folder: Path, name: str, tokenizer: str = "tokenizer", work: Any = None) -> tuple[list[Any], float]:
    """(parts, seconds) of the whole stage, in the running cluster."""
    from graft.data import parts
    from graft.data.shard import shard_documents

    common = {"source": [str(folder / tokenizer), None, "tokenizer"], "tokenizer": tokenizer, "seq_len": SEQ_LEN, "bins_per_shard": 4096}
    common |= {"pack": True, "pad": 0, "held_out": 0.0}
    specs = []
    for path in sorted(folder.glob(f"{name}-*.parquet")):
        file = {"path": str(path), "digest": "", "bytes": path.stat().st_size, "name": name, "split": None, "weight": 1.0}
        specs.append({**common, "files": [{**file, "kind": "chat" if name == "chats" else "text"}]})
    return timed(lambda: parts.make(work or shard_documents, 1, specs, Path(tempfile.mkdtemp(dir=folder))))


def shard_by_tokenizers(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The stage with `tokenizers` alone. Engines are kept by tokenizer: this one's is its own copy."""
    from unittest.mock import patch

    from graft.data import encoding
    from graft.data.shard import shard_documents

    with patch.object(encoding, "WORTH", sys.maxsize):
        return shard_documents(spec, folder)


def rows_of_parts(done: list[Any]) -> tuple[Counter[bytes], int]:
    """(rows, bins) of all shards."""
    from graft.core.shards import ShardSet, write_index

    rows, count = Counter[bytes](), 0
    for part in done:
        write_index(part.path / "train", seq_len=SEQ_LEN, pad_id=0, tokenizer="", shards=part.report["train"])
        shards = ShardSet.open(part.path / "train")
        bins = [shards.bin(i) for i in range(len(shards))]
        used = [(b, int(b.doc_lens.sum())) for b in bins]
        rows += rows_of(*(np.concatenate(c) for c in zip(*((b.input_ids[:n], b.loss_mask[:n], b.doc_lens) for b, n in used), strict=True)))
        count += len(bins)
    return rows, count


def chats_row(folder: Path, args: argparse.Namespace) -> Iterator[Line]:
    from datasets import load_from_disk

    with cluster():
        done, graft_s = shard(folder, "chats")
    their = peer("trl", folder)
    packed = load_from_disk(folder / "packed").data.table.combine_chunks()
    wanted = rows_of(*(packed[c].chunks[0].flatten().to_numpy() for c in ("input_ids", "assistant_masks", "seq_lengths")))
    found, bins = rows_of_parts(done)
    note = f"{wanted.total():,} equal rows; {bins:,} bins, theirs {len(packed):,}"
    amount = wanted.total() / 1000
    yield Line("chat rows to packed shards", "datasets.map + TRL", "≥ 3", amount, "k rows", graft_s, their["seconds"], found == wanted, note)


def texts_row(folder: Path, args: argparse.Namespace) -> Iterator[Line]:
    with cluster():
        shard(folder, "chats")  # workers start and load their engines; other text, for engines remember words
        done, graft_s = shard(folder, "texts")
        shard(folder, "chats", "tokenizer-2", shard_by_tokenizers)
        slow, slow_s = shard(folder, "texts", "tokenizer-2", shard_by_tokenizers)
    their = peer("bare", folder, threads=CORES)
    bare = np.load(folder / "bare.npz")
    wanted = rows_of(bare["ids"], np.ones(len(bare["ids"])), bare["lengths"])
    size = sum(len(text.encode()) for text in read_texts(folder, "texts")) / 1e6
    note = f"read, tokenized, packed, written; {wanted.total():,} equal rows"
    bare_s, equal = their["seconds"], rows_of_parts(done)[0] == wanted
    yield Line("texts to packed shards", "bare encode_batch", "≥ 0.95", size, "MB", graft_s, bare_s, equal, note)
    equal = rows_of_parts(slow)[0] == wanted
    yield Line("texts to packed shards, tokenizers' engine", "bare encode_batch", "≥ 0.95", size, "MB", slow_s, bare_s, equal, note)
    one = peer("tokenize", folder, threads=1)
    note = "one thread, ids equal"
    yield Line("tokenizing alone", "bare encode_batch", "≥ 2", size, "MB", one["graft_s"], one["bare_s"], one["equal"], note)


# ---- packing ----------------------------------------------------------------------------------------------------------
def packing_row(folder: Path, args: argparse.Namespace) -> Iterator[Line]:
    from trl.data_utils import _pack_bfd

    from graft.data.pack import fill, pack

    pack(np.array([1]), 2)  # compiles
    lengths = np.random.default_rng(0).lognormal(5.3, 0.9, args.pack).astype(np.int64).clip(1, SEQ_LEN)
    ids = np.zeros(lengths.sum(), np.uint8)  # theirs packs columns of tokens: a small one
    table = pa.table({"ids": pa.LargeListArray.from_arrays(np.cumsum([0, *lengths]), ids)})
    ours, graft_s = timed(lambda: pack(lengths, SEQ_LEN))
    theirs, against_s = timed(lambda: _pack_bfd(table, SEQ_LEN))
    bins, note = ours.ends.size - 1, f"{ours.ends.size - 1:,} and {len(theirs):,} bins; theirs moves a byte a token too"
    yield Line("packing", "TRL bfd", "≥ 100", len(lengths) / 1e6, "M documents", graft_s, against_s, bins == len(theirs), note)

    lengths = lengths[: len(lengths) // 5]
    ends = np.cumsum([0, *lengths])
    ids, mask = np.arange(ends[-1], dtype=np.int32), np.ones(ends[-1], np.uint8)
    table = pa.table({"ids": pa.LargeListArray.from_arrays(ends, ids), "mask": pa.LargeListArray.from_arrays(ends, mask)})
    fill(ids, mask, ends[:1], lengths[:1], pack(lengths[:1], SEQ_LEN), SEQ_LEN, 0)  # compiles
    (filled, _), graft_s = timed(lambda: fill(ids, mask, ends[:-1], lengths, pack(lengths, SEQ_LEN), SEQ_LEN, 0))
    theirs, against_s = timed(lambda: _pack_bfd(table, SEQ_LEN))
    note = "a fifth of the documents; int32 ids and a byte of mask a token"
    yield Line("packing and filling bins", "TRL bfd", "", ids.size / 1e6, "M tokens", graft_s, against_s, len(filled) == len(theirs), note)


# ---- near-duplicates --------------------------------------------------------------------------------------------------
def fingerprint(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A part: the fingerprints that dedup reads, as `prepare` writes them."""
    from graft.core.sections import Dedup
    from graft.data.dedup import FingerprintWriter

    with pq.ParquetFile(spec["file"]) as file, FingerprintWriter(folder, Dedup(near=SIMILAR, permutations=PERMUTATIONS)) as writer:
        for batch in file.iter_batches(1000):
            writer.add(batch["text"].to_pylist())
        return {"rows": file.metadata.num_rows}


def dedup_row(folder: Path, args: argparse.Namespace) -> Iterator[Line]:
    from graft.core.sections import Dedup
    from graft.data import parts
    from graft.data.dedup import deduplicate, mask_of

    copies = make_documents(folder, args.dedup)
    specs = [{"file": str(folder / f"near-{n}.parquet")} for n in range(FILES)]

    def run(specs: list[dict[str, Any]]) -> Any:
        store = Path(tempfile.mkdtemp(dir=folder))
        made = parts.make(fingerprint, 1, specs, store)
        return deduplicate(
            [part.path for part in made], [part.report["rows"] for part in made], store, Dedup(near=SIMILAR, permutations=PERMUTATIONS)
        )

    with cluster():
        run(specs[:CORES])  # all workers start: in a pipeline they have just read the documents
        found, graft_s = timed(lambda: run(specs))
    dropped = np.concatenate([mask_of(mask) for mask in found.masks]) > 0
    (folder / "some").write_text(str(min(args.datasketch, args.dedup)))

    def said(drop: np.ndarray) -> str:
        planted = copies[: len(drop)]
        return f"{(drop & planted).sum() / planted.sum():.2%} of the planted found, {(drop & ~planted).sum()} others"

    for name, what, goal in (("datasketch", "update_batch, one process", "≥ 20"), ("datasketch-bulk", f"bulk, {CORES} processes", "")):
        their = peer(name, folder)
        some = np.zeros(their["documents"], bool)
        some[their["dropped"]] = True
        against_s = their["seconds"] * len(copies) / len(some)
        note = f"{said(dropped)}; theirs {said(some)}, on {len(some):,} in {their['seconds']:.1f} s, scaled"
        yield Line(f"near-dedup, {what}", "datasketch", goal, len(copies) / 1000, "k documents", graft_s, against_s, True, note)


# ---- loader -----------------------------------------------------------------------------------------------------------
def loader_row(folder: Path, args: argparse.Namespace) -> Iterator[Line]:
    import torch
    from datasets import Dataset

    from graft.core.shards import ShardSet

    home = folder / "shards"
    make_shard(home)
    shards = ShardSet.open(home)
    rows = Dataset.from_file(str(home / "0.arrow")).select_columns(["input_ids", "loss_mask"])
    tensors = rows.with_format("torch")
    drawn = np.random.default_rng(5).integers(0, len(shards), 20_000).tolist()
    for i in drawn:
        shards.bin(i).input_ids.sum()  # every page is in memory, for both

    def ours(i: int) -> tuple[Any, Any]:
        found = shards.bin(i)
        return torch.from_numpy(found.input_ids.copy()), torch.from_numpy(found.loss_mask.copy())

    def by_torch(i: int) -> tuple[Any, Any]:
        row = tensors[i]
        return row["input_ids"], row["loss_mask"]

    def by_default(i: int) -> tuple[Any, Any]:
        row = rows[i]
        return torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])

    def rate(load: Callable[[int], Any], count: int) -> float:
        """Seconds a bin."""
        return timed(lambda: [load(i) and None for i in drawn[:count]])[1] / count

    graft_s = min(rate(ours, len(drawn)) for _ in range(3)) * len(drawn)
    for name, load, count in (('with_format("torch")[i]', by_torch, 2000), ("dataset[i], torch.tensor", by_default, 500)):
        against_s = min(rate(load, count) for _ in range(3)) * len(drawn)
        equal = all(torch.equal(a.long(), b.long()) for i in drawn[:100] for a, b in zip(ours(i), load(i), strict=True))
        note = f"a bin {SEQ_LEN} tokens of 5 bytes; theirs on {count:,} bins, scaled"
        yield Line(f"loader, random bins, {name}", "datasets", "≥ 5, ≥ 1 GB/s", len(drawn) * SEQ_LEN * 5 / 1e9, "GB", graft_s, against_s, equal, note)


# row: its lines, and the package that it needs
ROWS = {
    "chats": (chats_row, "trl"),
    "texts": (texts_row, "trl"),
    "packing": (packing_row, "trl"),
    "dedup": (dedup_row, "datasketch"),
    "loader": (loader_row, "datasets"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--chats", type=int, default=300, help="megabytes of chats; a cluster's start takes 10 s of the stage, whatever follows")
    parser.add_argument("--texts", type=int, default=80, help="megabytes of texts; from 20 on, all workers load the faster engine")
    parser.add_argument("--pack", type=int, default=1_000_000, help="documents to pack")
    parser.add_argument("--dedup", type=int, default=200_000, help="documents to deduplicate")
    parser.add_argument("--datasketch", type=int, default=20_000, help="of them for datasketch")
    parser.add_argument("--out", type=Path, default=Path("data.json"))
    args = parser.parse_args()
    lacking = {row: peer for row in args.only if find_spec(peer := ROWS[row][1]) is None}
    best: dict[str, Line] = {}
    with tempfile.TemporaryDirectory(prefix="graft-") as folder:
        os.environ.update(HOME=folder, RAY_worker_niceness="0")  # one home for all clusters; the peers are not nice to others either
        if {"chats", "texts"} & set(args.only) - set(lacking):
            make_inputs(Path(folder), args.chats * 10**6 if "chats" in args.only else 10**7, args.texts * 10**6 if "texts" in args.only else 0)
        for _ in range(args.repeat):
            for row in (row for row in args.only if row not in lacking):
                for line in ROWS[row][0](Path(folder), args):
                    print(line, file=sys.stderr, flush=True)
                    before = best.get(line.what, line)
                    graft_s, against_s = min(line.graft_s, before.graft_s), min(line.against_s, before.against_s)
                    best[line.what] = line._replace(graft_s=graft_s, against_s=against_s, equal=line.equal and before.equal)
    table = ["| what | graft | against | ratio | goal | |", f"|{'---|' * 6}", *map(str, best.values())]
    print("\n".join(table + [f"| {row} | needs `pip install {peer}` |||||" for row, peer in lacking.items()]))
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES if find_spec(name)}}
    print("\n" + ", ".join(f"{k} {v}" for k, v in versions.items()) + f"; commit {commit}; {CORES} cores; best of {args.repeat}")
    about = {"commit": commit, "cores": CORES, "repeat": args.repeat, "versions": versions}
    args.out.write_text(json.dumps({**about, "lines": [line._asdict() for line in best.values()]}, indent=1), encoding="utf-8")
    sys.exit(not all(line.equal for line in best.values()))


if __name__ == "__main__":
    main()
