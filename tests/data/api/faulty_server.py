"""The fault-injecting endpoint itself: what a chat completion request meets, its limits, its outages.

Which fault meets a request is a function of (seed, the
request's key, how often the key was seen), so a run can be repeated whatever the timing. Figures: see `faulty.py`.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sys
import time
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any

from faulty_answers import completion, key_of, most_tokens, share
from faulty_http import Connection
from faulty_truth import Truth

# fault: (status, how Retry-After is said: in seconds, as a date, in milliseconds, not at all)
ERRORS = {
    "429": (429, "seconds"),
    "429-date": (429, "date"),
    "429-ms": (429, "ms"),
    "429-plain": (429, None),
    "500": (500, None),
    "503": (503, None),
    "503-after": (503, "seconds"),
    "401": (401, None),
    "quota": (429, None),
}
SPOILT = {"refusal", "schema", "length", "filter"}  # a whole answer of another content
# reset: not billed, before anything; reset-paid: generated, then no byte of it; reset-body: half of it; hang: nothing, for ever;
# drip: a byte at a time; truncated: half the JSON, with a Content-Length to match; late: after late_s
DELIVERIES = {"reset", "reset-paid", "reset-body", "hang", "drip", "truncated", "late"}
UNPAID = {"reset", "hang"}
FAULTS = [*ERRORS, *sorted(SPOILT), *sorted(DELIVERIES)]


@dataclass
class Options:
    """What may be changed while the server runs, by POST /control."""

    faults: dict[str, float] = field(default_factory=dict)  # fault -> probability
    seed: int = 0
    answers: str = "grammar"  # or "canned", "vqa"
    latency_s: float = 0.0  # of an answer; errors come at once
    jitter_s: float = 0.0  # up to so much more, by the request: answers overtake each other
    retry_after_s: float = 1.0
    late_s: float = 5.0
    drip_s: float = 0.05  # a byte
    quota: bool = False  # every request meets the quota code
    quota_after: int | None = None  # requests
    limits: dict[str, float] = field(default_factory=dict)  # requests_per_minute, tokens_per_minute, burst_s, in_flight
    api_key: str | None = None  # the only one that is let in

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(FAULTS)
        if unknown or not 0 <= sum(self.faults.values()) <= 1:
            raise ValueError(f"faults are probabilities that sum to at most 1 of {FAULTS}, not {self.faults}")


class Bucket:
    """A token bucket of `burst_s` seconds' worth, full at the start."""

    def __init__(self, per_minute: float, burst_s: float):
        self.per_s, self.capacity = per_minute / 60, per_minute / 60 * burst_s
        self.level, self.at_s = self.capacity, time.monotonic()

    def wait_s(self, amount: float) -> float:
        now = time.monotonic()
        self.level, self.at_s = min(self.capacity, self.level + (now - self.at_s) * self.per_s), now
        return max(0.0, (min(amount, self.capacity) - self.level) / self.per_s)

    def headers(self, of: str) -> dict[str, str]:
        reset_s = (self.capacity - self.level) / self.per_s
        return {
            f"x-ratelimit-limit-{of}": str(int(self.per_s * 60)),
            f"x-ratelimit-remaining-{of}": str(max(0, int(self.level))),
            f"x-ratelimit-reset-{of}": f"{reset_s * 1000:.0f}ms" if reset_s < 1 else f"{int(reset_s // 60)}m{reset_s % 60:.3f}s",
        }


