"""Stages `shard-base`, `shard-cpt`, `shard-sft`: text to token ids, loss mask, packed bins and Arrow shards, in Ray Data.

Tokenization is a map over blocks; then every partition is packed and written, as files, by the worker that holds it. The
bytes depend on (documents, seq_len, partitions) and never on the number of workers. 12,000 documents cost about 6 s once
Ray is up, half of it workers importing transformers. One partition's ids are in memory at once, 4 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import get_console

from graft.core.artifact import digest_of
from graft.core.errors import DataError
from graft.core.recipe import Shard
from graft.core.rows import Row, read_jsonl, write_jsonl
from graft.core.shards import Bin, write_index, write_shard
from graft.core.stages import Job
from graft.data.cluster import ray_cluster
from graft.data.pack import pack, split
from graft.model.chat import load_tokenizer, render

BLOCK = 2000  # documents
VALIDATION = 0.02  # share of the documents of base and cpt; prepare holds out the rows of sft
PROBES = 3
SPLITS = ("train", "validation")

Source = tuple[str, str | None, str]  # base, revision, chat template: what a worker loads the tokenizer by
WHICH = [("split", pa.string()), ("part", pa.int32()), ("index", pa.int64()), ("source", pa.string())]
ITEMS = pa.schema([*WHICH, ("text", pa.large_string())])
TOKENIZED = pa.schema([*WHICH, ("reason", pa.string()), ("ids", pa.large_list(pa.int32())), ("mask", pa.large_list(pa.uint8()))])


def run(job: Job) -> None:
    """Write train/ and validation/ (shards and index.json), rejected.jsonl, and probes.json for sft; in = kept + rejected."""
    recipe, console, chat = job.recipe, get_console(), job.stage.name == "shard-sft"
    base, revision = (str(job.parents["init"].path), None) if "init" in job.parents else job.plan.external_base()
    source = (base, revision, recipe.model.chat_template)
    tokenizer = load_tokenizer(*source)
    items = list(_rows(job) if chat else _documents(job))
    probes = _probes(tokenizer, job) if chat else []  # renders here first, so that a template that cannot work is told in one line
    train = recipe.train_stage(job.stage.name.removeprefix("shard-"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    with job.writing() as draft, ray_cluster():
        console.print(f"{job.stage.name}: {len(items)} {'rows' if chat else 'documents'}", soft_wrap=True)
        reports = _execute(items, draft.path, source, recipe.shard, chat, train.pack, pad)
        rejected = sorted((r for report in reports for r in report["rejected"]), key=lambda r: (SPLITS.index(r["split"]), r["index"]))
        write_jsonl(draft.path / "rejected.jsonl", rejected)
        counts: dict[str, Any] = {
            "in": len(items),
            "kept": len(items) - len(rejected),
            "rejected": dict(sorted(Counter(r["reason"] for r in rejected).items())),
        }
        for name in SPLITS:
            mine = sorted((r for r in reports if r["split"] == name), key=lambda r: r["part"])
            total = {key: sum(r[key] for r in mine) for key in ("documents", "tokens", "supervised_tokens")}
            shards = [s for r in mine for s in r["shards"]]
            if total["supervised_tokens"]:
                index = write_index(
                    draft.path / name, seq_len=recipe.shard.seq_len, pad_id=pad, tokenizer=tokenizer_digest(tokenizer), shards=shards, **total
                )
                counts[name] = {key: index[key] for key in ("bins", *total, "utilisation")}
            else:  # a split with nothing to learn has no folder
                shutil.rmtree(draft.path / name, ignore_errors=True)
        if "train" not in counts:
            raise DataError(
                f"{job.stage.name}: none of {len(items)} inputs can be used (rejected: {counts['rejected']}): raise shard.seq_len or add text"
            )
        if chat:
            (draft.path / "probes.json").write_text(json.dumps(probes, ensure_ascii=False, indent=1), encoding="utf-8")
        draft.counts.update(counts)
        made = [f"{n} {c['bins']} bins, {c['tokens']:,} tokens, {c['utilisation']:.2%} used" for n in SPLITS if (c := counts.get(n))]
        console.print(f"{job.stage.name}: {'; '.join(made)}; {len(rejected)} rejected", soft_wrap=True)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides token ids: the tokenizer's own JSON and the chat template."""
    return digest_of({"tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()), "chat_template": tokenizer.chat_template})


# ---- input ------------------------------------------------------------------------------------------------------------
def _documents(job: Job) -> Iterator[tuple[Any, ...]]:
    """ITEMS of the stage's corpora; a document whose text hashes into the last 2 % is held out, at least one and never all."""
    folder = job.parents["prepare"].path / "corpora"
    section = job.recipe.train_stage(job.stage.name.removeprefix("shard-"))
    found = [d for name in section.corpora for d in read_jsonl(folder / f"{name}.jsonl")]
    draws = [int.from_bytes(hashlib.sha256(d["text"].encode()).digest()[:8]) / 2**64 for d in found]
    limit = max(min(1 - VALIDATION, max(draws, default=1)), math.nextafter(min(draws, default=1), 2))
    rank = Counter[str]()
    for d, draw in zip(found, draws, strict=True):
        split_name = SPLITS[draw >= limit]
        yield _item(split_name, rank[split_name], f"{d['source']}/{d['index']}", d["text"], job.recipe.shard.partitions)
        rank[split_name] += 1


def _rows(job: Job) -> Iterator[tuple[Any, ...]]:
    for name in SPLITS:
        for i, row in enumerate(read_jsonl(job.parents["prepare"].path / "rows" / f"{name}.jsonl")):
            yield _item(name, i, row["id"], json.dumps(row["messages"], ensure_ascii=False), job.recipe.shard.partitions)


def _item(split_name: str, index: int, source: str, text: str, partitions: int) -> tuple[Any, ...]:
    return split_name, index % partitions if split_name == "train" else 0, index, source, text


def _probes(tokenizer: Any, job: Job) -> list[Row]:
    """Conversations of the training rows with the ids and mask they render to: the first of each label, then the next."""
    rows = list(read_jsonl(job.parents["prepare"].path / "rows" / "train.jsonl"))
    firsts = list({row["label"]: row for row in reversed(rows)}.values())[::-1]
    chosen = [*firsts, *(r for r in rows if r not in firsts)][:PROBES]
    rendered = [(r["messages"], render(tokenizer, r["messages"])) for r in chosen]
    return [{"messages": m, "ids": r.ids, "loss_mask": r.loss_mask} for m, r in rendered]


# ---- the Ray Data execution ---------------------------------------------------------------------------------------------
def _execute(items: list[tuple[Any, ...]], folder: Path, source: Source, shard: Shard, chat: bool, packed: bool, pad: int) -> list[dict[str, Any]]:
    """One report a partition: split, part, shards, documents, tokens, supervised_tokens, rejected."""
    import ray

    if not items:
        return []
    for name in SPLITS:
        (folder / name).mkdir()
    feed = iter(items)
    blocks = []
    while block := list(islice(feed, BLOCK)):
        blocks.append(pa.table(dict(zip(ITEMS.names, zip(*block, strict=True), strict=True)), schema=ITEMS))
    tokenized = ray.data.from_arrow(blocks).map_batches(
        partial(tokenize_batch, source=source, chat=chat, seq_len=shard.seq_len), batch_format="pyarrow", batch_size=None
    )
    written = tokenized.groupby(["split", "part"]).map_groups(
        partial(write_partition, folder=folder, shard=shard, packed=packed, pad=pad), batch_format="pyarrow"
    )
    return [json.loads(row["report"]) for row in written.iter_rows()]


@cache
def _tokenizer(source: Source) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray's workers are the parallelism
    return load_tokenizer(*source)


def tokenize_batch(batch: pa.Table, source: Source, chat: bool, seq_len: int) -> pa.Table:
    """ITEMS to TOKENIZED. Text ends in <|endoftext|> (else the end of sequence) and is supervised whole; a row that does
    not render, or has more than `seq_len` tokens, is rejected and never cut."""
    tokenizer, ids, masks, reasons = _tokenizer(source), [], [], []
    if chat:
        for messages in batch["text"].to_pylist():
            try:
                done = render(tokenizer, json.loads(messages))
            except DataError as e:
                reasons.append(str(e))
            else:
                reasons.append("longer than shard.seq_len" if len(done.ids) > seq_len else "")
            ids.append([] if reasons[-1] else done.ids)
            masks.append([] if reasons[-1] else done.loss_mask)
    else:
        end = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        tail = [] if end is None else [end]
        ids = [found + tail for found in tokenizer(batch["text"].to_pylist(), add_special_tokens=False)["input_ids"]]
        masks = [[1] * len(found) for found in ids]
        reasons = ["" if found else "no tokens" for found in ids]
    columns = {name: batch[name] for name, _ in WHICH}
    return pa.table({**columns, "reason": reasons, "ids": ids, "mask": masks}, schema=TOKENIZED)


def write_partition(group: pa.Table, folder: Path, shard: Shard, packed: bool, pad: int) -> pa.Table:
    """Pack one partition, write its shards under `folder`/split and return its report as one JSON row."""
    group = group.sort_by("index").combine_chunks()
    split_name, part = group["split"][0].as_py(), group["part"][0].as_py()
    kept = group.filter(pc.equal(group["reason"], "")).combine_chunks()
    rejected = group.filter(pc.not_equal(group["reason"], "")).select(["split", "index", "source", "reason"]).to_pylist()
    report: dict[str, Any] = {
        "split": split_name,
        "part": part,
        "shards": [],
        "documents": 0,
        "tokens": 0,
        "supervised_tokens": 0,
        "rejected": rejected,
    }
    if len(kept):
        ids, mask = (kept[c].chunk(0).flatten().to_numpy() for c in ("ids", "mask"))
        ends = kept["ids"].chunk(0).offsets.to_numpy()
        sources = kept["source"].to_pylist()
        ends = ends - ends[0]
        pieces = [(doc, ends[doc] + a, ends[doc] + b) for doc in range(len(kept)) for a, b in split(int(ends[doc + 1] - ends[doc]), shard.seq_len)]
        lengths = np.array([b - a for _, a, b in pieces])
        bins = pack(lengths, shard.seq_len) if packed else [[i] for i in range(len(pieces))]
        for n, start in enumerate(range(0, len(bins), shard.bins_per_shard)):
            some = (_bin([pieces[i] for i in b], ids, mask, sources, shard.seq_len, pad) for b in bins[start : start + shard.bins_per_shard])
            report["shards"].append(write_shard(folder / split_name / f"part-{part:03d}-{n:03d}.arrow", some, shard.seq_len))
        first = np.array([a for _, a, _ in pieces])
        report.update(
            documents=len(pieces), tokens=int(lengths.sum()), supervised_tokens=int(mask.sum(dtype=np.int64) - mask[first].sum(dtype=np.int64))
        )
    return pa.table({"report": [json.dumps(report, ensure_ascii=False)]})


def _bin(pieces: list[tuple[int, int, int]], ids: np.ndarray, mask: np.ndarray, sources: list[str], seq_len: int, pad: int) -> Bin:
    out, supervised, at = np.full(seq_len, pad, np.int32), np.zeros(seq_len, np.uint8), 0
    for _, a, b in pieces:
        out[at : at + b - a], supervised[at : at + b - a] = ids[a:b], mask[a:b]
        at += b - a
    return Bin(out, supervised, np.array([b - a for _, a, b in pieces], np.int32), [sources[doc] for doc, _, _ in pieces])
