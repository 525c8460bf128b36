"""The broker: decides which request may leave now, and makes each answer durable before anyone reads it.

It runs in the process that holds the ledger's lease and serves every caller of the workspace, on this machine or another,
over a WebSocket (MessagePack, see `client.py`). No request leaves without a grant, and a grant is durable, with its worst
case reserved, before it is given: so one answer is never paid twice, and no budget is passed. One loop admits, commits and
notifies in groups, so a thousand callers cost a few fsyncs a second.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack

from graft.data.api.books import Account, Live, Peer, Session, Want, figures
from graft.data.api.lease import surely_dead
from graft.data.api.ledger import Attempt, LeaseLost, Ledger, Settled, Spend
from graft.data.api.limits import Bucket, Grouping, Lane

RECONNECT_S = 15.0  # an owner that is away this long has died, and its open requests are presumed billed
HOPELESS_AFTER = 5  # requests refused, none answered: all will be


class Broker:
    """Admission, budget and bookkeeping; `handle` serves one connection, `run` is the one loop that changes anything."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.accounts = {name: Account(spend) for name, spend in ledger.spend().items()}
        self.sessions: dict[str, Session] = {}
        self.lanes: dict[tuple[str, str], Lane] = {}
        self.queues: dict[tuple[str, str], deque[Want]] = {}
        self.followers: dict[str, list[Want]] = {}  # by key: who else waits for an answer that is under way
        self.live: dict[int, Live] = {}
        self.arrivals: list[Want] = []
        self.settled: list[tuple[Peer | None, Settled]] = []
        self.peers: set[Peer] = set()
        self.broken: dict[str, str] | None = None
        self.grouping = Grouping()
        self.wake, self._file = asyncio.Event(), asyncio.Lock()
        self.absent: dict[int, float] = {}  # attempt -> when it is given up, while its owner is away
        for attempt in ledger.open_attempts():
            self._account(attempt.account).reserve(attempt.usd, attempt.tokens)
            self.live[attempt.id] = Live(attempt, None, None)
            self.absent[attempt.id] = 0.0 if surely_dead(attempt.owner) else time.monotonic() + RECONNECT_S
            self.followers[attempt.key] = []

    # ---- one connection -------------------------------------------------------------------------------------------

    async def handle(self, socket: Any) -> None:
        """Serve one WebSocket until it closes."""
        peer = Peer(socket)
        self.peers.add(peer)
        try:
            async for message in socket:
                if not isinstance(message.data, bytes):
                    break
                await self._read(peer, msgpack.unpackb(message.data))
        finally:
            self.peers.discard(peer)
            self._gone(peer)
            self.wake.set()

    async def _read(self, peer: Peer, message: dict[str, Any]) -> None:
        if hello := message.get("hello"):
            self._hello(peer, hello)
        for key, usd, tokens in message.get("want", ()):
            self.arrivals.append(Want(key, usd, tokens, peer))
        for item in message.get("settle", ()):
            self._settle(peer, item)
        if (number := message.get("ask")) is not None:
            await peer.socket.send_bytes(msgpack.packb({"reply": number, "value": await self._query(message)}))
        self.wake.set()

    async def _query(self, message: dict[str, Any]) -> Any:
        for name in ("answers", "usage"):
            if name in message:
                return await self._in_ledger(getattr(self.ledger, name), message[name])
        session = self.sessions[message["stats"]]
        return figures(session, self._account(session.account), self.lanes[session.lane], len(self.queues.get(session.lane, ())))

    async def _in_ledger(self, call: Callable[..., Any], *args: Any) -> Any:
        """One use of the file at a time: what is read was committed."""
        async with self._file:
            return await asyncio.to_thread(call, *args)

    def _hello(self, peer: Peer, hello: dict[str, Any]) -> None:
        peer.owner, peer.session = hello["owner"], hello["session"]
        lane = (hello["endpoint"], hello["model"])
        session = self.sessions.setdefault(peer.session, Session(hello["account"], lane, hello["limits"]))
        session.peers.add(peer)
        self._set_limits(lane)
        holding = set(hello["holding"])
        for live in [v for v in self.live.values() if v.attempt.owner == peer.owner]:
            self.absent.pop(live.attempt.id, None)
            live.peer = peer
            if live.lane is None:
                live.lane, live.since = self.lanes[lane], time.monotonic()
                live.lane.leave(live.attempt.tokens, time.monotonic())
            if live.attempt.id not in holding:  # its grant never arrived there: nothing was sent
                self.settled.append((None, Settled(live.attempt.id, live.attempt.key, "free", 0.0, 0)))

    def _gone(self, peer: Peer) -> None:
        """Forget what the peer waits for; what it has under way may still come back with it."""
        self.arrivals = [w for w in self.arrivals if w.peer is not peer]
        for waiting in self.followers.values():
            for want in [w for w in waiting if w.peer is peer]:
                waiting.remove(want)
        dropped = [w for queue in self.queues.values() for w in queue if w.peer is peer]
        for lane, queue in self.queues.items():
            self.queues[lane] = deque(w for w in queue if w.peer is not peer)
        for want in dropped:
            self._promote(want.key)
        for live in self.live.values():
            if live.peer is peer:
                live.peer = None
                self.absent[live.attempt.id] = 0.0 if surely_dead(peer.owner) else time.monotonic() + RECONNECT_S
        if session := self.sessions.get(peer.session):
            session.peers.discard(peer)
            if not session.peers:
                del self.sessions[peer.session]
                self._set_limits(session.lane)

    def _set_limits(self, key: tuple[str, str]) -> None:
        """A lane is as narrow as the strictest of the runs that use it."""
        limits = [s.limits for s in self.sessions.values() if s.lane == key]
        if not limits:
            return
        lane = self.lanes.setdefault(key, Lane(1))
        self.queues.setdefault(key, deque())
        lane.in_flight_max = min(x["in_flight"] for x in limits)
        for name in ("requests", "tokens"):
            rates = [x[f"{name}_per_minute"] for x in limits if x[f"{name}_per_minute"]]
            bucket = getattr(lane, name)
            if rates and (bucket is None or bucket.per_minute != min(rates)):
                setattr(lane, name, Bucket(min(rates)))
            elif not rates:
                setattr(lane, name, None)

    def _settle(self, peer: Peer, item: dict[str, Any]) -> None:
        now = time.monotonic()
        live = self.live.get(item["attempt"])
        if live is None:  # presumed lost while its owner was away, or said twice: the answer still counts
            if item["response"] is not None:
                self.settled.append(
                    (peer, Settled(item["attempt"], item["key"], "paid", item["usd"], item["tokens"], item["request"], item["response"]))
                )
            else:
                peer.tell("durable", item["attempt"])
            return
        self.settled.append(
            (peer, Settled(item["attempt"], item["key"], item["state"], item["usd"], item["tokens"], item["request"], item["response"]))
        )
        session = self.sessions.get(peer.session)
        lane = live.lane
        if lane:
            self._return(live)
            self.grouping.took(now - live.since)
            lane.observe(item["headers"], now)
            if item["outcome"] in ("server", "connection"):
                lane.breaker.failure(item["reason"], now)
            elif item["outcome"] == "unsent":
                lane.breaker.probing = False
            else:
                lane.breaker.success()
        if session is None:
            return
        session.count(now, item["tokens"])
        if item["usd"] > live.attempt.usd * (1 + 1e-9) and item["state"] == "paid" and session.limits["budget_usd"]:
            session.stopped = session.stopped or {
                "kind": "data",
                "reason": f"an answer cost $ {item['usd']:.6f}, its worst case was $ {live.attempt.usd:.6f}: raise api.image_tokens or api.max_output_tokens, the budget cannot be held otherwise",
            }
        session.answered += item["outcome"] == "answer"
        session.refused += item["outcome"] == "refused"
        session.retries += item["outcome"] in ("server", "connection", "throttled")
        if item["outcome"] == "fatal":  # no run that asks there with this key can go on
            for other in (o for o in self.sessions.values() if o.lane[0] == session.lane[0]):
                other.stopped = other.stopped or {"kind": item["kind"], "reason": item["reason"]}
                for each in other.peers:
                    each.tell("halt", other.stopped)
        elif session.refused >= HOPELESS_AFTER and not session.answered:
            session.stopped = session.stopped or {"kind": "data", "reason": f"{item['reason']} ({session.refused} requests refused, none answered)"}

    def _return(self, live: Live) -> None:
        if live.lane:
            live.lane.back(live.attempt.tokens)
            live.lane = None

    # ---- the one loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Admit, commit, notify, for ever; ends only by cancellation."""
        while True:
            now = time.monotonic()
            for attempt, until in list(self.absent.items()):
                if now >= until:
                    del self.absent[attempt]
                    live = self.live[attempt].attempt
                    self.settled.append((None, Settled(attempt, live.key, "lost", live.usd, live.tokens)))
            settled, self.settled = self.settled, []
            for _, item in settled:
                self._close(item)
            arrivals, self.arrivals = self.arrivals, []
            await self._sort(arrivals)
            granted, wait_s = self._admit(time.monotonic())
            if (granted or settled) and not self.broken:
                try:
                    await self._in_ledger(self.ledger.commit, [live.attempt for _, live in granted], [item for _, item in settled])
                except (sqlite3.Error, LeaseLost) as e:
                    self.broken = {"kind": "data", "reason": f"the request ledger {self.ledger.path} cannot be written: {e}"}
            await self._notify(granted, settled)
            if self.absent:
                wait_s = min(wait_s, max(0.0, min(self.absent.values()) - time.monotonic()))
            if not (self.settled or self.arrivals):
                with suppress(TimeoutError):  # no wait_for: in Python 3.11 it may swallow the cancellation
                    async with asyncio.timeout(min(wait_s, 1.0)):
                        await self.wake.wait()
                await asyncio.sleep(self.grouping.seconds)  # what comes in meanwhile is committed and sent together
                self.wake.clear()

    def _close(self, item: Settled) -> None:
        """Take a settled attempt off the books."""
        if (live := self.live.pop(item.id, None)) is None:
            return
        self.absent.pop(item.id, None)
        self._return(live)
        account = self._account(live.attempt.account)
        account.reserve(live.attempt.usd, live.attempt.tokens, -1)
        if item.state != "free":
            account.spend.usd += item.usd
            account.spend.tokens += item.tokens
        if item.state == "paid":
            account.spend.paid += 1
        elif item.state == "lost":
            account.spend.lost += 1
            account.spend.lost_usd += item.usd

    async def _sort(self, arrivals: list[Want]) -> None:
        """Wants whose answer is there are told so, those whose answer is under way follow it, the rest queue."""
        if not arrivals:
            return
        known = await self._in_ledger(self.ledger.known, list({w.key for w in arrivals}))
        for want in arrivals:
            if want.peer not in self.peers or want.peer.session not in self.sessions:
                continue
            if want.key in known:
                want.peer.tell("known", want.key)
            elif want.key in self.followers:
                self.followers[want.key].append(want)
            else:
                self.followers[want.key] = []
                self.queues[self.sessions[want.peer.session].lane].append(want)

    def _admit(self, now: float) -> tuple[list[tuple[Want, Live]], float]:
        """The requests that may leave now, in the order they came, and the seconds until the next one might."""
        granted: list[tuple[Want, Live]] = []
        wake_s = float("inf")
        for key, queue in self.queues.items():
            lane = self.lanes[key]
            while queue:
                want = queue[0]
                session = self.sessions[want.peer.session]
                if lane.breaker.down_s(now) > session.limits["give_up_after_s"]:
                    session.stopped = session.stopped or {
                        "kind": "server",
                        "reason": f"the server has not answered for {lane.breaker.down_s(now):.0f} s: {lane.breaker.last}",
                    }
                if stopped := self.broken or session.stopped:
                    queue.popleft()
                    want.peer.tell("stopped", {"key": want.key, **stopped})
                    self._promote(want.key)
                    continue
                account = self._account(session.account)
                if not account.fits(want.usd, want.tokens, session.limits):
                    if account.under_way:
                        break  # what comes back may cost less than was reserved
                    queue.popleft()
                    want.peer.tell("budget", want.key)
                    self._promote(want.key)
                    continue
                if (wait_s := lane.wait_s(want.tokens, now)) > 0:
                    wake_s = min(wake_s, wait_s)
                    break
                queue.popleft()
                lane.leave(want.tokens, now)
                account.reserve(want.usd, want.tokens)
                attempt = Attempt(self.ledger.next_id(), want.key, session.account, want.peer.owner, want.usd, want.tokens)
                self.live[attempt.id] = live = Live(attempt, lane, want.peer, now)
                granted.append((want, live))
        return granted, wake_s

    def _promote(self, key: str) -> None:
        """The request for `key` ended without an answer: the next that waits for it takes its place."""
        waiting = self.followers.pop(key, [])
        if waiting:
            heir = waiting.pop(0)
            self.followers[key] = waiting
            self.queues[self.sessions[heir.peer.session].lane].appendleft(heir)

    async def _notify(self, granted: list[tuple[Want, Live]], settled: list[tuple[Peer | None, Settled]]) -> None:
        """After the commit: grants to those who asked, answers to those who wait."""
        if self.broken:
            for want, _ in granted:
                want.peer.tell("stopped", {"key": want.key, **self.broken})
        else:
            for want, live in granted:
                want.peer.tell("grant", [want.key, live.attempt.id])
        for peer, item in settled:
            if peer:
                peer.tell("durable", item.id)
            if item.key not in self.followers:
                continue
            if item.response is None:
                self._promote(item.key)
            else:
                for want in self.followers.pop(item.key):
                    want.peer.tell("known", want.key)
        for peer in list(self.peers):
            if peer.outbox:
                message, peer.outbox = msgpack.packb(peer.outbox), {}
                with suppress(ConnectionError):  # its reader notices too, and cleans up
                    await peer.socket.send_bytes(message)

    def _account(self, name: str) -> Account:
        return self.accounts.setdefault(name, Account(Spend()))
