"""A rank that hangs, fails or is lost is named and ends the others in time: a thread on each rank that talks through the launcher's store.

The main thread marks where it is, which sends nothing. A mark may stay for `hang_timeout_s`, SLOW times that where a disk or a
compiler is waited for; while one rank is at such a place the others may wait for it. The rank whose mark stays longer raises
the alarm (alarm.py). A rank that leaves by an error says so in the store, and each looks after the processes of its own
machine; one that is stopped is hung after `hang_timeout_s`, wherever it is. The launcher holds the store, which so answers while
any rank is stopped; a poll is one request a second a rank, and one more at a slow place or in a long wait.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

from graft.core.errors import NodeFault, TrainError
from graft.train import fence
from graft.train.nodes.alarm import ANSWER_S, DISK_S, Answer, hear, main_thread_at, ranks, within
from graft.train.nodes.peers import GONE, STOPPED, Process, state, this_process
from graft.train.preempt import leave

if TYPE_CHECKING:  # a rank that refuses before torch is loaded need not load it
    from torch.distributed import Store

SLOW = 6  # times hang_timeout_s
POLL_S = 1.0
HEARD_S = 3.0  # for which who ends the others waits for them: the launcher, and its store, may go when it leaves
LOST_S = 20.0  # without the store
OVER = "over"  # the key that ends the run, by an alarm, which has a mark, or a verdict: line and exit code
CODE = NodeFault.exit_code


class Mark(NamedTuple):
    where: str
    slow: bool


class Watch:
    """Of this rank; its main thread calls at() and close(). store: a connection of its own; collectives: how many this rank has begun."""

    running: Watch | None = None  # of this process

    def __init__(self, store: Store, rank: int, world: int, stage: str, run: Path, hang_timeout_s: float, collectives: Callable[[], int]):
        self.rank, self.world, self.stage, self.run, self.hang_timeout_s = rank, world, stage, run, hang_timeout_s
        self._store, self._collectives, self._process = store, collectives, this_process()
        self._taken: str | None = None  # why this attempt may write nothing any more
        self._peers: dict[int, Process] = {}
        self._seen = self._mark = Mark("starting", slow=True)
        self._age_s = self._excused_s = 0.0  # of the mark, and at which age another rank was last seen at a slow place
        self._slow_beats: int | None = None  # of all ranks at slow places, one a poll
        self._stopped_s = self._unheard_s = 0.0  # for which a process of this machine has been stopped; for which the store was silent
        self._own: dict[str, Any] | None = None  # this rank's verdict on itself
        self._closed, self._wake = threading.Event(), threading.Event()
        store.set_timeout(timedelta(seconds=ANSWER_S))
        store.set(f"process/{rank}", json.dumps(self._process))
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._talk, self._guard)]
        for thread in self._threads:
            thread.start()
        Watch.running = self

    def hold(self) -> IO[str] | None:
        """The right to write into the run's directory (fence.hold), on rank 0; all ranks at once, however long another run is waited for."""

        def waiting() -> None:  # each time another mark: whoever says so lives
            self.at("waiting for another run", slow=True)

        held = None
        if self.rank == 0:
            held = fence.hold(self.run, waiting)
            threading.Thread(target=self._look_for_a_later_attempt, daemon=True).start()
        with suppress(RuntimeError):  # of the store, which is the other threads' to judge
            if held:
                self._store.set("held", "")
            while not self._store.check(["held"]):  # not in a collective, which has an end
                waiting()
                time.sleep(0.2)
        self.at("starting", slow=True)
        return held

    def at(self, where: str, slow: bool = False) -> None:
        """The main thread begins something. slow: it may take SLOW times hang_timeout_s."""
        self._mark = Mark(where, slow)

    def close(self) -> None:
        """Before the process group ends: from now on this rank may leave."""
        self._closed.set()
        self._wake.set()
        self._store.set(f"done/{self.rank}", "")
        for thread in self._threads:
            thread.join(ANSWER_S)
        Watch.running = None

    # ---- polling ----------------------------------------------------------------------------------------------------
    def _look_for_a_later_attempt(self) -> None:
        """In a thread of its own: the disk may fail, or hang, and the rest of the watch goes on."""
        while not self._taken and not self._closed.wait(POLL_S):
            with suppress(OSError):  # such as ESTALE, of NFS, where another host just put its own name there: the next look reads it
                self._taken = fence.lost(self.run)

    def _talk(self) -> None:
        last, lost = time.monotonic(), None
        while not self._closed.is_set():
            self._wake.wait(POLL_S)
            now = time.monotonic()
            # what is more was this process's own stop: who suspends a whole job and lets it go on has no hung rank
            elapsed_s, last = min(now - last, 2 * POLL_S), now
            if self._mark is not self._seen:
                self._seen, self._age_s, self._excused_s, self._slow_beats = self._mark, 0.0, 0.0, None
            self._age_s += elapsed_s
            try:
                self._poll(elapsed_s)
                lost, self._unheard_s = None, 0.0
            except RuntimeError:  # torch.distributed's errors are such
                lost = lost or now
                if time.monotonic() - lost > LOST_S and not self._closed.is_set():
                    leave(self._unreachable(LOST_S), CODE)
                time.sleep(POLL_S)
                with suppress(RuntimeError):
                    self._store = self._store.clone()  # type: ignore[attr-defined]

    def _poll(self, elapsed_s: float) -> None:
        self._excuse()
        gone = self._look_around(elapsed_s)
        if not self._store.check([OVER]) and not self._closed.is_set():
            if self._own:
                self._say(OVER, self._own)
            elif self._taken:
                self._say(OVER, self._verdict(self._taken, TrainError.exit_code, self.world))
            elif gone:
                who = ", ".join(f"{ranks([r])} on {self._peers[r].host}" for r in gone)
                line = f"{self.stage}: {who} {'is' if len(gone) == 1 else 'are'} gone (killed? out of memory?), {self._last()}"
                self._say(OVER, self._verdict(line, CODE, self.world - len(gone)))
            elif self._stopped_s >= self.hang_timeout_s or overdue(self._age_s, self._seen.slow, self.hang_timeout_s, self._excused_s):
                self._say(OVER, {"mark": self._seen.where})
            else:
                return
        if not self._closed.is_set():
            over = json.loads(self._store.get(OVER))
            self._leave(over if "line" in over else self._heard(over["mark"]))

    def _say(self, key: str, verdict: dict[str, Any]) -> None:
        self._store.compare_set(key, "", json.dumps(verdict))  # the first word stands

    def _excuse(self) -> None:
        """Who waits long lets those who live at slow places take their time."""
        if self._seen.slow:
            self._store.add("slow", 1)
        elif self._age_s >= self.hang_timeout_s / 2:
            before, self._slow_beats = self._slow_beats, self._store.add("slow", 0)
            if before not in (None, self._slow_beats):
                self._excused_s = self._age_s

    def _look_around(self, elapsed_s: float) -> list[int]:
        """The ranks of this machine whose processes ended without a word."""
        if not self._peers and self._store.check([f"process/{r}" for r in range(self.world)]):
            self._peers = {r: self._peer(r) for r in range(self.world)}
        states = {r: state(p) for r, p in self._peers.items() if p.machine == self._process.machine}
        self._stopped_s = self._stopped_s + elapsed_s if STOPPED in states.values() else 0.0
        if GONE in states.values():
            time.sleep(0.1)  # its last words may be under way
        return [r for r, how in states.items() if how == GONE and not self._store.check([f"done/{r}"])]

    def _peer(self, rank: int) -> Process:
        key = f"process/{rank}"
        return Process(*json.loads(self._store.get(key))) if self._store.check([key]) else Process("an unknown host", "", 0, 0, 0)

    def _guard(self) -> None:
        """Never asks the store: where its host is lost without a word, whoever asks waits for good."""
        last, seen = time.monotonic(), self._mark
        while not self._closed.wait(POLL_S):
            now, mark = time.monotonic(), self._mark
            self._unheard_s = self._unheard_s + min(now - last, 2 * POLL_S) if mark is seen else 0.0
            last, seen = now, mark
            if self._unheard_s > max(LOST_S, self.hang_timeout_s * (SLOW if mark.slow else 1)) + ANSWER_S:
                leave(self._unreachable(self._unheard_s), CODE)

    # ---- leaving ----------------------------------------------------------------------------------------------------
    def fail(self, line: str, code: int, bug: bool) -> None:
        """The main thread leaves by an error and takes the others along; does not return where they hear of it. bug: the log here says more than the line."""
        if bug:
            time.sleep(3 * POLL_S)  # it may come from a rank that is gone: then the other thread names that one first, and leaves
            line = f"{self.stage}: {ranks([self.rank])} on {self._process.host} failed: {line}"
        self._own = self._verdict(line, code, self.world) | ({"log": self._process.machine} if bug else {})
        self._wake.set()
        time.sleep(ANSWER_S)

    def _verdict(self, line: str, code: int, heard_by: int) -> dict[str, Any]:
        return {"line": line, "code": code, "rank": self.rank, "heard_by": heard_by}

    def _leave(self, verdict: dict[str, Any]) -> NoReturn:
        with suppress(RuntimeError):
            heard, deadline = self._store.add("heard", 1), time.monotonic() + HEARD_S
            while verdict["rank"] == self.rank and heard < verdict["heard_by"] and time.monotonic() < deadline:
                time.sleep(0.05)
                heard = self._store.add("heard", 0)
        leave(verdict["line"] if verdict.get("log") != self._process.machine else None, verdict["code"])

    def _heard(self, mark: str) -> dict[str, Any]:
        """The verdict after an alarm that was raised at `mark`."""
        own = Answer(self._process.host, self._seen.where, self._age_s, self._collectives(), main_thread_at())
        peers = self._peers or {r: self._peer(r) for r in range(self.world)}
        if found := hear(self._store, self.rank, peers, own, self.run / "hang"):
            fault, answered = found
            line = f"{self.stage}: hung at {mark}: {fault}; stacks in {self.run / 'hang'}, {self._last()}"
            if answered == len(peers):
                line += f"; if it was only slow, raise {self.stage}.hang_timeout_s = {self.hang_timeout_s:g}"
            self._say("line", self._verdict(line, CODE, answered))
        return dict(json.loads(self._store.get("line")))

    def _last(self) -> str:
        from graft.train.checkpoint import steps

        kept = within(DISK_S, lambda: steps(self.run))
        return f"the last checkpoint is {kept[-1].name} in {self.run}" if kept else f"there is no checkpoint in {self.run}"

    def _unreachable(self, for_s: float) -> str:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"{self.stage}: the launcher at {where} has not answered for {for_s:.0f} s: its machine or its process is lost; {self._last()}"


def overdue(age_s: float, slow: bool, hang_timeout_s: float, excused_s: float = 0.0) -> bool:
    """Whether a mark of that age raises the alarm. excused_s: the age at which another rank was last seen at a slow place."""
    return age_s >= SLOW * hang_timeout_s or (not slow and age_s - excused_s >= hang_timeout_s)
