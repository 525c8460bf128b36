"""What benchmarks/serve.py sets against graft's engine and app, and the processes that its times to first token are taken in.

PEFT generates for mixed batches in the caller's process. `python serve_peers.py server|bare|client|burst FILE` are processes of their own: the app over
uvicorn, or the server that `graft serve` starts (`ray`); the engine behind its Runner alone; and the clients, one process and one asyncio loop over
raw connections, which imports nothing but the standard library and looks at no more of an answer than its first text and its end.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

FIRST = re.compile(rb'"(?:content|text)":\s*"(?!")')  # an event with text in it
END = b"0\r\n\r\n"  # of a chunked body
LENGTH, USAGE = re.compile(rb"(?i)content-length: *(\d+)"), re.compile(rb'"completion_tokens": *(\d+)')


class Peft:
    """PeftModel.generate with adapter_names: batches of rows that begin and end together, padded on the left."""

    def __init__(self, base: Path, adapters: dict[str, Path], precision: str, device: Any):
        from peft import PeftModel

        from graft.model.base import DTYPES, load_base

        model = load_base(str(base), None, precision, device)
        model.generation_config.eos_token_id = None  # no answer ends before its length
        model.generation_config.pad_token_id = 0
        (first, folder), *others = adapters.items()
        self.model = PeftModel.from_pretrained(model, folder, adapter_name=first, autocast_adapter_dtype=False)
        for name, folder in others:
            self.model.load_adapter(folder, name, autocast_adapter_dtype=False)
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(device, DTYPES[precision])
        self.model.eval()
        self.device = device

    def __call__(self, rows: list[tuple[list[int], int, str | None]], batch: int) -> list[list[int]]:
        """rows: (prompt, tokens to generate, adapter or None for the base); a batch generates as many as its longest row wants."""
        import torch

        found: dict[int, list[int]] = {}
        order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))  # as the engine does: little is padded
        for start in range(0, len(rows), batch):
            numbers = order[start : start + batch]
            longest, most = max(len(rows[n][0]) for n in numbers), max(rows[n][1] for n in numbers)
            ids = torch.tensor([[0] * (longest - len(rows[n][0])) + rows[n][0] for n in numbers], device=self.device)
            mask = torch.tensor([[0] * (longest - len(rows[n][0])) + [1] * len(rows[n][0]) for n in numbers], device=self.device)
            names = [rows[n][2] or "__base__" for n in numbers]
            with torch.inference_mode():
                out = self.model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, do_sample=False, max_new_tokens=most)
            for n, own in zip(numbers, out[:, longest:].tolist(), strict=True):
                found[n] = own[: rows[n][1]]
        return [found[n] for n in range(len(rows))]


# ---- load ------------------------------------------------------------------------------------------------------------------
Ask = Callable[[dict[str, Any]], Awaitable[float]]  # one request of a load, streamed to its end; when its first text came, by perf_counter


async def offered(load: dict[str, Any], client: Callable[[], Awaitable[Ask]]) -> dict[str, Any]:
    """As many clients as load["concurrent"], each with one request under way; the first of each is not counted. Seconds."""

    async def one(own: list[dict[str, Any]]) -> list[float]:
        ask, took = await client(), []
        for request in own:
            await asyncio.sleep(request["pause_s"])
            began = time.perf_counter()
            took.append(await ask(request) - began)
        return took

    n, requests = load["concurrent"], load["requests"]
    began = time.perf_counter()
    took = await asyncio.gather(*(one(requests[c::n]) for c in range(n)))
    return {"first_s": [t for own in took for t in own[1:]], "wall_s": time.perf_counter() - began, "tokens": sum(r["answer"] for r in requests)}


class Connection(asyncio.Protocol):
    """One kept connection to a server that answers in chunks."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.seen, self.first, self.over = bytearray(), 0.0, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.seen += data
        if not self.seen.startswith(b"HTTP/1.1 200") and not self.first and not self.over.done():
            self.over.set_exception(RuntimeError(bytes(self.seen[:500]).decode(errors="replace")))
        elif not self.first and FIRST.search(self.seen):
            self.first = now
        if self.seen.endswith(END) and not self.over.done():
            self.over.set_result(self.first or now)
        elif self.first:
            del self.seen[: -len(END)]

    def connection_lost(self, why: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(f"the server closed: {why}"))

    async def ask(self, head: bytes, body: bytes) -> float:
        self.seen.clear()
        self.first, self.over = 0.0, asyncio.get_running_loop().create_future()
        self.transport.write(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        found: float = await self.over
        return found


def over_http(load: dict[str, Any]) -> dict[str, Any]:
    host, port = load["host"], load["port"]
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n".encode()

    async def client() -> Ask:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)

        async def ask(request: dict[str, Any]) -> float:
            return await connection.ask(head, request["body"])

        return ask

    for request in load["requests"]:  # before any clock runs
        body = {
            "model": request["model"] or "base",
            "messages": request["messages"],
            "max_tokens": request["answer"],
            "temperature": 0,
            "stream": True,
        }
        request["body"] = json.dumps(body).encode()
    return asyncio.run(offered(load, client))


