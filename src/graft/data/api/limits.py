"""How fast an API may be asked: token buckets, the server's own announcements, a circuit breaker, back-off.

Pure bookkeeping on a clock that the caller passes in (seconds, monotonic); one `Lane` an endpoint and model, shared by all
processes that ask through one ledger.
"""

from __future__ import annotations

import email.utils
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# after these codes no wait helps: the run ends
QUOTA_CODES = {
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
}
MARGIN_S = 0.02  # clocks tick and timers fire early: never a moment before a Retry-After


@dataclass
class Bucket:
    """A token bucket (Turner 1986): `per_minute` flows in, a second's worth may be saved up; a request larger than that
    leaves when the bucket is full and is paid off afterwards."""

    per_minute: float
    level: float = 0.0
    at_s: float | None = None

    @property
    def capacity(self) -> float:
        return max(1.0, self.per_minute / 60)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 is now."""
        self._fill(now)
        return max(0.0, (min(amount, self.capacity) - self.level) * 60 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self.level -= amount

    def _fill(self, now: float) -> None:
        if self.at_s is None:
            self.level = self.capacity
        else:
            self.level = min(self.capacity, self.level + (now - self.at_s) * self.per_minute / 60)
        self.at_s = now


@dataclass
class Announced:
    """What a server said remains until its limit resets (`x-ratelimit-remaining-*`, `x-ratelimit-reset-*`)."""

    remaining: float = float("inf")
    until_s: float = 0.0

    def observe(self, remaining: float, reset_s: float, under_way: float, now: float) -> None:
        """`under_way`: what has left and was perhaps not counted yet when the server spoke."""
        self.remaining, self.until_s = remaining - under_way, now + reset_s

    def wait_s(self, amount: float, now: float) -> float:
        return self.until_s - now + MARGIN_S if self.remaining < amount and now < self.until_s else 0.0

    def take(self, amount: float, now: float) -> None:
        if now >= self.until_s:
            self.remaining = float("inf")
        self.remaining -= amount


@dataclass
class Breaker:
    """Opens after `threshold` failures in a row; then lets one probe through at growing intervals until one succeeds."""

    threshold: int = 10
    failures: int = 0
    since_s: float | None = None  # when it opened
    interval_s: float = 0.0
    probe_at_s: float = 0.0
    probing: bool = False
    last: str = ""

    def wait_s(self, now: float) -> float:
        if self.since_s is None:
            return 0.0
        return float("inf") if self.probing else max(0.0, self.probe_at_s - now)

    def leave(self) -> None:
        """A request leaves; while the breaker is open it is the probe."""
        self.probing = self.since_s is not None

    def success(self) -> None:
        self.failures, self.since_s, self.probing = 0, None, False

    def failure(self, why: str, now: float) -> None:
        self.failures, self.last = self.failures + 1, why
        if self.since_s is None:
            if self.failures >= self.threshold:
                self.since_s, self.interval_s, self.probe_at_s = now, 0.5, now + 0.5
        elif self.probing:  # what left before it opened and fails only now says nothing new
            self.probing, self.interval_s = False, min(15.0, 2 * self.interval_s)
            self.probe_at_s = now + self.interval_s

    def down_s(self, now: float) -> float:
        return 0.0 if self.since_s is None else now - self.since_s


class Grouping:
    """For how long messages are gathered before they leave: a small share of what a request itself takes.

    Each message costs both ends some 50 us whatever it holds; gathering delays the next request of a slot.
    """

    SHARE, LEAST_S, MOST_S = 0.005, 0.001, 0.02

    def __init__(self) -> None:
        self.seconds = 0.002

    def took(self, seconds: float) -> None:
        """A request came back after so long."""
        self.seconds += 0.02 * (min(max(seconds * self.SHARE, self.LEAST_S), self.MOST_S) - self.seconds)


@dataclass
class Lane:
    """All limits of one endpoint and model."""

    in_flight_max: int
    requests: Bucket | None = None
    tokens: Bucket | None = None
    announced_requests: Announced = field(default_factory=Announced)
    announced_tokens: Announced = field(default_factory=Announced)
    breaker: Breaker = field(default_factory=Breaker)
    in_flight: int = 0
    in_flight_tokens: int = 0
    closed_until_s: float = 0.0  # by Retry-After

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until a request of at most `tokens` may leave; inf: not before something comes back."""
        if self.in_flight >= self.in_flight_max:
            return float("inf")
        waits = [
            self.closed_until_s - now,
            self.breaker.wait_s(now),
            self.announced_requests.wait_s(1, now),
            self.announced_tokens.wait_s(tokens, now),
        ]
        waits += [bucket.wait_s(amount, now) for bucket, amount in ((self.requests, 1), (self.tokens, tokens)) if bucket]
        return max(0.0, *waits)

    def leave(self, tokens: int, now: float) -> None:
        self.in_flight += 1
        self.in_flight_tokens += tokens
        self.breaker.leave()
        self.announced_requests.take(1, now)
        self.announced_tokens.take(tokens, now)
        for bucket, amount in ((self.requests, 1), (self.tokens, tokens)):
            if bucket:
                bucket.take(amount, now)

    def back(self, tokens: int) -> None:
        """A request is no longer under way, whatever became of it."""
        self.in_flight -= 1
        self.in_flight_tokens -= tokens

    def observe(self, headers: Mapping[str, str], now: float) -> None:
        """Read a response's rate limit headers; names in lower case."""
        if (wait_s := retry_after_s(headers)) is not None:
            self.closed_until_s = max(self.closed_until_s, now + wait_s + MARGIN_S)
        for kind, announced, under_way in (
            ("requests", self.announced_requests, self.in_flight),
            ("tokens", self.announced_tokens, self.in_flight_tokens),
        ):
            remaining, reset_s = headers.get(f"x-ratelimit-remaining-{kind}"), duration_s(headers.get(f"x-ratelimit-reset-{kind}"))
            if remaining is not None and remaining.isdigit() and reset_s is not None:
                announced.observe(int(remaining), reset_s, under_way, now)


RATE_HEADERS = (
    "retry-after",
    "retry-after-ms",
    "date",
    *(f"x-ratelimit-{what}-{of}" for what in ("remaining", "reset") for of in ("requests", "tokens")),
)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3): a number, or a date taken against the server's own `Date`."""
    if (ms := headers.get("retry-after-ms")) and re.fullmatch(r"\d+(\.\d+)?", ms.strip()):
        return float(ms) / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        asked = email.utils.parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return 30.0  # unreadable, but it asks to wait
    return max(0.0, (until - asked).total_seconds())


def duration_s(text: str | None) -> float | None:
    """`6m0s`, `1h2m3.5s`, `120ms` or plain seconds, as servers write their reset times; None where it is none of these."""
    if not text:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|ns|d|h|m|s)", text)
    if not parts or "".join(n + unit for n, unit in parts) != text:
        return None
    return sum(float(n) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for n, unit in parts)


def backoff_s(attempt: int) -> float:
    """Exponential back-off with full jitter (Brooker 2015, aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter)."""
    return random.uniform(0, min(20.0, 0.5 * 2**attempt))
