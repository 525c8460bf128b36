"""Stages `shard-base`, `shard-cpt`, `shard-sft`: documents to token ids, loss mask, packed bins and Arrow shards, in Ray Data.

A part (parts.py) takes documents files of `prepare`, one large one or some small ones, through all of that and is kept
across kills; an added or changed file costs its own part. The bytes depend on the documents and the recipe, never on the
number of workers. One part's text and ids are in memory at once: 64 MiB of text took 1.0 GB, what is imported included.

A stage that sees images makes image rows (core/shards.py): no two documents share a bin, and images/ holds those that are shown. What
stands for an image follows from its size: none is decoded here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from rich import get_console

from graft.core.errors import DataError
from graft.core.rows import Row, read_jsonl, write_jsonl
from graft.core.shards import Columns, Image, write_index, write_shard
from graft.core.stages import DATA, Job
from graft.data import parts
from graft.data.cluster import ray_cluster
from graft.data.normal import groups
from graft.data.pack import alone, fill, pack, pieces
from graft.data.parts import Part, Spec
from graft.data.pictures import FOLDER
from graft.data.prepare import concatenate, documents, link, link_images
from graft.data.reading import text_sizes
from graft.data.tokens import Tokens, joined, tokenize_chats, tokenize_texts
from graft.model.chat import Messages, image_parts, load_tokenizer, render, tokenizer_digest
from graft.model.images import ImageProcessor

VERSION = 2
VALIDATION = 0.02  # share of the documents of a text corpus that is held out
FEW = 20  # documents; a part of fewer holds out none unless the draw says so
PROBES = 3  # of a source, and as many again that show images
LOOKED_AT = 1000  # conversations of a source
SPLITS = ("train", "validation")
AT_ONCE = 8 << 20  # characters that are tokenized at once: what that takes, 40 bytes each, is not all of a part's at a time
LARGE = 8 << 20  # bytes of a documents file that is a part of its own
TEXT = 96 << 20  # bytes of text of small ones that are a part together, however well it compresses
ROWS = "rows"  # the source of augmented rows, which prepare has split

Images = list[tuple[Image, ...]]  # of each conversation


def run(job: Job) -> None:
    """Write train/ and validation/ (shards and index.json), images/, rejected.jsonl, and probes.json for sft; in = kept + rejected."""
    recipe, console = job.recipe, get_console()
    base, revision = (str(job.parents["init"].path), None) if "init" in job.parents else job.plan.external_base()
    source = (base, revision, job.plan.chat_template)
    tokenizer = load_tokenizer(*source)
    processor = (
        ImageProcessor(base, revision, recipe.shard.image_pixels) if recipe.stage_shows_images(job.stage.name.removeprefix("shard-")) else None
    )
    probes = _probes(tokenizer, job, processor)  # renders here first, so that a template that cannot work is told in one line
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    store = job.plan.home(DATA) / "parts" / job.stage.name
    digest = tokenizer_digest(tokenizer)
    specs = list(_specs(job, source, pad, digest))
    with job.writing() as draft, ray_cluster():
        console.print(f"{job.stage.name}: {len(specs)} parts", soft_wrap=True)
        done = parts.make(shard_documents, VERSION, specs, store)
        rejected = sum((Counter(part.report["rejected"]) for part in done), Counter[str]())
        inputs = sum(part.report["in"] for part in done)
        counts: dict[str, Any] = {"in": inputs, "kept": inputs - rejected.total(), "rejected": dict(sorted(rejected.items()))}
        for split in SPLITS:
            if index := _place(done, split, draft.path / split, pad, recipe.shard.seq_len, digest):
                numbers = ("bins", "documents", "tokens", "supervised_tokens", "cost", "utilisation", "images")
                counts[split] = {key: index[key] for key in numbers if key in index}
                counts[split]["shares"] = {s["name"]: round(s["tokens"] / index["tokens"], 6) for s in index["sources"]}
        if "train" not in counts:
            raise DataError(
                f"{job.stage.name}: none of {inputs} inputs can be used (rejected: {counts['rejected']}): raise shard.seq_len or add text"
            )
        draft.counts.update(counts)
        concatenate([part.path / "rejected.jsonl" for part in done], draft.path / "rejected.jsonl")
        if specs and "images" in specs[0]:
            shown = {file for part in done for file in part.report["images"]}
            link_images((job.parents["prepare"].path / FOLDER / file for file in sorted(shown)), draft.path)
        if probes:
            (draft.path / "probes.json").write_text(json.dumps(probes, ensure_ascii=False, indent=1), encoding="utf-8")
        parts.sweep(store, done)
        made = [f"{n} {c['bins']:,} bins, {c['tokens']:,} tokens, {c['utilisation']:.2%} used" for n in SPLITS if (c := counts.get(n))]
        console.print(f"{job.stage.name}: {'; '.join(made)}; {rejected.total():,} rejected", soft_wrap=True)


# ---- input ------------------------------------------------------------------------------------------------------------
def _specs(job: Job, source: tuple[str, str | None, str], pad: int, tokenizer: str) -> Iterator[Spec]:
    """Of the parts; paths are where a worker reads, digests what it must find there."""
    stage = job.stage.name.removeprefix("shard-")
    recipe, prepared = job.recipe, job.parents["prepare"]
    train = recipe.train_stage(stage)
    common = {"source": source, "tokenizer": tokenizer, "seq_len": recipe.shard.seq_len, "bins_per_shard": recipe.shard.bins_per_shard}
    common |= {"pack": train.pack, "pad": pad, "held_out": recipe.prepare.validation if stage == "sft" else VALIDATION}
    if recipe.stage_shows_images(stage):
        common |= {"images": recipe.shard.image_pixels, "pack": False}
    files = prepared.manifest["files"]

    def file(name: str, corpus: str, kind: str, split: str | None) -> Spec:
        held = {"path": str(prepared.path / name), "digest": files[name]["sha256"], "bytes": files[name]["bytes"]}
        return held | {"name": corpus, "kind": kind, "split": split, "weight": train.weights.get(corpus, 1.0)}

    found = [file(f"rows/{split}.jsonl", ROWS, "chat", split) for split in SPLITS] if stage == "sft" and recipe.augment else []
    for corpus in train.corpora:
        kind = "text" if prepared.counts["corpora"][corpus]["layout"] == "text" else "chat"
        found += [file(name, corpus, kind, None) for name in sorted(files) if name.startswith(f"corpora/{corpus}/")]
    for group in _together([f for f in found if f["bytes"]]):
        yield common | {"files": group}


def _together(files: list[Spec]) -> Iterator[list[Spec]]:
    """Files by part: a large one alone, all small ones in groups, so that short documents fill the gaps of long ones."""
    group: list[Spec] = []
    size = text = 0
    for file in files:
        if file["bytes"] >= LARGE:
            yield [file]
            continue
        more = _text_bytes(Path(file["path"]))
        if group and text + more > TEXT:
            yield group
            group, size, text = [], 0, 0
        group.append(file)
        size, text = size + file["bytes"], text + more
        if size >= LARGE:
            yield group
            group, size, text = [], 0, 0
    if group:
        yield group


def _text_bytes(path: Path) -> int:
    """About what the texts of a documents file, or of a file of rows, take."""
    return path.stat().st_size if path.suffix == ".jsonl" else sum(text_sizes(pq.read_metadata(path)))


def _texts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [json.dumps(row["messages"], ensure_ascii=False) for row in read_jsonl(path)]
    with pq.ParquetFile(path) as file:
        return [text for batch in file.iter_batches(1000, columns=["text"]) for text in batch["text"].to_pylist()]


def _probes(tokenizer: Any, job: Job, processor: ImageProcessor | None) -> list[Row]:
    """Conversations of the training rows with the ids and mask they render to: of augment's the first of each label, then the next."""
    if job.stage.name != "shard-sft":
        return []
    prepared, found = job.parents["prepare"], []
    if job.recipe.augment:
        rows = list(read_jsonl(prepared.path / "rows" / "train.jsonl"))
        firsts = list({row["label"]: row for row in reversed(rows)}.values())[::-1]
        found = _few(row["messages"] for row in [*firsts, *(r for r in rows if r not in firsts)])
    for name in job.recipe.train_stage("sft").corpora:
        if prepared.counts["corpora"][name]["layout"] != "text":
            found += _few(map(json.loads, documents(prepared.path, name)))
    return probes_of(tokenizer, found, processor)


