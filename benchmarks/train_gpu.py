"""Training speed on GPUs through the ordinary path, `accelerate launch -m graft.train`, beside peers, on a random base of a real shape.

    python benchmarks/train_gpu.py --like llama-3.1-8b --rows bf16-whole fp8-whole --peers unsloth trl-liger --repeat 3
    python benchmarks/train_gpu.py --rows nf4-whole-ckpt --peers unsloth "trl-liger --attention flash_attention_4" --append a.json --out b.json
    python benchmarks/train_gpu.py --like taigi-llama-2-13b --rows bf16-whole fp8-whole --set sft.lora.r=64 --set sft.lora.dropout=0.05
    python benchmarks/train_gpu.py --rows bf16-short --gpus 2 --nodes 2  (one launcher, then two of a GPU each)
    python benchmarks/train_gpu.py --table a.json b.json                 (about a minute a run; --append and --table join calls)

A row is PRECISION-WORKLOAD[-ckpt], 16,384 tokens a step and GPU: bf16, fp8 or nf4 base under LoRA r = 16 on all seven projections,
or full; `whole`, 4 documents of 4,096 tokens, or `short`, documents of log-normal length (mean 330) packed into 4 bins
of 4,096 (for peers 16 rows of 1,024, or the same bins with --packed); ckpt: full activation checkpointing, the peer's own. Every token
is a target. A peer is words for train_gpu_peers.py; beside fp8 it trains in bf16, once a repeat. Runs are interleaved: in each
repeat graft, then each peer, row by row. Prints a Markdown table; JSON keeps every run and is written after each.
tokens/s is the median over the steps after the first five, of a row the median over repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from train_gpu_table import alike, of_peers, report

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "accelerate", "bitsandbytes", "flash-attn-4", "quack-kernels", "nvidia-cudnn-frontend"),
    *("peft", "datasets", "trl", "liger-kernel", "unsloth", "unsloth-zoo", "xformers"),
)
SEQ_LEN, BINS = 4096, 4
SETTLE = 5  # first steps that no median counts
GRACE_S = 20  # that a run which is ended has for its ranks
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
activation_checkpointing = "{checkpointing}"
tune_matmuls = true
"""


def parsed(row: str) -> tuple[str, str, str]:
    """(precision or full, workload, checkpointing) of a row's name; ValueError where it is none."""
    if not (found := re.fullmatch("(bf16|fp8|nf4|full)-(whole|short)(-ckpt)?", row)):
        raise ValueError(f"{row!r} is no row")
    return found[1], found[2], "full" if found[3] else "none"


def lengths_of(workload: str, bins: int, rng: np.random.Generator, seq_len: int = SEQ_LEN) -> list[list[int]]:
    """Document lengths by bin; each bin is full."""
    found = []
    for _ in range(bins):
        if workload == "whole":
            found.append([seq_len])
            continue
        lens: list[int] = []
        while (room := seq_len - sum(lens)) > 0:
            lens.append(min(room, max(16, int(rng.lognormal(5.3, 1.0)))))
        found.append(lens)
    return found


def write_workspace(folder: Path, base: Path, row: str, args: argparse.Namespace, seq_len: int = SEQ_LEN, bins: int = BINS) -> Any:
    """A plan whose sft stage is ready to train, its parents made by hand. bins: of a step, on each GPU."""
    from graft.core.shards import Columns, write_index, write_shard
    from graft.core.stages import Plan
    from graft.model.chat import load_tokenizer, tokenizer_digest

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "random.jsonl").write_text('{"messages": []}\n')
    precision, workload, checkpointing = parsed(row)
    vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    batch = bins * args.gpus
    text = RECIPE.format(
        name=row,
        root=ROOT,
        base=base,
        precision="bf16" if precision == "full" else precision,
        seq_len=seq_len,
        batch=batch,
        bins=args.micro,
        steps=args.steps,
        checkpointing=checkpointing,
    )
    (folder / "recipe.toml").write_text(text + ("lora = false\n" if precision == "full" else ""))
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
            lens = lengths_of(workload, batch * 8, rng, seq_len)
            (draft.path / "train").mkdir()
            ids = rng.integers(0, vocabulary, (len(lens), seq_len), dtype=np.int32)
            flat, ends = np.concatenate(lens).astype(np.int32), np.cumsum([0, *map(len, lens)])
            columns = Columns(ids, np.ones_like(ids, np.uint8), flat, ends, np.zeros(len(flat), np.int32), np.arange(len(flat)))
            entry = write_shard(draft.path / "train/000.arrow", columns, ["random"])
            write_index(draft.path / "train", seq_len=seq_len, pad_id=0, tokenizer=tokenizer_digest(load_tokenizer(str(base))), shards=[entry])
    return plan


