"""What serving costs: mixed batches beside PEFT's, the app's time to first token over its engine's, adapters loaded while it serves.

    python benchmarks/serve.py mixed                                    (8B in bf16 on one GPU; else a shape of 124M in fp32 on the CPU: some 5 minutes)
    python benchmarks/serve.py ttft --ray                               (the same shape, 1 and 32 clients; Ray too: some 5 minutes on two cores)
    python benchmarks/serve.py hotload --precision bf16                 (a minute)
    python benchmarks/serve.py solo --rows 40 --without vllm            (what batch mates change; with vLLM too where it is installed)
    python benchmarks/serve.py vllm --rows 512 --prompt 256 --answer 128 (8B beside `vllm serve`, one GPU of 120 GiB: six minutes)
    python benchmarks/serve.py gate                                     (trains in bf16, fp8 and nf4, serves each in bf16 and nf4: five minutes)
    python benchmarks/serve.py gate solo --trained DATA                 (DATA by precision.py --prepare: a base of 150M that has learned; six minutes)
    python benchmarks/serve.py mixed ttft hotload --tiny                (under a minute on a CPU: does it run)
    python benchmarks/serve.py --table a.json b.json --append           (earlier calls into RESULTS.md)

The base is random, of --like's shape, and speaks text (serve_bases.py); adapters are random, r = 16 on all seven projections. mixed: --rows requests
spread over the base and 8 adapters, HFEngine.generate against PeftModel.generate(adapter_names = …), in turn; with --answer LOW HIGH the lengths
differ, and PEFT's rows wait for the longest of their batch. ttft: chat completions, streamed, over uvicorn (and --ray), each server in a process of
its own, clients in another, against the same engine asked through its Runner. hotload: into an idle engine, from RAM (the page
cache) and from disk (its pages dropped first), and through Catalog.load with and without the gate; then beside a row under way. Figures go into --out
after each run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_table import appended
from serve_bases import Served, lengths, made
from serve_gate import gate
from serve_live import Keep, hotload, ttft
from serve_peers import Peft
from serve_table import ENGINE, PARTS, PEFT, alike, report
from serve_trained import made as made_to_know
from serve_vllm import vllm
from train_gpu import ROOT, attempt, gpus

PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "bitsandbytes", "uvicorn", "uvloop", "ray", "vllm")


# ---- mixed -----------------------------------------------------------------------------------------------------------------
def mixed(args: argparse.Namespace, served: Served, keep: Keep) -> None:
    """Tokens/s of each contestant, in turn; the engine's greedy tokens held against PEFT's."""
    from graft.engine.hf import HFEngine
    from graft.engine.protocol import Request

    rng = np.random.default_rng(0)
    names: list[str | None] = [None, *served.adapters]
    prompts = served.prompts(lengths(args.prompt, args.rows, rng), rng)
    rows = [(p, n, names[i % len(names)]) for i, (p, n) in enumerate(zip(prompts, lengths(args.answer, args.rows, rng), strict=True))]
    engine = HFEngine(str(served.base), None, args.precision, served.adapters, served.tokenizer(), max_batch=args.batch)

    def of_engine(rows: list[Any], on_base: bool = False) -> list[list[int]]:
        return [c.token_ids for c in engine.generate([Request(p, n, adapter=None if on_base else a, ends=()) for p, n, a in rows])]

    contestants: dict[str, Callable[[list[Any]], list[list[int]]]] = {ENGINE: of_engine}
    if "base" not in args.without:
        contestants[f"{ENGINE}, all rows on the base"] = lambda rows: of_engine(rows, True)
    if "peft" not in args.without:
        peft = Peft(served.base, served.adapters, args.precision, engine.device)
        contestants[PEFT] = lambda rows: peft(rows, args.batch)
    for run in contestants.values():
        run([(p, min(n, 8), a) for p, n, a in rows[: args.batch]])  # first calls cost more
    for _ in range(args.repeat):
        found: dict[str, list[list[int]]] = {}
        for of, run in contestants.items():
            began, cpu = time.perf_counter(), time.process_time()
            found[of] = run(rows)
            wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            tokens = sum(map(len, found[of]))
            assert tokens == sum(n for _, n, _ in rows), f"{of} gave {tokens} tokens"
            figures = {"of": of, "tokens_per_s": tokens / wall_s, "wall_s": wall_s, "cpu_s": cpu_s, "tokens": tokens}
            keep(figures | (agreement(found[ENGINE], found[of]) if of == PEFT else {}))


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """rows_alike: share of rows that are equal; tokens_alike: of tokens before their row's first difference."""
    same = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in zip(ours, theirs, strict=True)]
    return {
        "rows_alike": sum(n == len(a) for n, a in zip(same, ours, strict=True)) / len(ours),
        "tokens_alike": sum(same) / sum(map(len, ours)),
    }