def probes_of(tokenizer: Any, chats: list[Messages], processor: ImageProcessor | None) -> list[Row]:
    """What probes.json holds of these conversations; processor: None where none shows an image."""
    tokens = _images_of(chats, processor)[1] if processor else [[]] * len(chats)
    done = [render(tokenizer, messages, own) for messages, own in zip(chats, tokens, strict=True)]
    return [{"messages": messages, "ids": r.ids, "loss_mask": r.loss_mask} for messages, r in zip(chats, done, strict=True)]


def _few(chats: Iterable[Messages]) -> list[Messages]:
    """The first PROBES of text alone, and the first that show images."""
    some = list(islice(chats, LOOKED_AT))
    return [m for m in some if not image_parts(m)][:PROBES] + [m for m in some if image_parts(m)][:PROBES]


# ---- the part ---------------------------------------------------------------------------------------------------------
def shard_documents(spec: Spec, folder: Path) -> dict[str, Any]:
    """Documents files to train/ and validation/ shards and rejected.jsonl; returns the counts and the shards' entries."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray's workers are the parallelism
    names = list(dict.fromkeys(file["name"] for file in spec["files"]))
    chosen: dict[str, list[Documents]] = {split: [] for split in SPLITS}
    rejected: list[Row] = []
    inputs = 0
    for file in spec["files"]:
        found, bad = _chosen(file, names.index(file["name"]), spec)
        for split in SPLITS:
            chosen[split].append(found[split])
        rejected += bad
        inputs += len(found["train"].tokens.reasons)
    write_jsonl(folder / "rejected.jsonl", rejected)
    shown = {image.file for some in chosen.values() for d in some if d.images for row in d.rows for image in d.images[row]}
    report: dict[str, Any] = {"in": inputs, "rejected": dict(sorted(Counter(r["reason"] for r in rejected).items())), "images": sorted(shown)}
    return report | {split: _write(chosen[split], names, folder / split, spec) for split in SPLITS}


def _chosen(file: Spec, number: int, spec: Spec) -> tuple[dict[str, Documents], list[Row]]:
    """(what each split takes of a documents file, what is rejected); no text outlives the call. number: of its source."""
    texts = _texts(Path(file["path"]))
    tokens, images = _tokenized(texts, file["kind"], spec)
    rejected = [{"source": file["name"], "number": n, "reason": why, "text": texts[n][:200]} for n, why in enumerate(tokens.reasons) if why]
    usable = np.array([not reason for reason in tokens.reasons], bool)
    held_out, repeats = split_of(by_image(images, texts) if images else texts, file["split"], spec["held_out"], file["weight"])
    train, validation = np.flatnonzero(usable & ~held_out), np.flatnonzero(usable & held_out)
    rows = {"train": np.repeat(train, repeats[train]), "validation": validation}
    return {split: Documents(number, tokens, rows[split], images) for split in SPLITS}, rejected


def _tokenized(texts: list[str], kind: str, spec: Spec) -> tuple[Tokens, Images | None]:
    """A documents file's tokens, and the images of its conversations where the stage sees any."""
    source = tuple(spec["source"])
    processor = ImageProcessor(source[0], source[1], spec["images"]) if kind == "chat" and "images" in spec else None
    done: list[Tokens] = []
    images: Images = []
    for start, end in groups(texts, AT_ONCE) if texts else [(0, 0)]:
        if kind == "text":
            done.append(tokenize_texts(source, texts[start:end]))
            continue
        chats = [json.loads(text) for text in texts[start:end]]
        shown, tokens_each = _images_of(chats, processor) if processor else ([], None)
        images += shown
        done.append(tokenize_chats(source, chats, spec["seq_len"], tokens_each))
    return joined(done), images if processor else None


