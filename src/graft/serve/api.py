"""The HTTP side: OpenAI's chat completions over a Runner, as a plain ASGI app that knows nothing of Ray.

What a request may hold is what the server does; a field that it would ignore is refused by name, in OpenAI's error shape.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from graft.core.errors import ServeError
from graft.engine.protocol import Request
from graft.model.chat import render_prompt
from graft.serve.runner import Overloaded, Runner, ServeSpec, Ticket

MAX_BODY = 2 << 20  # bytes; a prompt of 128k tokens is about a quarter of it
BURST_S = 0.025  # streamed tokens of this long go out together
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(Strict):
    include_usage: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(Strict):
    """The fields of https://platform.openai.com/docs/api-reference/chat/create that are served."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None  # None is 1, as there
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None, BeforeValidator(_as_list)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None


class ApiError(ServeError):
    """An HTTP error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, headers={"Retry-After": "1"} if self.status in (429, 503) else None)


def build(runner: Runner, key_sha256: str | None = None) -> ASGIApp:
    """The app; with `key_sha256`, every route but /health needs `Authorization: Bearer` and the key of that hash."""
    spec, created = runner.spec, int(time.time())
    cards = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "graft",
            "root": spec.base_name,
            "parent": spec.base_name if adapter else None,
        }
        | {"fingerprint": spec.fingerprint(name)}
        for name, adapter in spec.models().items()
    ]
    fingerprints = {card["id"]: card["fingerprint"] for card in cards}
    html = resources.files("graft.serve").joinpath("chat.html").read_text(encoding="utf-8")

    async def page(http: HTTPRequest) -> Response:
        return HTMLResponse(html, headers=PAGE_HEADERS)

    async def health(http: HTTPRequest) -> Response:
        return JSONResponse({"status": "up"})

    async def ready(http: HTTPRequest) -> Response:
        return JSONResponse({"status": runner.state, "error": runner.error}, 200 if runner.state == "ready" else 503)

    async def models(http: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": cards})

    async def model(http: HTTPRequest) -> Response:
        found = [card for card in cards if card["id"] == http.path_params["id"]]
        if not found:
            raise unknown_model(http.path_params["id"], spec)
        return JSONResponse(found[0])

    async def chat(http: HTTPRequest) -> Response:
        asked = parse(await read_body(http))
        if asked.model not in spec.models():
            raise unknown_model(asked.model, spec)
        try:
            ticket = runner.submit(to_request(asked, runner))
        except Overloaded as e:
            raise ApiError(429, str(e), code="overloaded") from None
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprints[asked.model],
        }
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(events(ticket, head, usage), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(await whole(ticket, head))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        runner.stop()

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/ready", ready),
        Route("/v1/models", models),
        Route("/v1/models/{id}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {ApiError: on_api_error, ServeError: on_serve_error, HTTPException: on_http_error, 500: on_bug}
    middleware = [Middleware(Guard, key_sha256=key_sha256)] if key_sha256 else []
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware, lifespan=lifespan)


async def read_body(http: HTTPRequest) -> bytes:
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
    return body


def parse(body: bytes) -> ChatRequest:
    """The validated request; ApiError 400 names the first field that is wrong or not served."""
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        param = ".".join(map(str, error["loc"])) or None
        if error["type"] == "extra_forbidden":
            fields = ", ".join((Message if "messages" in error["loc"] else ChatRequest).model_fields)
            raise ApiError(400, f"unsupported field {param!r}: this server takes {fields}", param, "unsupported_parameter") from None
        if error["type"] == "missing":
            raise ApiError(400, f"missing field {param!r}", param, "missing_required_parameter") from None
        raise ApiError(400, f"{param or 'the body'}: {error['msg']}", param, "invalid_value" if param else "invalid_json") from None
    if asked.stream_options and not asked.stream:
        raise ApiError(400, "stream_options goes with stream = true only", "stream_options", "invalid_value")
    if asked.max_tokens and asked.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens mean the same: give one", "max_tokens", "invalid_value")
    return asked


def to_request(asked: ChatRequest, runner: Runner) -> Request:
    """The engine's request; ServeError before the model is ready, ApiError 400 where the conversation does not fit it."""
    max_length = runner.ready_engine().max_length
    try:
        prompt = render_prompt(runner.tokenizer, [m.model_dump() for m in asked.messages])
    except TemplateError as e:
        raise ApiError(400, f"the model's chat template refuses the messages: {e}", "messages", "invalid_value") from None
    wanted, room = asked.max_completion_tokens or asked.max_tokens, max_length - len(prompt)
    if (wanted or 1) > room:
        message = f"the messages take {len(prompt)} tokens and {wanted or 1} more are asked for: the model holds {max_length}"
        raise ApiError(400, message, "messages", "context_length_exceeded")
    return Request(
        prompt_ids=prompt,
        max_new_tokens=wanted or room,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        adapter=runner.spec.models()[asked.model],
        stop=tuple(asked.stop or ()),
    )


async def whole(ticket: Ticket, head: dict[str, Any]) -> dict[str, Any]:
    chunks = []
    async with aclosing(ticket.bursts()) as bursts:
        async for burst in bursts:
            chunks += burst
    message = {"role": "assistant", "content": "".join(c.text for c in chunks), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": chunks[-1].finish_reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(ticket, sum(c.token is not None for c in chunks))}


async def events(ticket: Ticket, head: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the role, the text as it comes, the finish reason, the usage if asked for, [DONE]."""

    def event(delta: dict[str, str] | None, reason: str | None = None, usage: dict[str, int] | None = None) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        data = {**head, "object": "chat.completion.chunk", "choices": choices, **({"usage": usage} if include_usage else {})}
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    tokens, reason = 0, None
    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(ticket.bursts(BURST_S)) as bursts:
            async for burst in bursts:
                tokens, reason = tokens + sum(c.token is not None for c in burst), burst[-1].finish_reason
                if text := "".join(c.text for c in burst):
                    yield event({"content": text})
    except ServeError as e:  # the status went out long ago: the error goes into the stream, where clients look for it
        yield f"data: {json.dumps(ApiError(500, str(e)).body)}\n\n"
        return
    yield event({}, reason)
    if include_usage:
        yield event(None, usage=usage_of(ticket, tokens))
    yield "data: [DONE]\n\n"


def usage_of(ticket: Ticket, completion: int) -> dict[str, int]:
    prompt = len(ticket.request.prompt_ids)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def unknown_model(name: str, spec: ServeSpec) -> ApiError:
    return ApiError(404, f"the model {name!r} does not exist: this server has {', '.join(spec.models())}", "model", "model_not_found")


async def on_api_error(http: HTTPRequest, error: ApiError) -> Response:
    return error.response()


async def on_serve_error(http: HTTPRequest, error: ServeError) -> Response:
    return ApiError(503, str(error)).response()


async def on_http_error(http: HTTPRequest, error: HTTPException) -> Response:
    return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()


async def on_bug(http: HTTPRequest, error: Exception) -> Response:
    return ApiError(500, "the server failed on this request: see its log").response()


class Guard:
    """Lets a request pass that carries the key; compares hashes, in constant time."""

    def __init__(self, app: ASGIApp, key_sha256: str):
        self.app, self.key_sha256 = app, key_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if not (hmac.compare_digest(hashlib.sha256(key.strip()).hexdigest(), self.key_sha256) and scheme.lower() == b"bearer"):
                error = ApiError(
                    401, "this server needs its key: send `Authorization: Bearer` and the server's GRAFT_API_KEY", code="invalid_api_key"
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
