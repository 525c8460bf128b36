"""What benchmarks/serve.py serves with --trained: precision.py's base, which has learned, and LoRA that was trained on it in each precision.

A random base's logits lie close together, and in another precision it is another function: bounds of what arithmetic changes want a base that
knows something. Three minutes on an H200, kept in --folder for the next call.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from precision import lora_plan
from precision_data import TINY, Scale
from serve_bases import Served
from small_base import launch, make_base, where

TRAINED = ("bf16", "fp8", "nf4")


@dataclass(frozen=True)
class Trained(Served):
    """plans: of each run that ended, by its precision; held_out: the shards of questions that none was trained on."""

    plans: dict[str, Any]
    held_out: Path

    def prompts(self, tokens: list[int], rng: np.random.Generator) -> list[list[int]]:
        """As many held-out questions, as they stand: their lengths are their own."""
        from graft.core.shards import ShardSet

        shards = ShardSet.open(self.held_out, verify=False)
        asked = []
        for n in range(len(shards)):
            found = shards.bin(n)
            start = 0
            for length in found.doc_lens.tolist():
                ids, mask = (v[start : start + length] for v in (found.input_ids, found.loss_mask))
                asked.append(ids[: int(mask.argmax())].tolist())
                start += length
        return [asked[i] for i in rng.permutation(len(asked))[: len(tokens)]]


def made(args: argparse.Namespace) -> Trained:
    from graft.core.store import AdapterStore
    from graft.model.frozen import fp8_works

    data, scale = args.trained.resolve(), TINY if args.tiny else Scale()
    home = args.folder / "trained"
    mark = home / "base.json"
    if not mark.exists():
        base, said = make_base(home, data, scale)
        home.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"path": str(base), **said}), encoding="utf-8")
        print(f"base: {said['weights']:,} weights, held-out loss {list(said['held_out'].values())[-1]:.3f}", flush=True)
    base = Path(json.loads(mark.read_text(encoding="utf-8"))["path"])
    precisions = [p for p in TRAINED if p != "fp8" or fp8_works(where())]

    def run(precision: str) -> tuple[str, Any]:
        plan = lora_plan(home / precision, base, data, scale, precision=precision)
        if plan.resolve("sft").artifact is None:
            launch(plan, "sft")
        return precision, plan

    with ThreadPoolExecutor(len(precisions)) as at_once:
        plans = dict(at_once.map(run, precisions))
    adapters = {p: AdapterStore(plan.served).verified(plan.recipe.name).folder for p, plan in plans.items()}
    return Trained(base, adapters, home / "store", [], plans, data / "sft/validation")
