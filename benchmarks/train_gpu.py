"""Training speed on GPUs through the ordinary path: `accelerate launch -m graft.train`, on a random base of a real shape.

    python benchmarks/train_gpu.py --like llama-3.1-8b --rows bf16-whole bf16-short fp8-whole fp8-short   (about a minute a row)

A row is a precision and a workload of 16,384 tokens a step: `whole`, 4 documents of 4,096 tokens, or `short`, documents of
log-normal length (mean 330) packed into 4 bins of 4,096. LoRA r = 16 on all seven projections, every token a target.
Prints a Markdown table and writes JSON: tokens/s is the median over the steps after the first five.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "accelerate", "bitsandbytes", "flash-attn-4", "nvidia-cudnn-frontend")
SEQ_LEN, BINS = 4096, 4
RECIPE = """
name = "{name}"
deepspeed = "{root}/configs/deepspeed/zero2.json"
[corpora.random]
path = "random.jsonl"
layout = "messages"
[shard]
seq_len = {seq_len}
[model]
base = "{base}"
precision = "{precision}"
[sft]
corpora = ["random"]
lr = 1e-4
epochs = 100
global_batch = {batch}
micro_batch = {bins}
max_steps = {steps}
save_every = 1000
"""


def lengths_of(workload: str, bins: int, rng: np.random.Generator) -> list[list[int]]:
    """Document lengths by bin; each bin is full."""
    found = []
    for _ in range(bins):
        if workload == "whole":
            found.append([SEQ_LEN])
            continue
        lens: list[int] = []
        while (room := SEQ_LEN - sum(lens)) > 0:
            lens.append(min(room, max(16, int(rng.lognormal(5.3, 1.0)))))
        found.append(lens)
    return found


def write_workspace(folder: Path, base: Path, vocabulary: int, precision: str, workload: str, args: argparse.Namespace) -> Any:
    """A plan whose sft stage is ready to train, its parents made by hand."""
    from graft.core.shards import Columns, write_index, write_shard
    from graft.core.stages import Plan
    from graft.model.chat import load_tokenizer, tokenizer_digest

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "random.jsonl").write_text('{"messages": []}\n')
    batch = BINS * args.gpus
    text = RECIPE.format(
        name=f"{precision}-{workload}", root=ROOT, base=base, precision=precision, seq_len=SEQ_LEN, bins=args.micro, batch=batch, steps=args.steps
    )
    (folder / "recipe.toml").write_text(text)
    plan = Plan(folder / "recipe.toml", tuple(args.set), folder)
    job = plan.resolve("prepare")
    if job.artifact is None:
        with job.writing() as draft:
            (draft.path / "rows").mkdir()
            (draft.path / "rows/train.jsonl").write_text("{}\n")
            draft.counts.update(corpora={"random": {"layout": "messages"}})
    job = plan.resolve("shard-sft")
    if job.artifact is None:
        with job.writing() as draft:
            rng = np.random.default_rng(0)
            lens = lengths_of(workload, batch * 8, rng)
            (draft.path / "train").mkdir()
            ids = rng.integers(0, vocabulary, (len(lens), SEQ_LEN), dtype=np.int32)
            flat, ends = np.concatenate(lens).astype(np.int32), np.cumsum([0, *map(len, lens)])
            columns = Columns(ids, np.ones_like(ids, np.uint8), flat, ends, np.zeros(len(flat), np.int32), np.arange(len(flat)))
            entry = write_shard(draft.path / "train/000.arrow", columns, ["random"])
            write_index(draft.path / "train", seq_len=SEQ_LEN, pad_id=0, tokenizer=tokenizer_digest(load_tokenizer(str(base))), shards=[entry])
    return plan


def run(plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The steps' figures and what the launch took."""
    overrides = [word for o in plan.overrides for word in ("--set", o)]
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *overrides]
    command += ["--profile"] if args.profile else []
    began_s = time.time()
    done = subprocess.run(command, env={**os.environ, "GRAFT_PROCESSES": str(args.gpus)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{plan.recipe.name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    artifact = plan.artifact("sft")
    steps = [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
    settled = steps[5:]
    return {
        "tokens_per_s": median(s["tokens_per_s"] for s in settled),
        "step_time_s": median(s["step_time_s"] for s in settled),
        "data_s": median(s["data_s"] for s in settled),
        "mfu_nominal": median(s["mfu_nominal"] or 0 for s in settled),
        "peak_mem_gib": max(s["peak_mem_gib"] or 0 for s in steps),
        "predicted_mem_gib": steps[-1].get("predicted_mem_gib", 0),
        "setting": f"{steps[-1]['micro_batch']} {steps[-1]['activation_checkpointing']}",
        "compilations": steps[-1]["compilations"],
        "first_step_s": steps[0]["step_time_s"],
        "launch_s": time.time() - began_s - sum(s["step_time_s"] for s in steps),
        "loss": steps[-1]["loss"],
        "said": done.stdout[-600:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="llama-3.1-8b")
    parser.add_argument("--rows", nargs="+", default=["bf16-whole", "bf16-short", "fp8-whole", "fp8-short", "nf4-whole", "nf4-short"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--micro", type=int, default=BINS, help="bins a forward")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where three steps of each row go; slower")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/graft-train-gpu"))
    parser.add_argument("--out", type=Path, default=Path("train_gpu.json"))
    args = parser.parse_args()
    from graft.data.like import write_like
    from graft.model.shapes import SHAPES

    base = args.folder / "bases" / args.like
    if not (base / "tokenizer.json").exists():
        write_like(args.like, base)
    found: dict[str, list[dict[str, Any]]] = {}
    for n in range(args.repeat):
        for row in args.rows:
            precision, workload = row.split("-")
            plan = write_workspace(args.folder / f"{row}-{n}", base, SHAPES[args.like]["vocab_size"], precision, workload, args)
            found.setdefault(row, []).append(run(plan, args))
            print(row, json.dumps(found[row][-1]), flush=True)
            if args.profile:
                print((plan.resolve("sft").run_directory / "profile.txt").read_text())
    print(
        "| row | tokens/s | step | MFU | peak GiB | predicted | bins a forward, kept | compilations | first step | start |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for row, runs in found.items():
        m = {key: median(r[key] for r in runs) for key in runs[0] if key not in ("said", "setting")}
        print(
            f"| {row} | {m['tokens_per_s']:,.0f} | {m['step_time_s'] * 1e3:.0f} ms | {m['mfu_nominal']:.1%} | {m['peak_mem_gib']:.1f} "
            f"| {m['predicted_mem_gib']:.1f} | {runs[0]['setting']} | {m['compilations']:.0f} | {m['first_step_s']:.1f} s | {m['launch_s']:.0f} s |"
        )
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_")) or _there(name)},
    }
    args.out.write_text(json.dumps({"commit": commit, "versions": versions, "like": args.like, "rows": found}, indent=1))
    print(", ".join(f"{k} {v}" for k, v in versions.items()), f"; commit {commit}")


def _there(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
