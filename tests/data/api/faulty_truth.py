"""What the fault-injecting endpoint knows to be true: who asked what and when, what was billed, which waits were cut short.

Every request is one JSON line, written (not buffered) when the request is decided, before a byte of the answer leaves:
the log holds whatever became of the clients and of this process, and a server started again on it goes on counting.
About 15 us a request.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE_S = 0.05  # a request that arrives so soon after a Retry-After was on its way already


@dataclass
class Seen:
    """One key's requests."""

    requests: int = 0
    billed: int = 0
    wait_until_s: float = 0.0  # by its last Retry-After


@dataclass
class Truth:
    """prices: {model or "*": {"input", "output", "cached_input"?, "batch"?}}, US dollars a million tokens."""

    prices: dict[str, dict[str, float]]
    log: int | None = None  # file descriptor
    keys: dict[str, Seen] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    billed_usd: float = 0.0
    quota_at_s: float | None = None  # when the first quota answer left
    _young: deque[tuple[float, float]] = field(default_factory=deque)  # (said, until) of Retry-Afters within their grace
    _all_wait_until_s: float = 0.0

    @classmethod
    def open(cls, prices: dict[str, dict[str, float]], path: str | None) -> Truth:
        truth = cls(prices)
        if path:
            if Path(path).exists():
                with Path(path).open(encoding="utf-8") as f:
                    for line in f:
                        truth._count(json.loads(line))
            truth.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return truth

    def arrive(self, key: str) -> dict[str, Any]:
        """The begun record of a request that is here now: when, which time, which waits it cut short."""
        now = time.monotonic()
        while self._young and self._young[0][0] < now - GRACE_S:
            self._all_wait_until_s = max(self._all_wait_until_s, self._young.popleft()[1])
        seen = self.keys.get(key) or Seen()
        return {
            "key": key,
            "monotonic_s": now,
            "unix_s": time.time(),
            "nth": seen.requests,
            "in_flight": self.in_flight,
            "undercut_key": now < seen.wait_until_s,
            "undercut_any": now < self._all_wait_until_s,
            "after_quota": self.quota_at_s is not None,
        }

    def decide(
        self, record: dict[str, Any], *, status: int, fault: str | None, answer: dict[str, Any] | None, wait_until_s: float | None = None
    ) -> None:
        """Complete the record and keep it. answer: what was generated and is billed; wait_until_s: of a Retry-After, monotonic."""
        usage = (answer or {}).get("usage") or {}
        record |= {
            "status": status,
            "fault": fault,
            "billed": answer is not None,
            "prompt_tokens": usage.get("prompt_tokens", 0),
            "completion_tokens": usage.get("completion_tokens", 0),
            "billed_usd": self._cost_usd(answer) if answer else 0.0,
            "wait_until_s": wait_until_s,
        }
        if self.log is not None:
            os.write(self.log, json.dumps(record).encode() + b"\n")
        self._count(record)

    def report(self, by_key: bool) -> dict[str, Any]:
        return {
            "requests": self.counts["requests"],
            "unique": len(self.keys),
            "billed": self.counts["billed"],
            "billed_twice": sum(s.billed > 1 for s in self.keys.values()),
            "billed_usd": self.billed_usd,
            "prompt_tokens": self.counts["prompt_tokens"],
            "completion_tokens": self.counts["completion_tokens"],
            "in_flight": self.in_flight,
            "max_in_flight": self.counts["max_in_flight"],
            "undercuts_key": self.counts["undercut_key"],
            "undercuts_any": self.counts["undercut_any"],
            "after_quota": self.counts["after_quota"],
            "faults": {name.removeprefix("fault "): n for name, n in sorted(self.counts.items()) if name.startswith("fault ")},
            "statuses": {name.removeprefix("status "): n for name, n in sorted(self.counts.items()) if name.startswith("status ")},
            **({"by_key": {k: {"requests": s.requests, "billed": s.billed} for k, s in self.keys.items()}} if by_key else {}),
        }

    def _count(self, record: dict[str, Any]) -> None:
        seen = self.keys.setdefault(record["key"], Seen())
        seen.requests += 1
        seen.billed += record["billed"]
        self.billed_usd += record["billed_usd"]
        for name in ("billed", "prompt_tokens", "completion_tokens", "undercut_key", "undercut_any", "after_quota"):
            self.counts[name] += record[name]
        self.counts["requests"] += 1
        self.counts[f"status {record['status']}"] += 1
        self.counts["max_in_flight"] = max(self.counts["max_in_flight"], record["in_flight"])
        if record["fault"]:
            self.counts[f"fault {record['fault']}"] += 1
        if record["fault"] == "quota" and self.quota_at_s is None:
            self.quota_at_s = record["monotonic_s"]
        if record["wait_until_s"] is not None:
            seen.wait_until_s = record["wait_until_s"]
            self._young.append((record["monotonic_s"], record["wait_until_s"]))

    def _cost_usd(self, answer: dict[str, Any]) -> float:
        price, usage = self.prices.get(answer["model"]) or self.prices.get("*"), answer["usage"]
        if price is None:
            return 0.0
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        fresh = usage["prompt_tokens"] - cached
        cached_price = price["input"] if price.get("cached_input") is None else price["cached_input"]
        factor = price.get("batch", 0.5) if answer.get("service_tier") == "flex" else 1.0
        return factor * (fresh * price["input"] + cached * cached_price + usage["completion_tokens"] * price["output"]) / 1e6
