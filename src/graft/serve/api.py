"""The HTTP side: OpenAI's API over a Catalog and its Runner, as a plain ASGI app that knows nothing of Ray.

What a request may hold is what the server does (requests.py); who may ask, and how much, stands in front (guard.py); adapters are loaded, unloaded
and named under /admin while others answer (admin.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from html import escape
from importlib import resources
from typing import Any, TypeVar

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from graft.core.errors import ArtifactError, ConfigError, DataError, ServeError, Unreadable
from graft.engine.prompt import prompt
from graft.engine.protocol import Request
from graft.model.chat import IMAGE
from graft.model.images import Seen
from graft.serve import admin
from graft.serve.catalog import Catalog, Entry, Model, UnknownModel, patient
from graft.serve.gate import Refused
from graft.serve.guard import Guard, Keys, answer
from graft.serve.images import MAX_BYTES, Images
from graft.serve.metrics import Metrics
from graft.serve.openapi import document
from graft.serve.replies import Reply
from graft.serve.requests import ApiError, ChatRequest, CompletionRequest, Sampled, parse
from graft.serve.runner import Overloaded, Runner, Ticket

T = TypeVar("T")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
}


def build(runner: Runner, keys: Keys | None = None) -> ASGIApp:
    """The app. Its lifespan starts the catalog and stops the runner."""
    catalog, metrics, created = Catalog(runner), Metrics(), int(time.time())
    html = resources.files("graft.serve").joinpath("chat.html").read_text(encoding="utf-8")
    html = html.replace("<!-- system -->", escape(runner.spec.system or ""))
    service = Service(catalog, metrics)

    async def page(http: HTTPRequest) -> Response:
        return HTMLResponse(html, headers=PAGE_HEADERS)

    async def health(http: HTTPRequest) -> Response:
        return JSONResponse({"status": "up"})

    async def ready(http: HTTPRequest) -> Response:
        error = catalog.error or runner.error
        state = "failed" if catalog.failed else runner.state if runner.state != "ready" else "ready" if catalog.started else "loading"
        return JSONResponse({"status": state, "error": error}, 200 if state == "ready" else 503)

    async def told(http: HTTPRequest) -> Response:
        metrics.under_way.set(runner.under_way)
        metrics.image_bytes.set(service.images.held)
        for state in ("ready", "cold", "refused"):
            metrics.adapters.labels(state).set(sum(catalog.state(e) == state for e in catalog.entries.values()))
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(http: HTTPRequest) -> Response:
        return JSONResponse(document())

    async def models(http: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [card(name, entry, catalog, created) for name, entry in catalog.listed().items()]})

    async def model(http: HTTPRequest) -> Response:
        name = http.path_params["id"]
        listed = catalog.listed()
        entry = listed[name] if name in listed else catalog.entry(name)
        return JSONResponse(card(name, entry, catalog, created))

    async def chat(http: HTTPRequest) -> Response:
        return await service.answer(http, parse(b"".join([piece async for piece in http.stream()]), ChatRequest))  # body() would keep it

    async def completions(http: HTTPRequest) -> Response:
        return await service.answer(http, parse(await http.body(), CompletionRequest))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        following = asyncio.create_task(catalog.run())
        yield
        following.cancel()
        service.images.close()
        runner.stop()

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", told),
        Route("/openapi.json", openapi),
        Route("/v1/models", models),
        Route("/v1/models/{id}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        *admin.routes(catalog),
    ]
    handlers: dict[Any, Any] = {ServeError: on_serve_error, HTTPException: on_http_error, 500: on_bug}
    middleware = [
        Middleware(
            Guard, keys=keys or Keys(), max_concurrent=runner.spec.max_concurrent, sees_images=lambda: not runner.engine or bool(runner.processor)
        )
    ]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware, lifespan=lifespan)


def card(name: str, entry: Entry | None, catalog: Catalog, created: int) -> dict[str, Any]:
    """A model of /v1/models; OpenAI's fields and, of an adapter, what is known of it."""
    spec = catalog.spec
    found: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "graft", "root": spec.base_name, "parent": None}
    found["input_modalities"] = ["text"]
    if catalog.runner.processor:
        found |= {"input_modalities": ["text", "image"], "max_images": spec.max_images, "max_image_bytes": MAX_BYTES}
    if entry is None:
        return found | {"version": None, "fingerprint": _fingerprint(spec.identity), "state": "ready", "verified": True}
    version, verdict = entry.version, entry.verdict
    gate = verdict and {key: round(getattr(verdict, key), 6) for key in ("effect_nats", "difference_nats", "tolerance_nats")}
    return found | {
        "created": int(version.about.get("published_unix_s", created)),
        "parent": spec.base_name,
        "version": version.id,
        "fingerprint": _fingerprint(version.id),
        "state": catalog.state(entry),
        "verified": bool(verdict and verdict.passed),
        "override": version.notes.get("override"),
        "gate": gate,
        "lineage": version.about.get("lineage", {}),
        "metrics": version.notes.get("evaluation"),
    }


def _fingerprint(identity: str) -> str:
    return "graft-" + hashlib.sha256(identity.encode()).hexdigest()[:12]


