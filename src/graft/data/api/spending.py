"""What requests cost: the worst case before one leaves, the bill from its answer, and the estimate before a run.

Tokens are bounded, not guessed: a byte-level BPE makes at most one token a byte, so a text never counts more tokens than
its UTF-8 bytes. The bound is loose (Chinese: about 2.5 times) and harmless: the difference is freed when the answer is in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from graft.core.sections import Api, Price

MESSAGE_TOKENS = 16  # role and borders of one message, generously
REQUEST_TOKENS = 64  # what servers put around the messages
FREE = Price(input=0, output=0)


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer as the server counted them."""

    prompt: int
    cached: int
    completion: int
    tier: str | None

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion


def worst_prompt_tokens(body: dict[str, Any], image_tokens: int) -> int:
    """Upper bound of the tokens that the server will count for the request's input."""
    total = REQUEST_TOKENS
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        total += MESSAGE_TOKENS + sum(image_tokens if p["type"] == "image_url" else len(p["text"].encode("utf-8", "surrogatepass")) for p in parts)
    if schema := body.get("response_format"):
        total += len(json.dumps(schema, ensure_ascii=False).encode())
    return total


def worst_case(body: dict[str, Any], api: Api) -> tuple[float, int]:
    """(dollars, tokens) that the request may cost at most."""
    prompt = worst_prompt_tokens(body, api.image_tokens)
    price = price_of(api)
    dearest_input = max(price.input, price.cached_input or 0)
    completion = api.max_output_tokens * (body.get("n") or 1)
    return (prompt * dearest_input + completion * price.output) / 1e6, prompt + completion


def price_of(api: Api) -> Price:
    return api.prices.get(api.model, FREE)


def usage_of(response: str) -> Usage | None:
    """The usage that a raw response states, None where it states none."""
    try:
        answer = json.loads(response)
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Usage(int(usage["prompt_tokens"]), int(cached), int(usage["completion_tokens"]), answer.get("service_tier"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def cost_usd(usage: Usage, price: Price) -> float:
    """Dollars of one answer."""
    cached = min(usage.cached, usage.prompt)
    cached_price = price.input if price.cached_input is None else price.cached_input
    factor = price.batch if usage.tier == "flex" else 1.0
    return factor * ((usage.prompt - cached) * price.input + cached * cached_price + usage.completion * price.output) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What a run would cost, and how its tokens were counted."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    worst_usd: float
    method: str


def estimate(bodies: list[dict[str, Any]], api: Api, history: list[tuple[str, str]]) -> Estimate:
    """Cost of `bodies`, from (request, response) pairs of earlier answers of the same recipe where there are some.

    With a history: prompt tokens by the measured tokens a byte, completion tokens by their mean. Without: by tiktoken
    where it is installed and knows the model, and every answer as long as `max_output_tokens` allows.
    """
    worst = [worst_case(b, api) for b in bodies]
    bounds = [worst_prompt_tokens(b, api.image_tokens) for b in bodies]
    seen = [(worst_prompt_tokens(json.loads(request), api.image_tokens), u) for request, response in history if (u := usage_of(response))]
    completion = api.max_output_tokens * len(bodies)
    if seen:
        ratio = sum(u.prompt for _, u in seen) / max(1, sum(bound for bound, _ in seen))
        prompt = round(sum(bounds) * ratio)
        completion = round(len(bodies) * sum(u.completion for _, u in seen) / len(seen))
        method = f"measured on {len(seen)} earlier answers"
    elif (encode := _tiktoken(api.model)) is not None:
        prompt, method = sum(_count(b, encode, api.image_tokens) for b in bodies), f"tiktoken for {api.model}; answers at their longest"
    else:
        prompt, method = sum(bounds), "upper bound, a token a byte; answers at their longest"
    usd = cost_usd(Usage(prompt, 0, completion, api.service_tier), price_of(api))
    return Estimate(len(bodies), prompt, completion, usd, sum(w[0] for w in worst), method)


def _tiktoken(model: str) -> Any:
    try:
        import tiktoken
    except ImportError:
        return None
    try:
        return tiktoken.encoding_for_model(model).encode_ordinary
    except (KeyError, OSError):  # not a model it knows, or its tables cannot be downloaded
        return None


def _count(body: dict[str, Any], encode: Any, image_tokens: int) -> int:
    total = 3
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        total += 4 + sum(image_tokens if p["type"] == "image_url" else len(encode(p["text"])) for p in parts)
    return total
