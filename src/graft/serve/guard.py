"""What stands before every route: who asks, how much at once, how large a body.

Keys are compared as SHA-256, in constant time; a key of inference does not open /admin. They are sent as `Authorization: Bearer KEY`, or, by
a browser, as the password of basic authentication, so that the chat page works too. Without keys only this machine is answered, and only under its own
names: a page elsewhere whose name is made to point here is not. Bodies are JSON and say so, which a form of another page cannot; they may be
long only where a model sees images, and of all long ones BODIES bytes are held at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.core.errors import ConfigError
from graft.serve.requests import MAX_BODY, ApiError

MAX_WITH_IMAGES = 24 << 20  # bytes of a conversation, where the base sees images
BODIES = 512 << 20  # bytes of all bodies that are longer than MAX_BODY
BODY_S = 120.0  # in which a body must be whole
DRAINED = 64 << 20  # bytes that are read of a body that is refused
CHAT = "/v1/chat/completions"  # the one route that takes images
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
    """max_concurrent: requests of one key that ask a model; sees_images: whether that may take images, as any may before it is loaded."""

    def __init__(self, app: ASGIApp, keys: Keys, max_concurrent: int, sees_images: Callable[[], bool]):
        self.app, self.keys, self.max_concurrent, self.sees_images = app, keys, max_concurrent, sees_images
        self.under_way: Counter[str] = Counter()
        self.long: dict[int, int] = {}  # bytes of the bodies that are longer than MAX_BODY, by id of the scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            try:
                holder = self._admitted(scope)
                if scope["method"] == "POST":
                    receive = _replayed(await self._body(scope, receive), receive)
            except ApiError as e:
                await answer(e)(scope, receive, send)
                return
            await self._asked(holder, scope, receive, send)
        finally:
            self.long.pop(id(scope), None)

    async def _asked(self, holder: str, scope: Scope, receive: Receive, send: Send) -> None:
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

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        if Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, and say so: Content-Type: application/json", None, "unsupported_media_type")
        shown = scope["path"] == CHAT and self.sees_images()
        most, body = MAX_WITH_IMAGES if shown else MAX_BODY, bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its request was whole")
                    body += message.get("body", b"")
                    if error := self._too_long(scope, len(body), most):
                        body.clear()
                        self.long.pop(id(scope), None)
                        if message.get("more_body"):
                            await _drained(receive)
                        raise error
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body was not whole after {BODY_S:g} s") from None

    def _too_long(self, scope: Scope, size: int, most: int) -> ApiError | None:
        if size > most:
            return ApiError(413, f"the body is larger than {most} bytes")
        if size > MAX_BODY:
            self.long[id(scope)] = size
            if (held := sum(self.long.values())) > BODIES:
                return ApiError(429, f"bodies of {held >> 20} MiB are under way already, try again soon", None, "overloaded")
        return None


def answer(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {"WWW-Authenticate": 'Basic realm="graft: the key is the password"'}
    return JSONResponse(error.body, error.status, headers=headers if error.status in (401, 429, 503) else None)


async def _drained(receive: Receive) -> None:
    """Once the client has sent all, or much more: while it writes it does not read why it is refused."""
    left = DRAINED
    while left > 0:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
        left -= len(message.get("body", b""))


def _replayed(left: bytes | None, receive: Receive) -> Receive:
    async def replay() -> Message:
        nonlocal left
        if left is None:
            return await receive()
        given, left = left, None  # not kept while the answer is under way
        return {"type": "http.request", "body": given, "more_body": False}

    return replay