class Service:
    """Answers chat completions and completions."""

    def __init__(self, catalog: Catalog, metrics: Metrics):
        self.catalog, self.metrics, self.runner = catalog, metrics, catalog.runner
        self.images = Images(catalog.spec.max_images, catalog.spec.fetch_images)

    async def answer(self, http: HTTPRequest, asked: ChatRequest | CompletionRequest) -> Response:
        known = asked.model if asked.model in self.catalog.listed() else "unknown"
        try:
            submitting = self._submitted(asked)
            if isinstance(asked, ChatRequest) and asked.images:  # which take a while to read
                submitted = await unless_left(http, submitting)
            else:
                submitted = await submitting
            if submitted is None:
                return Response(status_code=499)
            model, tickets = submitted
        except ServeError as e:
            self.metrics.requests.labels(known, status_of(e)).inc()
            raise
        head = {"id": f"{'chatcmpl' if isinstance(asked, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": asked.model, "system_fingerprint": _fingerprint(model.id if model.folder else self.catalog.spec.identity)}
        reply = Reply(head, tickets, isinstance(asked, ChatRequest), asked.likeliest is not None, model.tokenizer)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = self._counted(reply.events(usage), known, tickets)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self._whole(http, reply, known)

    async def _submitted(self, asked: ChatRequest | CompletionRequest) -> tuple[Model, list[Ticket]]:
        """The model and the choices' tickets; ServeError where the request cannot be taken."""
        model = await self.catalog.ready(asked.model)
        shown = asked.images if isinstance(asked, ChatRequest) else []
        request = to_request(asked, model, self.runner, await self.images.seen(shown, self.runner.ready_engine().processor))
        tickets: list[Ticket] = []
        try:
            for choice in range(asked.n or 1):
                own = replace(request, seed=request.seed + choice)
                tickets.append(await patient(partial(self.runner.submit, own, model.folder)))
            return model, tickets
        except DataError as e:
            _drop(tickets)
            raise ApiError(400, str(e), "messages", "invalid_value") from None
        except ArtifactError as e:  # it was whole when the gate saw it
            _drop(tickets)
            raise (ServeError if isinstance(e, Unreadable) else Refused)(str(e)) from None
        except BaseException:
            _drop(tickets)
            raise

    async def _whole(self, http: HTTPRequest, reply: Reply, known: str) -> Response:
        """The reply, whole; a client that closes frees its rows."""
        try:
            body = await unless_left(http, reply.whole())
            if body is None:
                return Response(status_code=499)
            self._count(known, "200", reply.tickets)
            return JSONResponse(body)
        except ServeError:
            self._count(known, "503", reply.tickets)
            raise
        finally:
            _drop(reply.tickets)

    async def _counted(self, events: AsyncIterator[str], known: str, tickets: list[Ticket]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        finally:
            _drop(tickets)
            self._count(known, "200", tickets)

    def _count(self, model: str, status: str, tickets: Any) -> None:
        self.metrics.requests.labels(model, status).inc()
        self.metrics.prompt_tokens.labels(model).inc(len(tickets[0].request.prompt_ids))
        self.metrics.completion_tokens.labels(model).inc(sum(t.tokens for t in tickets))
        if (first := min((t.first for t in tickets if t.first), default=0.0)) and not tickets[0].request.whole:
            self.metrics.first_token_s.labels(model).observe(first - tickets[0].begun)
        self.metrics.request_s.labels(model).observe(time.monotonic() - tickets[0].begun)


def _drop(tickets: Any) -> None:
    for ticket in tickets:
        ticket.dropped = True


async def unless_left(http: HTTPRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None, and the work given up, where the client closes before."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _left(http: HTTPRequest) -> None:
    """Until the client closes."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def to_request(asked: Sampled, model: Model, runner: Runner, images: tuple[Seen, ...] = ()) -> Request:
    """The engine's request; ServeError before the model is ready, ApiError 400 where what is asked does not fit it. images: those of `asked`."""
    engine = runner.ready_engine()
    assert isinstance(asked, ChatRequest | CompletionRequest)
    field = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if isinstance(asked, CompletionRequest):
        ids = model.tokenizer(asked.prompt)["input_ids"] if isinstance(asked.prompt, str) else asked.prompt
        if max(ids, default=0) >= len(model.tokenizer):
            raise ApiError(400, f"token {max(ids)} is none of the {len(model.tokenizer)} that the model knows", "prompt", "invalid_value")
    else:
        try:
            ids, _ = prompt(model.tokenizer, [m.rendered for m in asked.messages], engine.processor, images)
        except TemplateError as e:
            raise ApiError(400, f"the model's chat template refuses the messages: {e}", "messages", "invalid_value") from None
        except (DataError, ConfigError) as e:
            raise ApiError(400, str(e), "messages", "invalid_value") from None
    if engine.processor and ids.count(model.tokenizer.convert_tokens_to_ids(IMAGE)) != sum(engine.processor.tokens(i.grid) for i in images):
        raise ApiError(400, f"the {field} hold the text {IMAGE}, which stands for an image", field, "invalid_value")
    most, room = asked.most, engine.max_length - len(ids)
    if not ids or (most or 1) > room:
        message = f"the {field} take {len(ids)} tokens and {most or 1} more are asked for: the model holds {engine.max_length}"
        raise ApiError(400, message, field, "context_length_exceeded")
    return Request(
        prompt_ids=ids,
        max_new_tokens=most or room,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        adapter=model.id if model.folder else None,
        stop=tuple(asked.stop or ()),
        ends=model.ends,
        whole=not asked.stream,
        logprobs=asked.likeliest,
        images=images,
    )


def as_api_error(error: ServeError) -> ApiError:
    """How an error is told to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "model", "model_not_found")
    if isinstance(error, Refused):
        return ApiError(409, str(error), "model", "adapter_refused")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded")
    return ApiError(503, str(error))


def status_of(error: ServeError) -> str:
    return str(as_api_error(error).status)


async def on_serve_error(http: HTTPRequest, error: ServeError) -> Response:
    return answer(as_api_error(error))


async def on_http_error(http: HTTPRequest, error: HTTPException) -> Response:
    return answer(ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))


async def on_bug(http: HTTPRequest, error: Exception) -> Response:
    return answer(ApiError(500, "the server failed on this request: see its log"))
