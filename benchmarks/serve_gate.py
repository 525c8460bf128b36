"""The part of benchmarks/serve.py that trains adapters on the base, in each precision and through the ordinary path, and asks engines for their effect."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

from serve_bases import Served
from serve_live import Keep
from serve_trained import TRAINED, Trained
from train_gpu import finished, write_workspace

STEPS, LR = 10, 1e-3  # enough to move every canary
SERVED = (("HFEngine", "bf16"), ("HFEngine", "nf4"), ("VLLMEngine", "bf16"))


def gate(args: argparse.Namespace, served: Served, keep: Keep) -> None:
    """Every training precision with every way of serving; what the gate says of it."""
    from graft.core.store import AdapterStore
    from graft.model.chat import end_of_turn_ids
    from graft.serve.gate import Candidate, judged

    with tempfile.TemporaryDirectory(dir=args.folder) as workspaces:
        candidates = {}
        plans = served.plans if isinstance(served, Trained) else {p: trained(p, Path(workspaces) / p, served.base, args) for p in TRAINED}
        for precision, plan in plans.items():
            version = AdapterStore(plan.served).verified(plan.recipe.name)
            parity = json.loads((version.folder / "parity.json").read_text(encoding="utf-8"))
            candidates[precision] = Candidate(version, served.tokenizer(), tuple(end_of_turn_ids(served.tokenizer())), parity)
        for of, precision in SERVED:
            if of == "VLLMEngine" and "vllm" in args.without:
                continue
            with engine_of(of, precision, served) as engine:
                for trained_in, candidate in candidates.items():
                    engine.load(trained_in, candidate.version.folder)
                    canaries = candidate.parity["canaries"]
                    scores = [(engine.score(c["ids"], min(c["at"]), trained_in), engine.score(c["ids"], min(c["at"]), None)) for c in canaries]
                    verdict = judged(candidate, precision, scores)
                    recorded = [a - b for c in canaries for a, b in zip(c["adapter"], c["base"], strict=True)]
                    figures = {"of": of, "trained_in": trained_in, "served_in": precision, "targets": len(recorded), "passed": verdict.passed}
                    figures |= {"recorded_nats": sqrt(sum(x * x for x in recorded) / len(recorded)), "effect_nats": verdict.effect_nats}
                    keep(figures | {"difference_nats": verdict.difference_nats, "tolerance_nats": verdict.tolerance_nats})
                    engine.unload(trained_in)
            gc.collect()


def trained(precision: str, folder: Path, base: Path, args: argparse.Namespace) -> Any:
    """The plan of a run of a few steps that has ended, its adapter published."""
    given = argparse.Namespace(gpus=1, micro=1, steps=STEPS, set=[f"sft.lr={LR}"])
    plan = write_workspace(folder, base, f"{precision}-short", given, seq_len=2048)
    overrides = [word for o in plan.overrides for word in ("--set", o)]
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *overrides]
    finished(command, args.limit, {"GRAFT_PROCESSES": "1"})
    return plan


@contextmanager
def engine_of(of: str, precision: str, served: Served) -> Iterator[Any]:
    if of == "HFEngine":
        from graft.engine.hf import HFEngine

        yield HFEngine(str(served.base), None, precision, {}, served.tokenizer(), max_adapters=1)
        return
    from graft.engine.vllm import VLLMEngine

    engine = VLLMEngine(str(served.base), None, precision, served.tokenizer(), max_batch=8, max_adapters=1, kv_tokens=16384)
    try:
        yield engine
    finally:
        engine.close()
