"""Just enough HTTP/1.1 for the fault-injecting endpoint: keep-alive, bodies with a Content-Length, one request at a time.

Made over asyncio's protocols, because a framework neither cuts a connection in the middle of a body nor sends one by bytes.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faulty_server import Endpoint

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}
CODES = {400: "invalid_request_error", 401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded", 500: "server_error", 503: "overloaded"}


class Connection(asyncio.Protocol):
    """One client's connection; one request at a time."""

    transport: asyncio.Transport

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.buffer, self.needed = endpoint, bytearray(), 0
        self.busy = self.counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.peer = transport.get_extra_info("peername")[0]
        self.endpoint.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.endpoint.connections.discard(self)
        self._idle()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while not self.busy and len(self.buffer) >= self.needed and self._request():
            pass

    def _request(self) -> bool:
        """Take one whole request out of the buffer and answer it; False where there is none yet."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self.buffer[:end].decode("latin-1")
        self.needed = end + 4 + int(_header(head, "content-length") or 0)
        if len(self.buffer) < self.needed:
            return False
        body = bytes(self.buffer[end + 4 : self.needed])
        del self.buffer[: self.needed]
        self.needed, self.busy = 0, True
        method, target, _ = head.split(" ", 2)
        path, _, query = target.partition("?")
        if (method, path) == ("POST", "/v1/chat/completions"):
            self.counted = True
            self.endpoint.truth.in_flight += 1
            self.endpoint.completions(self, body, _header(head, "authorization"))
        elif (method, path) == ("GET", "/report"):
            self.reply(200, json.dumps(self.endpoint.truth.report(by_key=query != "brief")).encode())
        elif (method, path) == ("POST", "/control"):
            self.endpoint.control(self, json.loads(body))
        else:
            self.error(404, f"no such thing here: {method} {path}")
        return True

    def deliver(self, fault: str | None, status: int, payload: bytes, headers: dict[str, str], drip_s: float) -> None:
        """Send what was generated, in the fault's manner; nobody may be there any more."""
        if self.transport.is_closing():
            return
        if fault == "truncated":
            payload = payload[: len(payload) // 2]
        if fault == "reset-paid":
            self.transport.abort()
        elif fault == "reset-body":
            self.transport.write(_head(status, len(payload), headers) + payload[: len(payload) // 2])
            asyncio.get_running_loop().call_later(0.02, self.transport.abort)
        elif fault == "drip":
            self.transport.write(_head(status, len(payload), headers))
            self._drip(payload, 0, drip_s)
        else:
            self.reply(status, payload, headers)

    def reply(self, status: int, payload: bytes, headers: dict[str, str] | None = None) -> None:
        self.transport.write(_head(status, len(payload), headers or {}) + payload)
        self._idle()

    def error(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": REASONS.get(status, "error"), "param": None, "code": code or CODES.get(status)}
        self.reply(status, json.dumps({"error": error}).encode(), headers)

    def _drip(self, payload: bytes, at: int, drip_s: float) -> None:
        if at == len(payload):
            self._idle()
        elif not self.transport.is_closing():
            self.transport.write(payload[at : at + 1])
            asyncio.get_running_loop().call_later(drip_s, self._drip, payload, at + 1, drip_s)

    def _idle(self) -> None:
        if self.counted:
            self.endpoint.truth.in_flight -= 1
        self.busy = self.counted = False


def _header(head: str, name: str) -> str:
    at = head.lower().find(f"\r\n{name}:")
    return head[at + len(name) + 3 :].split("\r\n", 1)[0].strip() if at >= 0 else ""


def _head(status: int, length: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode()
