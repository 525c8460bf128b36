"""What stands before every route: who asks, how much at once, how large a body.

Keys are compared as SHA-256, in constant time; a key of inference does not open /admin. They are sent as `Authorization: Bearer KEY`, or, by
a browser, as the password of basic authentication, so that the chat page works too. Without keys only this machine is answered, and only under its own
names: a page elsewhere whose name is made to point here is not. Bodies are JSON and say so, which a form of another page cannot.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.core.errors import ConfigError
from graft.serve.requests import ApiError

MAX_BODY = 2 << 20  # bytes; a prompt of 128k tokens is about a quarter of it
OWN_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Keys:
    """SHA-256 of the keys, in hex. Without any of inference the server is open, to this machine."""

    inference: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Keys:
        """GRAFT_API_KEY and GRAFT_ADMIN_KEY, each one key or several with commas between them."""

        def hashed(name: str) -> frozenset[str]:
            return frozenset(hashlib.sha256(k.strip().encode()).hexdigest() for k in environment.get(name, "").split(",") if k.strip())

        found = cls(hashed("GRAFT_API_KEY"), hashed("GRAFT_ADMIN_KEY"))
        if found.admin and not found.inference:
            raise ConfigError("GRAFT_ADMIN_KEY is set and GRAFT_API_KEY is not: whoever reaches the server could ask it; set both")
        return found

    def holder(self, given: str | None) -> tuple[str | None, bool]:
        """(hash of a key that is known, whether it is of an administrator)."""
        if given is None:
            return None, False
        own = hashlib.sha256(given.encode()).hexdigest()
        of_admin = [k for k in self.admin if hmac.compare_digest(k, own)]
        found = [k for k in self.inference if hmac.compare_digest(k, own)]
        return next(iter(of_admin or found), None), bool(of_admin)


def given_key(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


class Guard:
    """max_concurrent: requests of one key that ask a model."""

    def __init__(self, app: ASGIApp, keys: Keys, max_concurrent: int):
        self.app, self.keys, self.max_concurrent = app, keys, max_concurrent
        self.under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            holder = self._admitted(scope)
            if scope["method"] == "POST":
                body = await _body(scope, receive)
                receive = _replayed(body, receive)
        except ApiError as e:
            await answer(e)(scope, receive, send)
            return
        if scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        if self.under_way[holder] >= self.max_concurrent:
            error = ApiError(
                429, f"{self.max_concurrent} requests of this key are under way (serve.max_concurrent): try again soon", None, "overloaded"
            )
            await answer(error)(scope, receive, send)
            return
        self.under_way[holder] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.under_way[holder] -= 1

    def _admitted(self, scope: Scope) -> str:
        """Who asks; ApiError where they may not."""
        headers, admin = Headers(scope=scope), scope["path"].startswith("/admin")
        if not self.keys.inference:
            host = headers.get("host", "").rpartition(":")[0] if not headers.get("host", "").endswith("]") else headers["host"]
            if (host or headers.get("host", "")).strip("[]") not in OWN_NAMES:
                raise ApiError(403, "without keys this server answers to localhost alone: set GRAFT_API_KEY to serve others", None, "forbidden_host")
            return "anyone"
        holder, of_admin = self.keys.holder(given_key(headers))
        if holder is None:
            raise ApiError(401, "this server needs its key: send `Authorization: Bearer` and the server's GRAFT_API_KEY", code="invalid_api_key")
        if admin and not of_admin:
            how = "send its GRAFT_ADMIN_KEY" if self.keys.admin else "start the server with GRAFT_ADMIN_KEY"
            raise ApiError(403, f"this route is for administrators: {how}", code="admin_key_required")
        return holder


def answer(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {"WWW-Authenticate": 'Basic realm="graft: the key is the password"'}
    return JSONResponse(error.body, error.status, headers=headers if error.status in (401, 429, 503) else None)


async def _body(scope: Scope, receive: Receive) -> bytes:
    if Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, and say so: Content-Type: application/json", None, "unsupported_media_type")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before its request was whole")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
