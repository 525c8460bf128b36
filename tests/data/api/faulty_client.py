"""Asking the fault-injecting endpoint through the openai package, one request at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import httpx2
import openai

from .faulty import FaultyEndpoint

PRICES = {"gpt-4o-mini": {"input": 150.0, "cached_input": 75.0, "output": 600.0}, "*": {"input": 1000.0, "output": 1000.0}}


def body(n: int = 0, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"問題 {n}"}], "max_tokens": 50, "seed": n, **more}


@cache
def _client() -> openai.OpenAI:
    return openai.OpenAI(base_url="http://127.0.0.1", api_key="k", max_retries=0)


def ask(server: FaultyEndpoint, request: dict[str, Any], timeout_s: float = 5.0) -> httpx2.Response:
    return _client().post(f"{server.base_url}/chat/completions", cast_to=httpx2.Response, body=request, options={"timeout": timeout_s})


def endpoint(fault: str | None = None, **options: Any) -> FaultyEndpoint:
    return FaultyEndpoint(**{"answers": "canned", "faults": {fault: 1.0} if fault else {}, "prices": PRICES, **options})


def bill_usd(answer: dict[str, Any]) -> float:
    usage, price = answer["usage"], PRICES["gpt-4o-mini"]
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return ((usage["prompt_tokens"] - cached) * 150 + cached * price["cached_input"] + usage["completion_tokens"] * 600) / 1e6


def status_of(server: FaultyEndpoint, request: dict[str, Any]) -> int:
    try:
        return ask(server, request).status_code
    except openai.APIStatusError as e:
        return e.status_code