class Answer(asyncio.Protocol):
    """One connection, one request, its answer to the end; `over` gives (when its first text came, by perf_counter; its tokens by its own usage)."""

    def __init__(self, request: bytes):
        self.request, self.seen, self.size, self.first = request, bytearray(), 0, 0.0
        self.over: asyncio.Future[tuple[float, int]] = asyncio.get_running_loop().create_future()
        self.connected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.connected.set_result(transport)

    def data_received(self, data: bytes) -> None:
        if not self.first:
            self.first = time.perf_counter()
            found = LENGTH.search(data)  # none of a stream
            self.size = data.index(b"\r\n\r\n") + 4 + int(found[1]) if found else 0
        self.seen += data
        if not self.over.done() and (len(self.seen) >= self.size if self.size else self.seen.endswith(END)):
            usage = USAGE.findall(self.seen)
            if self.seen.startswith(b"HTTP/1.1 200") and usage:
                self.over.set_result((self.first, int(usage[-1])))
            else:
                self.over.set_exception(RuntimeError(bytes(self.seen[:500]).decode(errors="replace")))
        elif not self.size and len(self.seen) > 16384:
            del self.seen[2048:-2048]  # its head and its end are looked at

    def connection_lost(self, why: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(f"the server closed: {why}"))


async def all_at_once(load: dict[str, Any]) -> dict[str, Any]:
    """Every request on a connection of its own, all sent at one moment; seconds from there to each first byte and to the last end."""
    host, port = load["host"], load["port"]
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    answers = []
    for request in load["requests"]:
        body = json.dumps(request).encode()
        answers.append(Answer(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body))
    for own in answers:
        await asyncio.get_running_loop().create_connection(lambda own=own: own, host, port)  # type: ignore[misc]
    began = time.perf_counter()
    for own in answers:
        own.connected.result().write(own.request)
    found = await asyncio.gather(*(own.over for own in answers))
    wall_s = time.perf_counter() - began
    return {"wall_s": wall_s, "first_s": [first - began for first, _ in found], "tokens": sum(tokens for _, tokens in found)}


# ---- processes -------------------------------------------------------------------------------------------------------------
def spec_of(told: dict[str, Any]) -> Any:
    from graft.serve.spec import ServeSpec

    return ServeSpec(**{**told, "ready": tuple(told["ready"])})


def bare(told: dict[str, Any]) -> None:
    """Says "@ready", then answers each line of stdin, the file of a load, by a file beside it and "@done"."""
    from graft.core.store import AdapterStore
    from graft.engine.protocol import Request
    from graft.serve.runner import Runner

    spec = spec_of(told)
    runner, store = Runner(spec), AdapterStore(Path(spec.store))
    while runner.state == "loading":
        time.sleep(0.05)
    versions = {name: store.get(name) for name in spec.ready}

    async def load_adapters() -> None:
        for version in versions.values():
            await runner.call(lambda engine, v=version: engine.load(v.id, v.folder))

    async def client() -> Ask:
        async def ask(request: dict[str, Any]) -> float:
            adapter = versions[request["model"]].id if request["model"] else None
            ticket = await runner.submit(Request(request["ids"], request["answer"], adapter=adapter, ends=()))
            first = 0.0
            async for burst in ticket.bursts():
                if not first and any(chunk.text for chunk in burst):
                    first = time.perf_counter()
            return first or time.perf_counter()

        return ask

    asyncio.run(load_adapters())
    print("@ready", flush=True)
    for line in sys.stdin:
        file = Path(line.strip())
        found = asyncio.run(offered(json.loads(file.read_text(encoding="utf-8")), client))
        file.with_suffix(".out").write_text(json.dumps(found), encoding="utf-8")
        print("@done", flush=True)


def server(told: dict[str, Any]) -> None:
    """Serves until stdin ends."""
    if told.pop("ray"):
        from graft.serve.app import start

        with start(spec_of(told)):
            sys.stdin.read()
        return
    import uvicorn

    from graft.serve.api import build
    from graft.serve.runner import Runner

    spec = spec_of(told)
    serving = uvicorn.Server(uvicorn.Config(build(Runner(spec)), host=spec.host, port=spec.port, log_level="warning", access_log=False))

    def until_told() -> None:
        sys.stdin.read()
        serving.should_exit = True

    threading.Thread(target=until_told, daemon=True).start()
    serving.run()


def main() -> None:
    what, file = sys.argv[1], Path(sys.argv[2])
    told = json.loads(file.read_text(encoding="utf-8"))
    if what in ("client", "burst"):
        found = over_http(told) if what == "client" else asyncio.run(all_at_once(told))
        file.with_suffix(".out").write_text(json.dumps(found), encoding="utf-8")
    else:
        {"bare": bare, "server": server}[what](told)


if __name__ == "__main__":
    main()