def finished(command: list[str], limit_s: float, environment: dict[str, str] | None = None) -> str:
    """What a command printed; RuntimeError with its last line where it fails, TimeoutError where it outlasts the limit and is ended."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        try:
            process.wait(limit_s)
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGTERM)  # a launcher ends its ranks, which are in groups of their own
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if isinstance(stop, subprocess.TimeoutExpired):
                raise TimeoutError(f"not done after {limit_s:.0f} s") from None
            raise
        log.seek(0)
        said = log.read()
    if process.returncode:
        print(said[-4000:], file=sys.stderr, flush=True)
        raise RuntimeError(next((line.strip() for line in reversed(said.splitlines()) if line.strip()), f"exit code {process.returncode}"))
    return said


def launchers(gpus: int, nodes: int) -> list[dict[str, str]]:
    """The environments of so many launchers on this host, each with its share of the GPUs, that meet in one run."""
    if nodes == 1:
        return [{"GRAFT_PROCESSES": str(gpus)}]
    from graft.train.launch import free_port

    each, port = gpus // nodes, str(free_port())
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    meeting = {"GRAFT_PROCESSES": str(each), "NUM_NODES": str(nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{"NODE_RANK": str(n), "CUDA_VISIBLE_DEVICES": ",".join(visible[n * each : (n + 1) * each])} for n in range(nodes)]
    return [meeting | (one if list(Path("/dev").glob("nvidia[0-9]*")) else {"NODE_RANK": one["NODE_RANK"]}) for one in own]


def run_graft(row: str, folder: Path, base: Path, args: argparse.Namespace, nodes: int = 1) -> dict[str, Any]:
    """The steps' figures and what the launch took. nodes: launchers."""
    plan = write_workspace(folder, base, row, args)
    overrides = [word for o in plan.overrides for word in ("--set", o)]
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *overrides]
    command += ["--profile"] if args.profile else []
    began_s = time.time()
    first: list[float] = []
    watch = threading.Thread(target=_wait_for, args=(plan.resolve("sft").run_directory / "metrics.jsonl", began_s, first), daemon=True)
    watch.start()
    with ThreadPoolExecutor(nodes) as pool:
        said, *_ = pool.map(partial(finished, command, args.limit), launchers(args.gpus, nodes))
    wall_s = time.time() - began_s
    artifact = plan.artifact("sft")
    steps = [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
    settled = steps[SETTLE:]
    step_time_s = median(after["ended_unix_s"] - before["ended_unix_s"] for before, after in pairwise(steps[SETTLE - 1 :]))
    if args.profile:
        print((plan.resolve("sft").run_directory / "profile.txt").read_text())
    return {
        "tokens_per_s": median(s["tokens"] for s in settled) / step_time_s,
        "step_time_s": step_time_s,  # from the end of one to the end of the next, as a peer's
        "data_s": median(s["data_s"] for s in settled),
        "mfu_nominal": median(s["mfu_nominal"] or 0 for s in settled),
        "peak_mem_gib": max(s["peak_mem_gib"] or 0 for s in steps),
        "predicted_mem_gib": steps[-1].get("predicted_mem_gib", 0),
        "setting": f"{steps[-1]['micro_batch']} {steps[-1]['activation_checkpointing']}",
        "compilations": steps[-1]["compilations"],
        "first_step_s": steps[0]["step_time_s"],
        "to_first_step_s": first[0] if first else None,  # from the command to the end of the first step
        "launch_s": wall_s - sum(s["step_time_s"] for s in steps),
        "loss": steps[-1]["loss"],
        "said": said[-600:],
    }


def _wait_for(file: Path, began_s: float, found: list[float]) -> None:
    while not (file.exists() and file.stat().st_size):
        time.sleep(0.05)
    found.append(time.time() - began_s)


def run_peer(peer: str, row: str, folder: Path, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What train_gpu_peers.py measured, and what the launch took."""
    precision, workload, checkpointing = parsed(row)
    out = folder / "peer.json"
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={args.gpus}"] if args.gpus > 1 else []
    command = [sys.executable, *several, str(Path(__file__).with_name("train_gpu_peers.py")), "--peer", *peer.split(), "--workload", workload]
    command += ["--precision", "bf16", "--full"] if precision == "full" else ["--precision", precision]
    command += ["--deepspeed", str(ROOT / "configs/deepspeed/zero2.json")] if several else []
    command += ["--checkpointing", checkpointing, "--base", str(base), "--micro", str(args.micro), "--steps", str(args.steps), "--out", str(out)]
    began_s = time.time()
    finished(command, args.limit, {"UNSLOTH_COMPILE_LOCATION": str(args.folder / "unsloth_compiled")})  # kept between runs
    found = json.loads(out.read_text(encoding="utf-8"))
    return {**found, "launch_s": time.time() - began_s - found["steps_s"]}


def attempt(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The figures, or why there are none: a run that fails does not stop the others."""
    try:
        return measure(*given)
    except Exception as failure:  # noqa: BLE001 - whatever it is, its line stands in the table
        return {"failed": str(failure)}


def installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def gpus() -> tuple[str, str]:
    """(what they are, their driver)."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no GPU", "none"
    first, *others = done.stdout.strip().splitlines()
    name, driver = first.split(", ")
    return f"{1 + len(others)} x {name}", driver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="llama-3.1-8b")
    parser.add_argument("--base", type=Path, help="a model folder instead of --like's")
    parser.add_argument("--rows", nargs="+", default=["bf16-whole", "bf16-short", "fp8-whole", "fp8-short", "nf4-whole", "nf4-short"])
    parser.add_argument("--peers", nargs="*", default=[], help="words for train_gpu_peers.py --peer, a string each")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1, help="graft's runs are also made by so many launchers, which share the GPUs")
    parser.add_argument("--micro", type=int, default=BINS, help="bins a forward")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--profile", action="store_true", help="print where three steps of each row go; slower")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/graft-train-gpu"))
    parser.add_argument("--out", type=Path, default=Path("train_gpu.json"))
    parser.add_argument("--append", type=Path, nargs="+", default=[], help="files of earlier calls, whose runs join this one's in --out")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these files and run nothing")
    args = parser.parse_args()
    for row in args.rows:
        parsed(row)
    if args.steps <= SETTLE or args.gpus % args.nodes or len(set(args.rows)) < len(args.rows):
        parser.error(f"--steps is more than {SETTLE}, --nodes divides --gpus, and a row is named once: --repeat runs it again")
    calls = [call for path in args.table or args.append for call in json.loads(path.read_text(encoding="utf-8"))]
    if args.table:
        alike(calls)
        print(report(calls))
        return
    args.folder = args.folder.absolute()

    base = args.base.absolute() if args.base else args.folder / "bases" / args.like
    if not (base / "tokenizer.json").exists():
        from graft.data.like import write_like

        write_like(args.like, base)
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    runs: list[dict[str, Any]] = []
    name, driver = gpus()
    about = {"device": name, "driver": driver, "like": str(args.base or args.like), "versions": installed(), "commit": commit}
    calls.append({**about, "command": " ".join(sys.argv), "runs": runs})
    alike(calls)

    def keep(of: str, row: str, figures: dict[str, Any]) -> None:
        runs.append({"row": row, "of": of, **figures})
        print(f"{row}, {of}:", figures.get("failed") or f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['peak_mem_gib']:.1f} GiB", flush=True)
        args.out.write_text(json.dumps(calls, indent=1), encoding="utf-8")  # after each: the call may be cut off

    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as workspaces:
        for n in range(args.repeat):
            met: set[tuple[str, str]] = set()
            for row in args.rows:
                folder = Path(workspaces) / f"{row}-{n}"
                keep("graft", row, attempt(run_graft, row, folder, base, args))
                if args.nodes > 1:
                    apart = folder.with_name(f"{folder.name}-nodes")
                    keep(f"graft by {args.nodes} launchers", row, attempt(run_graft, row, apart, base, args, args.nodes))
                for peer in args.peers:
                    if (peer, of_peers(row)) not in met:
                        met.add((peer, of_peers(row)))
                        keep(peer, of_peers(row), attempt(run_peer, peer, of_peers(row), folder, base, args))
    print(report(calls))


if __name__ == "__main__":
    main()
