"""/openapi.json: the routes, and what they take, from the models that validate it."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

import graft
from graft.serve.requests import AdapterRequest, AliasRequest, ChatRequest, CompletionRequest, LoadRequest

POSTS = {
    "/v1/chat/completions": (ChatRequest, "A conversation's next turn"),
    "/v1/completions": (CompletionRequest, "A text's continuation"),
    "/admin/load": (LoadRequest, "Load an adapter; with `override`, one that the gate refuses"),
    "/admin/unload": (AdapterRequest, "Take an adapter off the server"),
    "/admin/reload": (AdapterRequest, "Read an adapter anew, and judge it anew"),
    "/admin/alias": (AliasRequest, "Let a name stand for a version"),
}
GETS = {
    "/": "The chat page",
    "/health": "The process answers",
    "/ready": "The models answer",
    "/metrics": "Counts and times by model",
    "/openapi.json": "This document",
    "/v1/models": "What can be asked",
    "/v1/models/{id}": "One of them",
    "/admin/adapters": "Every adapter, its state and verdict",
}
ERRORS = {"400": "what is wrong, by field", "401": "no key", "403": "not with this key", "404": "no such model", "409": "the adapter is refused"}
ERRORS |= {
    "408": "a body that took too long",
    "413": "too large",
    "415": "not JSON",
    "429": "too much at once: Retry-After",
    "503": "not ready: Retry-After",
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    models: list[Any] = list(dict.fromkeys(model for model, _ in POSTS.values()))
    names, definitions = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    failures = {code: {"description": said, "content": error} for code, said in ERRORS.items()}
    done = {"200": {"description": "done"}}
    paths: dict[str, Any] = {}
    for path, said in GETS.items():
        named = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}] if "{id}" in path else []
        paths[path] = {"get": {"summary": said, "parameters": named, "responses": {**done, **failures}}}
    model: Any
    for path, (model, said) in POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": names[model, "validation"]}}}
        paths[path] = {"post": {"summary": said, "requestBody": body, "responses": {**done, **failures}}}
    shape = {"message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    own = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "required": list(shape), "properties": shape}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "graft", "version": graft.__version__, "description": "An OpenAI-compatible server of adapters"},
        "paths": paths,
        "components": {
            "schemas": {**definitions["$defs"], "Error": own},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
