"""Keeps a workspace's broker alive: whoever runs `graft augment` stands by, one of them holds the lease and serves.

The holder listens on the loopback, or, where Ray spans machines, on the address that the other nodes reach; both ask for
the token of `ledger.address`. When the holder ends, by a kill or in peace, another takes the lease within half a second.
"""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress
from pathlib import Path

from graft.data.api.broker import Broker
from graft.data.api.lease import Lease
from graft.data.api.ledger import Ledger
from graft.data.cluster import reachable_address

STAND_BY_S = 0.3
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)  # what a message of another version, or a fault of ours, raises in the broker


async def keep(path: Path) -> None:
    """Stand by for the lease of the ledger at `path`, then serve it; ends by cancellation alone."""
    lease = Lease(path)
    try:
        while not lease.acquire():
            await asyncio.sleep(STAND_BY_S)
        await _serve(lease, path)
    finally:
        lease.release()


async def _serve(lease: Lease, path: Path) -> None:
    from aiohttp import WSCloseCode, web

    ledger = Ledger(path)
    broker = Broker(ledger)
    token = ""

    @web.middleware
    async def only_with_token(request: web.Request, handler: object) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token or not hmac.compare_digest(given.encode(), token.encode()):
            return web.Response(status=401)
        return await handler(request)  # type: ignore[operator]

    async def alive(request: web.Request) -> web.Response:
        return web.Response()

    async def connect(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0, heartbeat=30)
        await socket.prepare(request)
        try:
            await broker.handle(socket)
        except UNREADABLE as e:  # that client alone is told
            await socket.close(code=WSCloseCode.INTERNAL_ERROR, message=repr(e).encode()[:100])
        return socket

    app = web.Application(middlewares=[only_with_token])
    app.router.add_get("/alive", alive)
    app.router.add_get("/broker", connect)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    loop = asyncio.create_task(broker.run())
    try:
        host = reachable_address()
        await web.TCPSite(runner, host, 0).start()
        address = lease.publish(host, runner.addresses[0][1])
        token = address.token
        await loop
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop
        await runner.cleanup()
        ledger.close()
