"""The caller: a Ray Data actor that sends granted requests through the `openai` client and hands in what came back.

The client's own retries are off: it repeats every 429, also those that no wait can mend. Here the broker says when a
request may leave; an attempt that failed for a passing reason waits its back-off and asks for another grant.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from graft.core.errors import CredentialError, GraftError
from graft.core.sections import Api
from graft.data.api.client import Client, collect_rarely, unsent
from graft.data.api.limits import MARGIN_S, QUOTA_CODES, RATE_HEADERS, backoff_s, retry_after_s
from graft.data.api.spending import cost_usd, price_of, usage_of, worst_case

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
SECRET_CHARS = 16  # a shorter key is a stand-in, as "none" or "EMPTY" for a local server, and may be a word of an answer
IMAGE_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
UNANSWERED = "unanswered"  # the kind of a failure that may pass
Row = dict[str, Any]


def check_credentials(base_url: str) -> None:
    """CredentialError where a remote endpoint would be called without a key, the key is in its address, or no header takes it."""
    address, key = urlsplit(base_url), os.environ.get("OPENAI_API_KEY", "")
    if "@" in address.netloc or address.query:  # addresses are printed and kept, and the client takes neither
        raise CredentialError(
            f"OPENAI_BASE_URL holds more than the address of {address.hostname}: leave out name, password and query, put the key into OPENAI_API_KEY"
        )
    if not (key.isascii() and key.isprintable()):
        raise CredentialError("OPENAI_API_KEY holds a line break or another character that keys do not have: export it again, from one line")
    if address.hostname not in LOOPBACK and not key:
        raise CredentialError(
            f"OPENAI_BASE_URL names {address.hostname}, but OPENAI_API_KEY is not set: export it, or unset OPENAI_BASE_URL to use the embedded endpoint"
        )


class Caller:
    """Rows {"key", "body", "files"} in, a block at a time and several blocks at once; rows {"key", "status", "error", "kind"} out.

    status: "answered" (the ledger has it), "failed", "budget" or "stopped". Answers never pass through Ray. embedded: the endpoint is
    graft's own, on whichever machine, and takes no key.
    """

    def __init__(self, ledger: str, base_url: str, hello: dict[str, Any], api: dict[str, Any], embedded: bool = False):
        self.embedded = embedded
        self.ledger, self.base_url, self.hello, self.api = Path(ledger), base_url, hello, Api.model_validate(api)
        self.closed_until_s = 0.0  # by the Retry-Afters that this process has read: of those, the broker hears a moment later

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        rows = [{"key": str(k), "body": str(b), "files": str(f)} for k, b, f in zip(batch["key"], batch["body"], batch["files"], strict=True)]
        self._connect()
        done = await asyncio.gather(*(self._one(row) for row in rows))
        yield {name: [row.get(name, "") for row in done] for name in ("key", "status", "error", "kind")}

    def _connect(self) -> None:
        """Make the clients, in the loop that Ray runs this actor's calls in."""
        if hasattr(self, "broker"):
            return
        import httpx2
        from openai import AsyncOpenAI, DefaultAioHttpClient

        self.broker = Client(self.ledger, self.hello)
        n, timeout_s = self.api.in_flight, self.api.timeout_s
        http = DefaultAioHttpClient(
            limits=httpx2.Limits(max_connections=n, max_keepalive_connections=n, keepalive_expiry=30.0),  # None would mean 100
            timeout=httpx2.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
            follow_redirects=False,  # a redirect would carry key and text elsewhere
        )
        self.client = AsyncOpenAI(base_url=self.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0, http_client=http)
        self.url = f"{self.base_url.rstrip('/')}/chat/completions"
        collect_rarely()

    async def _one(self, row: Row) -> Row:
        """{"key", "status", …} of one request."""
        try:
            if not self.embedded:
                check_credentials(self.base_url)  # on a cluster each node has its own environment
            return {"key": row["key"], **await self._ask(self.broker, row)}
        except GraftError as e:
            return {"key": row["key"], "status": "stopped", "kind": "credential" if isinstance(e, CredentialError) else "data", "error": str(e)}

    async def _ask(self, broker: Client, row: Row) -> Row:
        """Ask until there is an answer, or a reason why there is none."""
        body = json.loads(row["body"])
        usd, tokens = worst_case(body, self.api)
        content = _content(row["body"], body, json.loads(row["files"]))
        failure: Row = {}
        for attempt in range(self.api.max_retries + 1):
            if attempt:
                await asyncio.sleep(max(failure["wait_s"], backoff_s(attempt - 1)))
            decision = await broker.claim(row["key"], usd, tokens)
            if decision.what == "known":
                return {"status": "answered"}
            if decision.what == "budget":
                return {"status": "budget", "error": "the budget is used up"}
            if decision.what == "stopped":
                return {"status": "stopped", "error": decision.reason, "kind": decision.kind}
            while (wait_s := self.closed_until_s - time.monotonic()) > 0 and not broker.halted:
                await asyncio.sleep(wait_s)
            if broker.halted:
                await broker.settle(unsent(decision.attempt, row["key"]))
                return {"status": "stopped", "error": broker.halted["reason"], "kind": broker.halted["kind"]}
            outcome = await self._send(content)
            if (asked_s := retry_after_s(outcome["headers"])) is not None:
                self.closed_until_s = max(self.closed_until_s, time.monotonic() + asked_s + MARGIN_S)
            item = {**unsent(decision.attempt, row["key"]), **outcome}
            if item["state"] == "lost":
                item.update(usd=usd, tokens=tokens)
            elif item["state"] == "paid":
                usage = usage_of(item["response"])
                item.update(request=row["body"], usd=cost_usd(usage, price_of(self.api)) if usage else usd, tokens=usage.tokens if usage else tokens)
            await broker.settle(item)
            if item["outcome"] == "answer":
                return {"status": "answered"}
            if item["outcome"] in ("refused", "fatal"):
                return {"status": "stopped" if item["outcome"] == "fatal" else "failed", "error": item["reason"], "kind": item["kind"]}
            failure = {"reason": item["reason"], "wait_s": asked_s or 0.0}
        return {"status": "failed", "kind": UNANSWERED, "error": f"no answer after {self.api.max_retries + 1} attempts: {failure['reason']}"}

    async def _send(self, content: bytes) -> Row:
        """One attempt: {"outcome", "state", "headers", …} as the broker takes it.

        `post` with the response itself as its type, instead of `chat.completions.create`: no parsing and no transforming of
        either body, which is two thirds of the client's time; the answer is kept as it came.
        """
        import aiohttp
        import httpx2
        from openai import APIConnectionError, APIStatusError

        try:
            async with asyncio.timeout(self.api.timeout_s):  # of the whole: the client's own is of one read, a drip never ends it
                reply = await self.client.post(self.url, cast_to=httpx2.Response, content=content)
            if not _is_completion(reply.text):  # a gateway's page or error: of another minute, not this request's answer for good
                reason = f"200 without a completion: {_one_line(reply.text)}"
                return {"outcome": "server", "state": "lost", "headers": _headers(reply.headers), "reason": reason}
            return {"outcome": "answer", "state": "paid", "headers": _headers(reply.headers), "response": _redacted(reply.text)}
        except APIStatusError as e:
            return {"headers": _headers(e.response.headers), **_refusal(e.status_code, str(e.code or ""), e.message)}
        except TimeoutError:
            return {"outcome": "connection", "state": "lost", "headers": {}, "reason": f"no answer within {self.api.timeout_s:g} s"}
        except (APIConnectionError, aiohttp.ClientError) as e:
            causes = list(_causes(e))
            never_left = any(isinstance(c, aiohttp.ClientConnectorError) for c in causes)
            reason = f"no connection ({type(causes[-1]).__name__}: {_one_line(str(causes[-1]))})"
            return {"outcome": "connection", "state": "free" if never_left else "lost", "headers": {}, "reason": reason}


