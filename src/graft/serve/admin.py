"""Adapters while the server runs: what there is, load, unload, reload, alias. What is decided is written into the store, which every replica follows."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from graft.core.errors import GraftError, ServeError, Unreadable
from graft.core.store import AdapterStore, UnknownAdapter
from graft.serve.catalog import Catalog, UnknownModel
from graft.serve.gate import Refused
from graft.serve.requests import AdapterRequest, AliasRequest, ApiError, LoadRequest, parse


def routes(catalog: Catalog) -> list[Route]:
    """Of /admin."""

    def store() -> AdapterStore:
        if catalog.store is None:
            raise ApiError(409, "this server holds a whole model, which takes no adapters", code="no_adapters")
        return catalog.store

    async def changed(act: Any, *given: Any, **named: Any) -> Any:
        """A change of the store, or a look into it; a ServeError where it is refused, or the store cannot be reached."""
        try:
            found = await asyncio.to_thread(act, *given, **named)
        except UnknownAdapter as e:
            raise UnknownModel(str(e)) from None
        except ServeError:
            raise
        except Unreadable as e:
            raise ServeError(str(e)) from None
        except OSError as e:  # as where the server's user may only read it
            raise ServeError(f"the store cannot be written: {e}") from None
        except GraftError as e:
            raise Refused(str(e)) from None
        await catalog.refresh()
        return found

    async def listed(http: HTTPRequest) -> Response:
        await catalog.refresh()
        return JSONResponse({"data": [about(identity) for identity in catalog.entries], "aliases": catalog.names})

    def about(identity: str) -> dict[str, Any]:
        entry = catalog.entries[identity]
        return {
            "id": identity,
            "state": catalog.state(entry),
            "reason": entry.refused,
            "aliases": sorted(name for name, of in catalog.names.items() if of == identity),
            "notes": entry.version.notes,
            "gate": entry.verdict and asdict(entry.verdict),
            "load_s": entry.load_s,
        }

    async def load(http: HTTPRequest) -> Response:
        asked = parse(await http.body(), LoadRequest)
        version = await changed(store().get, asked.model)
        anew = bool(asked.override) or bool(version.notes.get("withdrawn"))
        if anew:
            await changed(store().note, version.id, withdrawn=None, **({"override": asked.override} if asked.override else {}))
        entry = catalog.entry(version.id)
        await catalog.load(version.id, again=anew or bool(entry.refused))
        return JSONResponse(about(version.id))

    async def unload(http: HTTPRequest) -> Response:
        asked = parse(await http.body(), AdapterRequest)
        version = await changed(store().get, asked.model)
        catalog.entry(version.id)
        await changed(store().note, version.id, withdrawn=True)
        await catalog.unload(version.id)
        return JSONResponse(about(version.id))

    async def reload(http: HTTPRequest) -> Response:
        asked = parse(await http.body(), AdapterRequest)
        version = await changed(store().get, asked.model)
        catalog.entry(version.id)
        await catalog.load(version.id, again=True)
        return JSONResponse(about(version.id))

    async def alias(http: HTTPRequest) -> Response:
        asked = parse(await http.body(), AliasRequest)
        if asked.alias == catalog.spec.base_name:
            raise ApiError(400, f"{asked.alias!r} is the base's own name here", "alias", "invalid_value")
        version = await changed(store().get, asked.model)
        await catalog.ready(version.id)  # only what passes the gate gets a name
        await changed(store().alias, asked.alias, version.id)
        return JSONResponse({"alias": asked.alias, "id": version.id})

    return [
        Route("/admin/adapters", listed),
        Route("/admin/load", load, methods=["POST"]),
        Route("/admin/unload", unload, methods=["POST"]),
        Route("/admin/reload", reload, methods=["POST"]),
        Route("/admin/alias", alias, methods=["POST"]),
    ]