class Endpoint:
    """All connections' shared state, and what a request meets."""

    def __init__(self, options: Options, truth: Truth):
        self.options, self.truth = options, truth
        self.connections: set[Connection] = set()
        self.buckets: dict[str, Bucket] = {}
        self._limit()

    def _limit(self) -> None:
        burst_s = self.options.limits.get("burst_s", 60.0)
        self.buckets = {
            of: Bucket(self.options.limits[f"{of}_per_minute"], burst_s) for of in ("requests", "tokens") if f"{of}_per_minute" in self.options.limits
        }

    async def listen(self, host: str, port: int) -> int:
        await self._listen(_bound(host, port))
        self.host, self.port = self.listener.sockets[0].getsockname()[:2]
        return self.port

    async def _listen(self, bound: socket.socket) -> None:
        self.listener = await asyncio.get_running_loop().create_server(lambda: Connection(self), sock=bound, backlog=4096)

    async def _outage(self, seconds: float) -> None:
        """Every connection is cut, new ones are refused: the port stays ours, bound but deaf."""
        self.listener.close()
        for connection in list(self.connections):
            connection.transport.abort()
        bound = _bound(self.host, self.port)
        await asyncio.sleep(seconds)
        await self._listen(bound)

    def control(self, connection: Connection, changes: dict[str, Any]) -> None:
        outage_s = changes.pop("outage_s", None)
        try:
            self.options = replace(self.options, **changes)
        except (TypeError, ValueError) as e:
            return connection.error(400, str(e))
        if "limits" in changes:
            self._limit()
        connection.reply(200, json.dumps({"outage_s": outage_s, **changes}).encode())
        if outage_s is not None:
            connection.transport.close()
            self.connections.discard(connection)
            self._out = asyncio.get_running_loop().create_task(self._outage(outage_s))

    def completions(self, connection: Connection, raw: bytes, authorization: str) -> None:
        try:
            body = json.loads(raw)
            key = key_of(body)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            return connection.error(400, f"the body is no chat completion request: {e!r}")
        options, record = self.options, self.truth.arrive(key) | {"peer": connection.peer}
        if options.api_key and authorization != f"Bearer {options.api_key}":
            return self._fail(connection, record, "401", {})
        fault = self._fault(record)
        wait_s, headers = self._admit(body)
        if wait_s is not None and fault != "quota":
            return self._fail(connection, record, "limit", headers, wait_s)
        if fault in ERRORS:
            return self._fail(connection, record, fault, headers, options.retry_after_s)
        if fault in UNPAID:
            self.truth.decide(record, status=0, fault=fault, answer=None)
            return connection.transport.abort() if fault == "reset" else None
        status, answer = completion(body, key, options.answers, fault)
        self.truth.decide(record, status=status, fault=fault, answer=answer if status == 200 else None)
        delay_s = options.late_s if fault == "late" else options.latency_s + options.jitter_s * share("jitter", key, record["nth"])
        payload = json.dumps(answer, ensure_ascii=False).encode()
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, connection.deliver, fault, status, payload, headers, options.drip_s)
        else:
            connection.deliver(fault, status, payload, headers, options.drip_s)

    def _fault(self, record: dict[str, Any]) -> str | None:
        options = self.options
        if options.quota or (options.quota_after is not None and self.truth.counts["requests"] >= options.quota_after):
            return "quota"
        at = share(options.seed, record["key"], record["nth"])
        for fault, probability in options.faults.items():
            if (at := at - probability) < 0:
                return fault
        return None

    def _admit(self, body: dict[str, Any]) -> tuple[float | None, dict[str, str]]:
        """(None, headers) and the request is counted, or (seconds until it may come again, headers); 0 seconds: nobody knows."""
        if not self.options.limits:
            return None, {}
        amounts = {"requests": 1, "tokens": most_tokens(body)}
        wait_s = max((bucket.wait_s(amounts[of]) for of, bucket in self.buckets.items()), default=0.0)
        crowded = self.truth.in_flight > self.options.limits.get("in_flight", math.inf)
        if not crowded and not wait_s:
            for of, bucket in self.buckets.items():
                bucket.level -= min(amounts[of], bucket.capacity)
        headers = {name: value for of, bucket in self.buckets.items() for name, value in bucket.headers(of).items()}
        return (wait_s if crowded or wait_s else None), headers

    def _fail(self, connection: Connection, record: dict[str, Any], fault: str, headers: dict[str, str], wait_s: float = 0.0) -> None:
        status, form = ERRORS.get(fault) or (429, "both" if wait_s else None)
        until_s = None
        if form == "date":
            until_unix_s = math.ceil(time.time() + wait_s)
            until_s = record["monotonic_s"] + until_unix_s - record["unix_s"]
            headers = {**headers, "Date": formatdate(record["unix_s"], usegmt=True), "Retry-After": formatdate(until_unix_s, usegmt=True)}
        elif form == "seconds":
            until_s = record["monotonic_s"] + math.ceil(wait_s)
            headers = {**headers, "Retry-After": str(math.ceil(wait_s))}
        elif form:
            wait_ms = math.ceil(wait_s * 1000)
            until_s = record["monotonic_s"] + wait_ms / 1000
            headers = {**headers, "retry-after-ms": str(wait_ms), **({"Retry-After": str(math.ceil(wait_s))} if form == "both" else {})}
        self.truth.decide(record, status=status, fault=fault, answer=None, wait_until_s=until_s)
        connection.error(status, f"made to fail: {fault}", "insufficient_quota" if fault == "quota" else None, headers)


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


async def serve(options: Options, *, host: str, port: int, log: str | None, prices: dict[str, dict[str, float]], until_stdin_closes: bool) -> None:
    """Listen for ever, or until the one who started it is gone; says where as one JSON line."""
    endpoint = Endpoint(options, Truth.open(prices, log))
    print(json.dumps({"base_url": f"http://{host}:{await endpoint.listen(host, port)}/v1"}), flush=True)
    over = asyncio.Event()
    if until_stdin_closes:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    await over.wait()
