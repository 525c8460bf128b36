"""What serving must find again of an adapter, written as training ends: parity.json, from the model that was trained.

It says which base, tokenizer and template it belongs to, and, for a few conversations of the training rows (canaries), the
log-probability of each supervised token with the adapter and without it. A server compares what its own engine gives.

Of rows with images a few are canaries too, those with the smallest files among some of the shards'; their images lie beside the adapter,
named by their SHA-256: those of one row at least, and as many more as are IMAGE_BYTES together. So a server notices a tower that is not as in training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft.core.artifact import digest_of
from graft.core.shards import Bin, ShardSet
from graft.core.stages import Job
from graft.core.store import MAX_IMAGE_BYTES, MAX_IMAGES
from graft.model.chat import image_parts, tokenizer_digest
from graft.model.images import ImageProcessor
from graft.model.lora import adapters, read_adapter
from graft.model.packed import PackedLM
from graft.train.batches import collate
from graft.train.pictures import FOLDER, Pictures

FILE, PROBES = "parity.json", "probes.json"
MOST_TARGETS = 512  # whose logits are in memory at once
LOOKED_AT, IMAGE_ROWS = 256, 4  # rows of the shards, and how many that show images are canaries
IMAGE_BYTES = 2 << 20  # of all their files


def record(job: Job, model: PackedLM, tokenizer: Any, folder: Path) -> None:
    """Write parity.json, and the probes, beside the adapter in `folder`. The model ends without its adapter."""
    shards = job.parents[f"shard-{job.stage.name}"].path
    probes = []
    if (shards / PROBES).is_file():
        shutil.copyfile(shards / PROBES, folder / PROBES)
        probes = json.loads((shards / PROBES).read_text(encoding="utf-8"))
    train, seq_len = ShardSet.open(shards / "train", verify=False), job.recipe.shard.seq_len
    text = packed([(p["ids"], p["loss_mask"]) for p in probes if not image_parts(p["messages"])], seq_len)
    if text is None:  # no chat among the rows, or none that a bin holds
        own = next((b for i in range(len(train)) if not (b := train.bin(i)).images), None)
        text = packed(documents(own), seq_len) if own else None
    canaries: list[tuple[Bin, Any]] = [(text, collate([text]))] if text else []
    settings = None
    if train.index.get("images"):
        processor = ImageProcessor(*job.plan.base_model(job.stage.name), job.recipe.shard.image_pixels)
        pictures, shown = Pictures(shards, processor, model.lm, 1), pictured(train, shards / FOLDER)
        canaries += [(b, pictures.collate([b])) for b in shown]
        settings = processor.settings()
        for file in {image.file for b in shown for image in b.images}:
            shutil.copyfile(shards / FOLDER / file, folder / file)
    found = effects(model, canaries, folder) if canaries else []
    precision = job.recipe.train_precision(job.stage.name)
    told = parity(tokenizer, job.plan.base_identity(job.stage.name), precision, found, settings)
    (folder / FILE).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def parity(tokenizer: Any, base: str, precision: str, canaries: list[dict[str, Any]], processor: dict[str, Any] | None = None) -> dict[str, Any]:
    """What parity.json holds. base: what tells it from others; canaries: as effects() gives them; processor: the settings by which images were seen."""
    return {
        "format": 1,
        "base": base,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": digest_of(tokenizer.chat_template),
        "special_tokens": {str(i): token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special},
        "precision": precision,
        **({"image_processor": processor} if processor else {}),
        "canaries": canaries,
    }


def packed(documents: list[tuple[list[int], list[int]]], seq_len: int) -> Bin | None:
    """(ids, loss mask) of each in one bin, as far as they fit, with at most MOST_TARGETS targets; None where not one does."""
    ids, mask = np.zeros(seq_len, np.int32), np.zeros(seq_len, np.uint8)
    lens: list[int] = []
    for own, supervised in documents:
        start, end = sum(lens), sum(lens) + len(own)
        if end <= seq_len and any(supervised[1:]):
            ids[start:end], mask[start + 1 : end] = own, supervised[1:]
            lens.append(len(own))
    mask[np.flatnonzero(mask)[MOST_TARGETS:]] = 0
    return Bin(ids, mask, np.array(lens, np.int32)) if lens else None


def documents(found: Bin) -> list[tuple[list[int], list[int]]]:
    """(ids, loss mask) of each document of a bin."""
    ends = found.doc_lens.cumsum().tolist()
    return [(found.input_ids[a:b].tolist(), found.loss_mask[a:b].tolist()) for a, b in zip([0, *ends], ends, strict=False)]


def pictured(train: ShardSet, images: Path) -> list[Bin]:
    """The rows of which the images in that folder are the smallest files, of LOOKED_AT that show some, from all over the set; of the same images one."""
    stride = max(1, len(train) // LOOKED_AT)
    rows = (train.bin(i) for start in range(stride) for i in range(start, len(train), stride))
    of = {b.images: b for b in islice((b for b in rows if b.images and b.targets), LOOKED_AT)}
    size = {file: (images / file).stat().st_size for shown in of for file, _ in shown}
    found: list[Bin] = []
    files: set[str] = set()
    for shown in sorted(of, key=lambda shown: sum(size[file] for file in {file for file, _ in shown}))[:IMAGE_ROWS]:
        with_it = files | {file for file, _ in shown}
        if len(with_it) <= MAX_IMAGES and sum(size[file] for file in with_it) <= (IMAGE_BYTES if found else MAX_IMAGE_BYTES):
            mask = of[shown].loss_mask.copy()
            mask[np.flatnonzero(mask)[MOST_TARGETS:]] = 0
            found.append(of[shown]._replace(loss_mask=mask))
            files = with_it
    return found


@torch.no_grad()
def effects(model: PackedLM, canaries: list[tuple[Bin, Any]], folder: Path) -> list[dict[str, Any]]:
    """canaries: bins, each with the batch of it. Of each document: ids, at (the places of its targets) and the logprobs (nats) of these with the adapter
    saved in `folder`, and of the base; of one with images these, as files and grids."""
    _, pairs = read_adapter(folder)  # not the model's own, where an earlier step is kept
    device = next(model.parameters()).device
    batches = [batch.to(device) for _, batch in canaries]
    with model.without_dropout():
        for name, a, b in adapters(model.lm):
            a.copy_(pairs[name][0])
            b.copy_(pairs[name][1])
        adapted = [model.logprobs(batch).tolist() for batch in batches]
        for _, _, b in adapters(model.lm):
            b.zero_()
        base = [model.logprobs(batch).tolist() for batch in batches]
    return [found for (own, batch), *scores in zip(canaries, adapted, base, strict=True) for found in _of_documents(own, batch, *scores)]


def _of_documents(own: Bin, batch: Any, adapted: list[float], base: list[float]) -> Iterator[dict[str, Any]]:
    place = (batch.target_at + 1).tolist()  # of each target in the bin
    ends = own.doc_lens.cumsum().tolist()
    shown = {"images": [image._asdict() for image in own.images]} if own.images else {}
    for start, end in zip([0, *ends], ends, strict=False):
        if here := [i for i, at in enumerate(place) if start <= at < end]:
            logprobs = {"base": [round(base[i], 6) for i in here], "adapter": [round(adapted[i], 6) for i in here]}
            yield {"ids": own.input_ids[start:end].tolist(), "at": [place[i] - start for i in here], **logprobs, **shown}
