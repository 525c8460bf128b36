"""The parts of benchmarks/serve.py that need a server or its Runner: the app's time to first token, and adapters that are loaded while it serves."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from serve_bases import IDENTITY, Served, lengths, publish, text_of
from serve_table import BARE

LOADS = ("engine.load", "Catalog.load, judged before", "Catalog.load with the gate")
TRIES, SETTLED = 50, 8
Keep = Callable[[dict[str, Any]], None]  # a run's figures


# ---- ttft ------------------------------------------------------------------------------------------------------------------
def spec_of(args: argparse.Namespace, served: Served) -> dict[str, Any]:
    """A ServeSpec's fields."""
    longest = args.prompt[-1] + args.answer[-1] * 3 // 2 + 64
    return {
        **{"base": str(served.base), "revision": None, "precision": args.precision, "identity": IDENTITY, "tokenizer": str(served.base)},
        **{"store": str(served.store), "ready": list(served.adapters), "max_batch": max(args.concurrent), "max_adapters": len(served.adapters) + 1},
        "engine": args.engine,
        "kv_tokens": 2 * max(args.concurrent) * longest,
    }


def load_of(args: argparse.Namespace, served: Served, concurrent: int) -> dict[str, Any]:
    """--rounds requests a client and one that is not counted, answers of half to one and a half of --answer, and pauses before each, so that clients fall
    out of step: who asks again as soon as an answer ends finds the engine between two steps, which over HTTP nobody does."""
    from graft.model.chat import render_prompt

    rng, tokenizer = np.random.default_rng(concurrent), served.tokenizer()
    names: list[str | None] = [None, *served.adapters]
    requests = []
    for n in range(concurrent * (1 + (args.rounds if concurrent > 1 else 4 * args.rounds))):
        messages = [{"role": "user", "content": text_of(served, tokenizer, lengths(args.prompt, 1, rng)[0], rng)}]
        answer = int(rng.integers(max(1, args.answer[0] // 2), args.answer[-1] * 3 // 2 + 1))
        request = {"messages": messages, "ids": render_prompt(tokenizer, messages), "answer": answer, "model": names[n % len(names)]}
        requests.append(request | {"pause_s": float(rng.uniform(0, args.think))})
    return {"concurrent": concurrent, "requests": requests}


@contextmanager
def process(*words: str, ray_home: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """serve_peers.py with these words; it ends when its stdin does."""
    environment = {**os.environ, **({"HOME": str(ray_home), "RAY_TMPDIR": str(ray_home)} if ray_home else {})}
    command = [sys.executable, str(Path(__file__).with_name("serve_peers.py")), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as started:
        try:
            yield started
        finally:
            assert started.stdin
            with suppress(OSError):
                started.stdin.close()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()


def until(started: subprocess.Popen[str], mark: str) -> None:
    assert started.stdout
    for line in started.stdout:
        if line.strip() == mark:
            return
    raise RuntimeError(f"{' '.join(map(str, started.args[-2:]))} ended with {started.wait()}")  # type: ignore[index]


def ttft(args: argparse.Namespace, served: Served, keep: Keep) -> None:
    """Each contestant is up all the while; loads go to one after another."""
    from graft.serve.app import wait_until_ready

    publish(served, args.precision)
    folder = args.folder / "ttft"
    folder.mkdir(exist_ok=True)
    with ExitStack() as running:
        ports: dict[str, int] = {}
        for of in ("app, uvicorn", *(["app, Ray Serve"] if args.ray else [])):
            ports[of] = free_port()
            file, ray = folder / f"server-{ports[of]}.json", "Ray" in of
            file.write_text(json.dumps({**spec_of(args, served), "port": ports[of], "ray": ray}), encoding="utf-8")
            running.enter_context(process("server", str(file), ray_home=folder if ray else None))
            wait_until_ready("127.0.0.1", ports[of], None, time.monotonic() + args.limit)
        file = folder / "bare.json"
        file.write_text(json.dumps(spec_of(args, served)), encoding="utf-8")
        bare = running.enter_context(process("bare", str(file)))
        until(bare, "@ready")

        def asked(of: str, load: Path) -> None:
            if of == BARE:
                assert bare.stdin
                print(load, file=bare.stdin, flush=True)
                until(bare, "@done")
            else:
                subprocess.run([sys.executable, Path(__file__).with_name("serve_peers.py"), "client", load], check=True, timeout=args.limit)

        for concurrent in args.concurrent:
            load = load_of(args, served, concurrent)
            for _ in range(args.repeat):
                for of in (BARE, *ports):
                    file = folder / "load.json"
                    file.write_text(json.dumps({**load, "host": "127.0.0.1", "port": ports.get(of)}), encoding="utf-8")
                    asked(of, file)
                    found = json.loads(file.with_suffix(".out").read_text(encoding="utf-8"))
                    p50, p95 = (float(np.quantile(found["first_s"], q)) * 1e3 for q in (0.5, 0.95))
                    figures = {"of": of, "concurrent": concurrent, "p50_ms": p50, "p95_ms": p95, "requests": len(found["first_s"])}
                    keep(figures | {"tokens_per_s": found["tokens"] / found["wall_s"], "first_s": found["first_s"]})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# ---- hotload ---------------------------------------------------------------------------------------------------------------
def hotload(args: argparse.Namespace, served: Served, keep: Keep) -> None:
    """Each way of loading, from RAM and from disk in turn, of adapter after adapter; then what a load holds up of a row under way."""
    from graft.serve.catalog import Catalog
    from graft.serve.runner import Runner
    from graft.serve.spec import ServeSpec

    publish(served, args.precision)
    runner = Runner(ServeSpec(**{**spec_of(args, served), "ready": ()}))
    while runner.state == "loading":
        time.sleep(0.02)
    catalog = Catalog(runner)

    async def scene() -> None:
        await catalog.refresh()
        identities = list(catalog.names.values())
        await loaded(catalog, identities[0], "engine.load", "from RAM")  # slots are made
        for n in range(args.loads):
            for source in ("from RAM", "from disk"):
                for of in LOADS:
                    load_s = await loaded(catalog, identities[n % len(identities)], of, source)
                    keep({"of": of, "source": source, "load_ms": load_s * 1e3})
        for n in range(max(1, args.loads // 4)):
            for of in LOADS:
                load_s, pauses_s = await watched(catalog, identities[n % len(identities)], of, served.words)
                figures = {"of": f"{of}, beside a row", "source": "from RAM", "load_ms": load_s * 1e3, "pause_ms": max(pauses_s) * 1e3}
                keep(figures | {"step_ms": float(np.median(pauses_s)) * 1e3})

    try:
        asyncio.run(scene())
    finally:
        runner.stop()
        runner.thread.join()


async def loaded(catalog: Any, identity: str, of: str, source: str) -> float:
    """Seconds of one load of a version that is not in memory; of the engine's own they run in its thread."""
    runner, entry = catalog.runner, catalog.entries[identity]

    def into(engine: Any) -> float:
        began = time.perf_counter()
        engine.load(identity, entry.version.folder)
        if engine.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - began

    if of != "engine.load" and entry.verdict is None:
        await catalog.load(identity)
    await catalog.unload(identity)
    ready(entry.version.folder, source)
    if of == "engine.load":
        load_s: float = await runner.call(into)
        await catalog.unload(identity)
        return load_s
    began = time.perf_counter()
    await catalog.load(identity, again="gate" in of)
    return time.perf_counter() - began


async def watched(catalog: Any, identity: str, of: str, prompt: list[int]) -> tuple[float, list[float]]:
    """loaded() from RAM while a row of the base is under way, and the seconds between its tokens meanwhile."""
    from graft.engine.protocol import Request

    came: list[float] = []
    prompt = prompt[:32]
    if of != "engine.load" and catalog.entries[identity].verdict is None:
        await catalog.load(identity)
    ticket = await catalog.runner.submit(Request(prompt, catalog.runner.engine.max_length - len(prompt), ends=()))

    async def read() -> None:
        async for _ in ticket.bursts():
            came.append(time.perf_counter())

    reading = asyncio.create_task(read())
    try:
        while len(came) < SETTLED:
            await asyncio.sleep(0.001)
        load_s = await loaded(catalog, identity, of, "from RAM")
        more = len(came) + 2
        while len(came) < more and not reading.done():
            await asyncio.sleep(0.001)
    finally:
        reading.cancel()
    return load_s, np.diff(came).tolist()


def ready(folder: Path, source: str) -> None:
    """Have the files in the page cache, or out of it; RuntimeError where they stay."""
    for file in folder.iterdir():
        if source == "from RAM":
            file.read_bytes()
        elif not any(dropped(file) for _ in range(TRIES)):
            raise RuntimeError(f"{file.name} stays in the page cache: --folder is on no disk")


def dropped(file: Path) -> bool:
    """Whether no page of the file is cached, once the kernel was asked to drop them."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        for at in range(0, os.fstat(handle).st_size, 1 << 20):
            with suppress(BlockingIOError):  # what a read that may not wait gives of a page that is not there
                os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT)
                time.sleep(0.01)  # a page that was just read may be on its way to the kernel's lists
                return False
        return True
    finally:
        os.close(handle)
