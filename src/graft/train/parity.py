"""What serving must find again of an adapter, written as training ends: parity.json, from the model that was trained.

It says which base, tokenizer and template it belongs to, and, for a few conversations of the training rows (canaries), the
log-probability of each supervised token with the adapter and without it. A server compares what its own engine gives.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft.core.artifact import digest_of
from graft.core.shards import Bin, ShardSet
from graft.core.stages import Job
from graft.model.chat import tokenizer_digest
from graft.model.lora import adapters, read_adapter
from graft.model.packed import PackedLM
from graft.train.batches import collate

FILE, PROBES = "parity.json", "probes.json"
MOST_TARGETS = 512  # whose logits are in memory at once


def record(job: Job, model: PackedLM, tokenizer: Any, folder: Path) -> None:
    """Write parity.json, and the probes, beside the adapter in `folder`. The model ends without its adapter."""
    shards = job.parents[f"shard-{job.stage.name}"].path
    probes = []
    if (shards / PROBES).is_file():
        shutil.copyfile(shards / PROBES, folder / PROBES)
        probes = json.loads((shards / PROBES).read_text(encoding="utf-8"))
    canaries = packed([(p["ids"], p["loss_mask"]) for p in probes], job.recipe.shard.seq_len)
    if canaries is None:  # no chat among the rows, or none that a bin holds
        train = ShardSet.open(shards / "train", verify=False)
        text = next((b for i in range(len(train)) if not (b := train.bin(i)).images), None)
        canaries = packed(documents(text), job.recipe.shard.seq_len) if text else None
    found = effects(model, canaries, folder) if canaries else []
    told = parity(tokenizer, job.plan.base_identity(job.stage.name), job.recipe.train_precision(job.stage.name), found)
    (folder / FILE).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def parity(tokenizer: Any, base: str, precision: str, canaries: list[dict[str, Any]]) -> dict[str, Any]:
    """What parity.json holds. base: what tells it from others; canaries: as effects() gives them."""
    return {
        "format": 1,
        "base": base,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": digest_of(tokenizer.chat_template),
        "special_tokens": {str(i): token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special},
        "precision": precision,
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


@torch.no_grad()
def effects(model: PackedLM, canaries: Bin, folder: Path) -> list[dict[str, Any]]:
    """Of each document: ids, at (the places of its targets) and the logprobs (nats) of these with the adapter saved in `folder`, and of the base."""
    _, pairs = read_adapter(folder)  # not the model's own, where an earlier step is kept
    batch = collate([canaries]).to(next(model.parameters()).device)
    with model.without_dropout():
        for name, a, b in adapters(model.lm):
            a.copy_(pairs[name][0])
            b.copy_(pairs[name][1])
        adapted = model.logprobs(batch).tolist()
        for _, _, b in adapters(model.lm):
            b.zero_()
        base = model.logprobs(batch).tolist()
    place = (batch.target_at + 1).tolist()  # of each target in the bin
    ends = canaries.doc_lens.cumsum().tolist()
    found = []
    for start, end in zip([0, *ends], ends, strict=False):
        if own := [i for i, at in enumerate(place) if start <= at < end]:
            logprobs = {"base": [round(base[i], 6) for i in own], "adapter": [round(adapted[i], 6) for i in own]}
            found.append({"ids": canaries.input_ids[start:end].tolist(), "at": [place[i] - start for i in own], **logprobs})
    return found