def _images_of(chats: list[Messages], processor: ImageProcessor) -> tuple[Images, list[list[int]]]:
    """(the images of each conversation, how many tokens stand for each)."""
    found = [tuple(Image(part["file"], processor.grid(part["width"], part["height"])) for part in image_parts(chat)) for chat in chats]
    return found, [[processor.tokens(image.grid) for image in row] for row in found]


def by_image(images: Images, texts: list[str]) -> list[str]:
    """By what each row of a file is drawn, so that no image is on both sides: the first name among the images that it shares, directly or
    through other rows, with others; its text where it shows none."""
    above: dict[str, str] = {}  # another image of the same rows whose name comes before

    def first(name: str) -> str:
        while (up := above.setdefault(name, name)) != name:
            above[name] = above[up]
            name = up
        return name

    for row in images:
        names = [first(image.file) for image in row]
        above.update(dict.fromkeys(names, min(names, default="")))
    return [first(row[0].file) if row else text for row, text in zip(images, texts, strict=True)]


def split_of(texts: list[str], split: str | None, share: float, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """(held out [n] bool, how often each document is trained on [n] int), decided by each text's own hash: equal ones alike.

    split: where prepare has decided already; share: of the texts to hold out, of FEW and more at least one and never all; weight: 0.25
    takes a quarter of the texts once, 2.5 each twice and half of them once more.
    """
    hashes = (hashlib.sha256(t.encode()).digest() for t in texts)
    draws = np.array([(int.from_bytes(h[:8]), int.from_bytes(h[8:16])) for h in hashes], float).reshape(-1, 2) / 2**64
    if split:
        held_out = np.full(len(texts), split == "validation")
    else:
        held_out = draws[:, 0] >= 1 - share
        if share and len(texts) >= FEW and not held_out.any():
            held_out = draws[:, 0] == draws[:, 0].max()
        if len(texts) >= FEW and held_out.all():  # one image is in all rows
            held_out[:] = False
    whole = int(weight)
    return held_out, whole + (draws[:, 1] < weight - whole)


class Documents(NamedTuple):
    """What a split takes of one documents file."""

    source: int  # its place among the names
    tokens: Tokens
    rows: np.ndarray  # [documents] int64, numbers in the file; one that is repeated stands there so often
    images: Images | None  # of every row of the file; None: it is of texts, or the stage sees no images


def _write(chosen: list[Documents], names: list[str], folder: Path, spec: Spec) -> list[dict[str, Any]]:
    """Pack the chosen documents and write their shards; the shards' entries of the index."""
    seq_len = spec["seq_len"]
    tokens = joined([d.tokens for d in chosen])
    found, at = [], 0
    for d in chosen:
        # a chat is one piece: tokenize_chats refuses those that are longer
        document, start, length = pieces(np.diff(d.tokens.ends)[d.rows], seq_len)
        rows = d.rows[document]
        found.append((start + d.tokens.ends[rows] + at, length, np.full(rows.size, d.source, np.int32), rows))
        at += d.tokens.ids.size
    starts, lengths, sources, rows = (np.concatenate(column) for column in zip(*found, strict=True))
    images = [d.images[row] if d.images else () for d, of in zip(chosen, found, strict=True) for row in of[3]] if "images" in spec else None
    bins = pack(lengths, seq_len) if spec["pack"] else alone(lengths.size)
    entries: list[dict[str, Any]] = []
    for first in range(0, bins.ends.size - 1, spec["bins_per_shard"]):
        folder.mkdir(exist_ok=True)
        some = bins.between(first, first + spec["bins_per_shard"])
        order = some.order
        filled = fill(tokens.ids, tokens.mask, starts, lengths, some, seq_len, spec["pad"])
        shown = [images[i] for i in order] if images is not None else None
        columns = Columns(*filled, lengths[order], some.ends, sources[order], rows[order], shown)
        entries.append(write_shard(folder / f"{len(entries):03d}.arrow", columns, names))
    return entries


# ---- the artifact -----------------------------------------------------------------------------------------------------
def _place(done: list[Part], split: str, folder: Path, pad: int, seq_len: int, tokenizer: str) -> dict[str, Any]:
    """Link a split's shards into the artifact under names of their own and index them; the index, {} where nothing is to be learnt."""
    entries = []
    for n, part in enumerate(done):
        for entry in part.report[split]:
            entries.append((part.path / split / entry["file"], {**entry, "file": f"{n:05d}-{entry['file']}"}))
    if not sum(entry["supervised_tokens"] for _, entry in entries):
        return {}
    folder.mkdir()
    for path, entry in entries:
        link(path, folder / entry["file"])
    return write_index(folder, seq_len=seq_len, pad_id=pad, tokenizer=tokenizer, shards=[entry for _, entry in entries])
