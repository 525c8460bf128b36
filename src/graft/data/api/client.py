"""The other end of the broker's WebSocket: a process that asks for grants and hands in what came back.

Messages are MessagePack maps of lists, many items each: out {"hello", "want": [[key, usd, tokens]], "settle": [...]} and
{"ask": n, …}; in {"grant": [[key, attempt]], "known", "budget", "stopped", "halt", "durable"} and {"reply": n, "value"}.
When the broker's process ends, the client waits for the next holder of the lease and tells it all that is still undecided.
"""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from graft.core.errors import ArtifactError
from graft.data.api.lease import Lease, this_process
from graft.data.api.limits import Grouping

PATIENCE_S = 60.0  # without any broker


@dataclass(frozen=True)
class Decision:
    """What the broker says to a request: "grant" (with the attempt's number), "known", "budget" or "stopped"."""

    what: str
    attempt: int = 0
    kind: str = ""
    reason: str = ""


class Client:
    """One process's connection, used inside one event loop.

    hello: {"session", "account", "endpoint", "model", "limits"}: the run that this process works for.
    """

    def __init__(self, ledger: Path, hello: dict[str, Any]):
        self.lease, self.hello = Lease(ledger), {**hello, "owner": f"{this_process()}#{uuid.uuid4().hex[:8]}"}
        self.halted: dict[str, str] | None = None
        self._wants: dict[str, deque[tuple[list[Any], asyncio.Future[Decision]]]] = {}
        self._settles: dict[int, tuple[dict[str, Any], asyncio.Future[None]]] = {}
        self._asks: dict[int, tuple[dict[str, Any], asyncio.Future[Any]]] = {}
        self._granted: dict[int, float] = {}  # attempts that are ours and not settled, and since when
        self._grouping = Grouping()
        self._out: dict[str, list[Any]] = {}
        self._error: ArtifactError | None = None
        self._number = 0
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._stay_connected())

    async def claim(self, key: str, usd: float, tokens: int) -> Decision:
        """Wait for the broker's decision on a request of at most `usd` and `tokens`."""
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        want = [key, usd, tokens]
        self._wants.setdefault(key, deque()).append((want, future))
        self._send("want", want)
        return await self._or_broken(future)

    async def settle(self, item: dict[str, Any]) -> None:
        """Hand in what became of an attempt; returns when it is durable."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settles[item["attempt"]] = (item, future)
        self._grouping.took(time.monotonic() - self._granted.get(item["attempt"], time.monotonic()))
        self._send("settle", item)
        await self._or_broken(future)

    async def ask(self, **question: Any) -> Any:
        """`answers=[keys]` -> {key: raw response}, `usage=account` -> pairs, `stats=session` -> figures."""
        self._number += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asks[self._number] = ({"ask": self._number, **question}, future)
        self._wake.set()
        return await self._or_broken(future)

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _or_broken(self, future: asyncio.Future[Any]) -> Any:
        if self._error:
            raise self._error
        return await future

    def _send(self, what: str, item: Any) -> None:
        self._out.setdefault(what, []).append(item)
        self._wake.set()

    async def _stay_connected(self) -> None:
        import aiohttp

        alone_since = time.monotonic()
        async with aiohttp.ClientSession(trust_env=False) as http:
            while True:
                address = self.lease.address()
                if address:
                    with suppress(aiohttp.ClientError, OSError):
                        headers = {"Authorization": f"Bearer {address.token}"}
                        async with http.ws_connect(f"{address.url}/broker", headers=headers, max_msg_size=0, autoping=True, heartbeat=30) as socket:
                            await self._talk(socket)
                        alone_since = time.monotonic()
                if self._error:
                    return
                if time.monotonic() - alone_since > PATIENCE_S:
                    self._fail(
                        ArtifactError(f"nobody writes the request ledger of {self.lease.address_path.parent}: the run that did has ended; run again")
                    )
                    return
                await asyncio.sleep(0.1)

    async def _talk(self, socket: Any) -> None:
        from aiohttp import WSCloseCode

        self._out = {
            "want": [want for waiting in self._wants.values() for want, _ in waiting],
            "settle": [item for item, _ in self._settles.values()],
        }
        self._out = {k: v for k, v in self._out.items() if v}
        asked: set[int] = set()
        await socket.send_bytes(msgpack.packb({"hello": {**self.hello, "holding": sorted(self._granted)}}))
        self._wake.set()
        writer = asyncio.create_task(self._write(socket, asked))
        try:
            async for message in socket:
                if isinstance(message.data, bytes):
                    self._read(msgpack.unpackb(message.data))
            if socket.close_code == WSCloseCode.INTERNAL_ERROR:
                self._fail(
                    ArtifactError(
                        f"the process that writes {self.lease.address_path.parent} could not read a message of this one: run one version of graft"
                    )
                )
        finally:
            writer.cancel()

    async def _write(self, socket: Any, asked: set[int]) -> None:
        with suppress(ConnectionError):  # the reader sees the end of it
            while True:
                await self._wake.wait()
                await asyncio.sleep(self._grouping.seconds)
                self._wake.clear()
                if self._out:
                    message, self._out = self._out, {}
                    await socket.send_bytes(msgpack.packb(message))
                for number in [n for n in self._asks if n not in asked]:
                    asked.add(number)
                    await socket.send_bytes(msgpack.packb(self._asks[number][0]))

    def _read(self, message: dict[str, Any]) -> None:
        for key, attempt in message.get("grant", ()):
            self._granted[attempt] = time.monotonic()
            self._decide(key, Decision("grant", attempt))
        for key in message.get("known", ()):
            self._decide(key, Decision("known"))
        for key in message.get("budget", ()):
            self._decide(key, Decision("budget"))
        for stop in message.get("stopped", ()):
            self._decide(stop["key"], Decision("stopped", kind=stop["kind"], reason=stop["reason"]))
        for halt in message.get("halt", ()):
            self.halted = halt
        for attempt in message.get("durable", ()):
            self._granted.pop(attempt, None)
            if attempt in self._settles:
                _settled(self._settles.pop(attempt)[1], None)
        if "reply" in message and message["reply"] in self._asks:
            _settled(self._asks.pop(message["reply"])[1], message["value"])

    def _decide(self, key: str, decision: Decision) -> None:
        """The first who wants the key gets the decision; an answer is for all of them."""
        waiting = self._wants.get(key)
        if not waiting and decision.what == "grant":  # who wanted it has gone
            self._send("settle", unsent(decision.attempt, key))
        while waiting:
            _settled(waiting.popleft()[1], decision)
            if decision.what != "known":
                break
        if not waiting:
            self._wants.pop(key, None)

    def _fail(self, error: ArtifactError) -> None:
        self._error = error
        futures = [f for waiting in self._wants.values() for _, f in waiting]
        futures += [f for _, f in self._settles.values()] + [f for _, f in self._asks.values()]  # type: ignore[misc]
        for future in futures:
            if not future.done():
                future.set_exception(error)


def collect_rarely() -> None:
    """Let the garbage collector leave alone what is loaded by now, and look at the rest less often.

    Thousands of live requests, scanned at every turn, cost a caller a fifth of its throughput and the broker a third of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def unsent(attempt: int, key: str) -> dict[str, Any]:
    """What `settle` takes for a grant that was not used."""
    nothing: dict[str, Any] = {"usd": 0.0, "tokens": 0, "request": None, "response": None, "headers": {}, "reason": "", "kind": ""}
    return {"attempt": attempt, "key": key, "state": "free", "outcome": "unsent", **nothing}


def _settled(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
