"""What the broker keeps book of: budgets, runs, connected processes, requests that wait and requests under way."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from graft.data.api.ledger import Attempt, Spend
from graft.data.api.limits import Lane

WINDOW_S = 60.0  # of the rates shown


@dataclass
class Account:
    """What a recipe has spent, and what is reserved for requests under way."""

    spend: Spend
    reserved_usd: float = 0.0
    reserved_tokens: int = 0
    under_way: int = 0

    def fits(self, usd: float, tokens: int, limits: dict[str, Any]) -> bool:
        """Whether a run whose limits these are may spend so much more."""
        usd_cap, tokens_cap = limits["budget_usd"], limits["budget_tokens"]
        return (usd_cap is None or self.spend.usd + self.reserved_usd + usd <= usd_cap) and (
            tokens_cap is None or self.spend.tokens + self.reserved_tokens + tokens <= tokens_cap
        )

    def reserve(self, usd: float, tokens: int, n: int = 1) -> None:
        self.reserved_usd += n * usd
        self.reserved_tokens += n * tokens
        self.under_way += n


@dataclass
class Session:
    """One run of `graft augment`: its driver and its callers."""

    account: str
    lane: tuple[str, str]
    limits: dict[str, Any]
    peers: set[Any] = field(default_factory=set)
    stopped: dict[str, str] | None = None  # {"kind", "reason"}
    answered: int = 0
    refused: int = 0
    retries: int = 0
    recent: deque[list[float]] = field(default_factory=deque)  # [second, requests, tokens] that came back, of the last minute

    def count(self, now: float, tokens: int) -> None:
        """A request came back."""
        if not self.recent or self.recent[-1][0] != int(now):
            self.recent.append([int(now), 0, 0])
        self.recent[-1][1] += 1
        self.recent[-1][2] += tokens
        while self.recent[0][0] < now - WINDOW_S:
            self.recent.popleft()


@dataclass(eq=False)
class Peer:
    """A connected process."""

    socket: Any
    owner: str = ""
    session: str = ""
    outbox: dict[str, list[Any]] = field(default_factory=dict)

    def tell(self, what: str, item: Any) -> None:
        self.outbox.setdefault(what, []).append(item)


@dataclass(eq=False, slots=True)
class Want:
    key: str
    usd: float
    tokens: int
    peer: Peer


@dataclass(slots=True)
class Live:
    """A request under way; `peer` is None while its owner is away."""

    attempt: Attempt
    lane: Lane | None
    peer: Peer | None
    since: float = 0.0  # time.monotonic() of the grant


def figures(session: Session, account: Account, lane: Lane, queued: int) -> dict[str, Any]:
    """A run's numbers for the panel."""
    now = time.monotonic()
    recent = [r for r in session.recent if r[0] >= now - WINDOW_S]
    span_s = max(1.0, now - recent[0][0]) if recent else 1.0
    return {
        "spent_usd": account.spend.usd,
        "reserved_usd": account.reserved_usd,
        "presumed_usd": account.spend.lost_usd,
        "presumed": account.spend.lost,
        "tokens": account.spend.tokens,
        "answers": session.answered,
        "retries": session.retries,
        "in_flight": lane.in_flight,
        "queued": queued,
        "requests_per_minute": sum(r[1] for r in recent) * 60 / span_s,
        "tokens_per_minute": sum(r[2] for r in recent) * 60 / span_s,
        "down_s": lane.breaker.down_s(now),
    }