# ---- solo ------------------------------------------------------------------------------------------------------------------
def solo(args: argparse.Namespace, served: Served, keep: Keep) -> None:
    """--rows rows over the base and the adapters, all mixed, then each alone: what batch mates change."""
    from graft.engine.hf import HFEngine
    from graft.engine.protocol import Engine, Request

    rng = np.random.default_rng(2)
    names: list[str | None] = [None, *served.adapters]
    prompts = served.prompts(lengths(args.prompt, args.rows, rng), rng)
    ways = zip(prompts, lengths(args.answer, args.rows, rng), strict=True)
    requests = [Request(p, n, adapter=names[i % len(names)], ends=(), logprobs=20) for i, (p, n) in enumerate(ways)]

    def told(engine: Engine, rows: list[Request]) -> list[list[tuple[int, Any]]]:
        found: list[list[Any]] = [[] for _ in rows]
        for chunks in engine.stream(rows):
            for chunk in chunks:
                found[chunk.row] += zip(chunk.tokens, chunk.told, strict=True)
        return found

    def compared(of: str, engine: Engine) -> None:
        gaps, differences = [], []
        for own, request in zip(told(engine, requests), requests, strict=True):
            for (mixed, by_mixed), (alone, by_alone) in zip(own, told(engine, [request])[0], strict=True):
                if mixed != alone:
                    gaps.append(by_alone.logprob - dict(by_alone.top).get(mixed, -math.inf))
                    break
                differences.append(abs(by_mixed.logprob - by_alone.logprob))
        figures = {"of": of, "rows": len(requests), "tokens": len(differences), "parted": len(gaps), "gap_nats": max(gaps, default=0.0)}
        keep(figures | {"difference_nats": max(differences)})

    if "hf" not in args.without:
        compared(ENGINE, HFEngine(str(served.base), None, args.precision, served.adapters, served.tokenizer(), max_batch=args.batch))
        gc.collect()
    if "vllm" not in args.without:
        from graft.engine.vllm import VLLMEngine

        kv_tokens = args.rows * (args.prompt[-1] + args.answer[-1] + 64)
        engine = VLLMEngine(str(served.base), None, args.precision, served.tokenizer(), args.batch, len(served.adapters), kv_tokens=kv_tokens)
        for name, folder in served.adapters.items():
            engine.load(name, folder)
        compared("VLLMEngine", engine)
        engine.close()


# ---- the call --------------------------------------------------------------------------------------------------------------
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*PARTS, []], help="mixed, ttft and hotload by default")
    parser.add_argument("--like", help="a shape of graft base build --like, or cpu-124m; llama-3.1-8b where there is a GPU")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--precision", choices=["fp32", "bf16", "nf4"], help="bf16 where there is a GPU, else fp32")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short loads")
    parser.add_argument(
        "--trained", type=Path, metavar="DATA", help="gate and solo: precision.py's base, from its --prepare's folder, for the random one"
    )
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="mixed: requests")
    parser.add_argument("--batch", type=int, default=16, help="mixed: rows under way")
    parser.add_argument("--without", nargs="*", default=[], choices=["peft", "base", "hf", "vllm"], help="contestants to leave out")
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 128], help="tokens: one length, or from, to")
    parser.add_argument("--answer", type=int, nargs="+", default=[64], help="tokens: one length, or from, to")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 32], help="ttft: clients")
    parser.add_argument("--rounds", type=int, default=6, help="ttft: requests a client that count, of a client alone four times as many")
    parser.add_argument("--think", type=float, default=0.2, help="ttft: seconds that a client waits at most before it asks again")
    parser.add_argument("--ray", action="store_true", help="ttft: also the server that graft serve starts")
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf", help="ttft and hotload: the one that is behind the app")
    parser.add_argument("--loads", type=int, default=16, help="hotload: of each kind")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, help="seconds that a server's start or a load may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/graft-serve"), help="bases are kept there; short, for Ray's sockets")
    parser.add_argument("--out", type=Path, default=Path("serve.json"))
    parser.add_argument("--table", type=Path, nargs="+", help="of earlier calls' --out, and run nothing")
    parser.add_argument("--append", action="store_true", help="put the entry into RESULTS.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/RESULTS.md")
    args = parser.parse_args()
    args.what, args.folder, gpu = args.what or ["mixed", "ttft", "hotload"], args.folder.absolute(), gpus()[0] != "no GPU"
    if args.tiny:
        args.like, args.prompt, args.answer, args.rows, args.batch, args.rounds, args.loads, args.repeat = "tiny", [8, 32], [8], 18, 6, 2, 2, 1
        args.concurrent = [1, 4]
    if args.trained and not set(args.what) <= {"gate", "solo"}:
        parser.error("--trained is for gate and solo: the others ask random words")
    args.like = args.like or ("llama-3.1-8b" if gpu else "cpu-124m")
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    return args


def about(args: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    device, driver = gpus()
    if device == "no GPU":
        found = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device, driver = f"{found[0] if found else platform.machine()}, {os.cpu_count()} cores, no GPU", ""
    device += f" (driver {driver})" if driver else f", {os.environ.get('OMP_NUM_THREADS') or os.cpu_count()} threads"
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    what = (
        f"precision.py's base in {args.precision}"
        if args.trained
        else f"{args.like}{f' cut to {args.layers} layers' if args.layers else ''} in {args.precision}, {args.adapters} adapters"
    )
    command = " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    return {
        "what": what,
        "device": device,
        "versions": versions,
        "commit": commit or "unknown",
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


RUN = {"mixed": mixed, "solo": solo, "ttft": ttft, "hotload": hotload, "vllm": vllm, "gate": gate}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """This call, and its file after each run: the call may be cut off."""
    served, runs = made_to_know(args) if args.trained else made(args), list[dict[str, Any]]()
    call = {**about(args), "runs": runs}
    for part in args.what:

        def keep(figures: dict[str, Any], part: str = part) -> None:
            runs.append({"part": part, **figures})
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items() if k != "first_s"}
            print(f"{part}:", shown, flush=True)
            args.out.write_text(json.dumps([call], indent=1), encoding="utf-8")

        failed = attempt(lambda part=part, keep=keep: RUN[part](args, served, keep) or {})
        if failed:
            keep({"of": part, **failed})
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()  # servers have processes of their own
    return call


def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    calls = [call for path in args.table for call in json.loads(path.read_text(encoding="utf-8"))] if args.table else [measured(args)]
    alike(calls)
    entry = report(calls)
    print(entry)
    if args.append:
        args.results.write_text(appended(args.results.read_text(encoding="utf-8"), entry), encoding="utf-8")


if __name__ == "__main__":
    main()
