"""One asynchronous caller of an OpenAI-compatible API, run as an actor of a Ray Data pipeline.

The `openai` client's own retries are off: it retries every 429, also those that no wait can mend. Here a request is
tried again after 408, 409, 429 and 5xx and after a lost connection, with exponential backoff and full jitter, never
before the server's Retry-After; what cannot be mended comes back as a row with `error` and ends the stage.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from graft.core.errors import CredentialError

ATTEMPTS = 6
HOPELESS = {  # 429 codes after which waiting does not help
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def check_credentials(base_url: str) -> None:
    """CredentialError where a remote endpoint would be called without a key."""
    if urlsplit(base_url).hostname not in LOOPBACK and not os.environ.get("OPENAI_API_KEY"):
        raise CredentialError(
            f"OPENAI_BASE_URL names {urlsplit(base_url).hostname}, but OPENAI_API_KEY is not set: export it, or unset OPENAI_BASE_URL to use the embedded endpoint"
        )


class Caller:
    """Rows {"key", "body"} in, rows {"key", "body", "response", "error"} out; a batch's requests run at once."""

    def __init__(self, base_url: str, timeout_s: float):
        from openai import AsyncOpenAI

        self.client = AsyncOpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0, timeout=timeout_s)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        answers = await asyncio.gather(*(self._ask(json.loads(body)) for body in batch["body"]))
        yield {"key": batch["key"], "body": batch["body"], "response": [a[0] for a in answers], "error": [a[1] for a in answers]}

    async def _ask(self, body: dict[str, Any]) -> tuple[str, str]:
        """(raw response, "") or ("", why it failed for good)."""
        from openai import APIConnectionError, APIStatusError

        for attempt in range(ATTEMPTS):
            try:
                raw = await self.client.chat.completions.with_raw_response.create(**body)
                return raw.text, ""
            except APIStatusError as e:
                if (e.status_code not in (408, 409, 429) and e.status_code < 500) or e.code in HOPELESS:
                    return "", f"{e.status_code} {e.code or ''} {_one_line(e.message)}"
                last = f"{e.status_code} {_one_line(e.message)}"
                wait_s = _retry_after_s(e.response.headers.get("retry-after"))
            except APIConnectionError as e:  # time-outs too
                last, wait_s = f"no connection ({_one_line(str(e))})", 0.0
            await asyncio.sleep(max(wait_s, random.uniform(0, min(30.0, 0.5 * 2**attempt))))
        return "", f"{last}, after {ATTEMPTS} attempts"


def _retry_after_s(value: str | None) -> float:
    try:
        return max(0.0, float(value or 0))
    except ValueError:  # an HTTP date: wait a while rather than parse every server's clock
        return 30.0


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