def _is_completion(text: str) -> bool:
    """Whether a body is one, whole or cut off: told without parsing, which would take longer than all else."""
    return text.lstrip().startswith("{") and '"choices"' in text


def _refusal(status: int, code: str, message: str) -> Row:
    """What an HTTP error means: which wait may mend it, which ends the run, whether it may have been billed."""
    reason = " ".join(str(p) for p in (status, _one_line(code), _one_line(message)) if p)
    if code in QUOTA_CODES:
        return {"outcome": "fatal", "state": "free", "kind": "credential", "reason": f"the account's quota is used up: {reason}"}
    if status in (401, 403):
        return {"outcome": "fatal", "state": "free", "kind": "credential", "reason": f"the API refused the key: {reason}"}
    if status == 404:
        return {"outcome": "fatal", "state": "free", "kind": "data", "reason": f"the API does not know the model or the address: {reason}"}
    if status == 429:
        return {"outcome": "throttled", "state": "free", "reason": reason}
    if status in (408, 502, 504):  # a gateway gave up: behind it the answer may have been made
        return {"outcome": "server", "state": "lost", "reason": reason}
    if status >= 500 or status == 409:
        return {"outcome": "server", "state": "free", "reason": reason}
    return {"outcome": "refused", "state": "free", "reason": reason}


def _content(text: str, body: dict[str, Any], files: dict[str, str]) -> bytes:
    """The request as sent: every `sha256:<hex>` replaced by its file as a data URL."""
    if not files:
        return text.encode()

    def part(p: dict[str, Any]) -> dict[str, Any]:
        if p["type"] != "image_url":
            return p
        path = Path(files[p["image_url"]["url"].removeprefix("sha256:")])
        data = base64.b64encode(path.read_bytes()).decode()
        return {**p, "image_url": {**p["image_url"], "url": f"data:{IMAGE_TYPES[path.suffix.lower()]};base64,{data}"}}

    messages = [m if isinstance(m["content"], str) else {**m, "content": [part(p) for p in m["content"]]} for m in body["messages"]]
    return json.dumps({**body, "messages": messages}, ensure_ascii=False).encode()


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _headers(headers: Any) -> dict[str, str]:
    return {name: headers[name] for name in RATE_HEADERS if name in headers}


def _one_line(text: str) -> str:
    return " ".join(_redacted(text).split())[:200]


def _redacted(text: str) -> str:
    """`text` without the key: some servers and gateways repeat the headers that they were sent."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "…") if len(key) >= SECRET_CHARS else text
