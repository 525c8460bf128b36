"""The part of benchmarks/serve.py that sets the app over vLLM beside `vllm serve`: the same flags, the same requests, both up at once on one GPU."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from serve_bases import RANK, Served, lengths, publish
from serve_live import Keep, free_port, process, spec_of
from serve_table import APP, VLLM

BESIDE = 64  # tokens of keys and values a row beyond its own: blocks are not filled


def vllm(args: argparse.Namespace, served: Served, keep: Keep) -> None:
    """Bursts of --rows requests over the adapters, whole answers and streamed ones, to each server in turn; each burst has prompts of its own."""
    import torch
    from transformers import AutoConfig

    from graft.engine.cache import kv_bytes
    from graft.serve.app import wait_until_ready

    publish(served, args.precision)
    gc.collect()
    torch.cuda.empty_cache()
    folder = args.folder / "vllm"
    folder.mkdir(exist_ok=True)
    kv_tokens = args.rows * (args.prompt[-1] + args.answer[-1] + BESIDE)
    with ExitStack() as running:
        told = {**spec_of(args, served), "engine": "vllm", "max_batch": args.rows, "max_adapters": args.adapters, "max_rank": RANK}
        told |= {"kv_tokens": kv_tokens, "max_concurrent": 2 * args.rows, "port": free_port(), "ray": True}
        (folder / "server.json").write_text(json.dumps(told), encoding="utf-8")
        running.enter_context(process("server", str(folder / "server.json"), ray_home=folder))
        ports = {APP: told["port"]}
        if "vllm" not in args.without:  # both start meanwhile
            ports[VLLM] = running.enter_context(bare(args, served, kv_tokens * kv_bytes(AutoConfig.from_pretrained(served.base), 2), folder))
        wait_until_ready("127.0.0.1", told["port"], None, time.monotonic() + args.limit)
        for n in range(-1, args.repeat):  # the first of each is not counted
            for stream in (False, True):
                for of, port in ports.items():
                    file = folder / "load.json"
                    file.write_text(
                        json.dumps({"host": "127.0.0.1", "port": port, "requests": burst(args, served, 2 * n + stream, stream)}), encoding="utf-8"
                    )
                    subprocess.run([sys.executable, Path(__file__).with_name("serve_peers.py"), "burst", file], check=True, timeout=args.limit)
                    found = json.loads(file.with_suffix(".out").read_text(encoding="utf-8"))
                    if found["tokens"] != args.rows * args.answer[-1]:
                        raise RuntimeError(f"{of} gave {found['tokens']} tokens")
                    first_s = np.quantile(found["first_s"], [0.0, 0.5])
                    figures = {"of": of, "stream": stream, "tokens_per_s": found["tokens"] / found["wall_s"], "wall_s": found["wall_s"]}
                    if n >= 0:  # else the first burst, which compiles
                        keep(figures | {"first_ms": float(first_s[0]) * 1e3, "first_p50_ms": float(first_s[1]) * 1e3})


def burst(args: argparse.Namespace, served: Served, seed: int, stream: bool) -> list[dict[str, Any]]:
    rng, names = np.random.default_rng(1000 + seed), list(served.adapters)
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return [
        {
            "model": names[n % len(names)],
            "prompt": rng.choice(served.words, length).tolist(),
            "max_tokens": args.answer[-1],
            "temperature": 0,
            **streamed,
        }
        for n, length in enumerate(lengths(args.prompt, args.rows, rng))
    ]


@contextmanager
def bare(args: argparse.Namespace, served: Served, kv_size: int, folder: Path) -> Iterator[int]:
    """The port of a `vllm serve` that is ready."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(served.base), "--port", str(port), "--dtype", "bfloat16"]
    command += ["--enable-lora", "--max-loras", str(args.adapters), "--max-cpu-loras", str(args.adapters + 1), "--max-lora-rank", str(RANK)]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in served.adapters.items()), "--max-num-seqs", str(args.rows)]
    command += ["--max-model-len", "auto", "--kv-cache-memory-bytes", str(kv_size), "--gpu-memory-utilization", "0.01", "--generation-config", "vllm"]
    command += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    with (folder / "vllm.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as started:
        try:
            deadline = time.monotonic() + args.limit
            while not answers(port):
                if started.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve ended with {started.poll()}: {(folder / 'vllm.log').read_text()[-1500:]}")
                time.sleep(0.2)
            yield port
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
