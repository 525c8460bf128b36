"""Who has come how far: ranks wait for one another in the launcher's store, and who holds the others up is named.

A collective could say neither who is missing nor, under NCCL, that anybody is. The store serves before there is a process group.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from graft.core.errors import NodeFault
from graft.train.nodes.alarm import within
from graft.train.nodes.faults import places
from graft.train.preempt import leave

_numbers = count()  # of the rolls of this process, which all ranks make in the same order


class Roll:
    """A sequence of steps that all ranks begin together. While it is open, a thread ends this process where a step outlasts `deadline_s`:
    the main thread may hang in a collective that nothing interrupts."""

    def __init__(self, steps: tuple[str, ...], deadline_s: float):
        self.steps, self.deadline_s = steps, deadline_s
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.host = socket.gethostname()
        self._began: list[float] = []
        self._until = time.monotonic() + deadline_s
        self._over = threading.Event()
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"graft/roll/{restart}/{next(_numbers)}", _store(deadline_s))
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def begin(self, step: str) -> None:
        """Wait until all ranks are at `step`."""
        self.store.set(f"at/{self.rank}", json.dumps([self.host, self.steps.index(step)]))
        if self.store.add(step, 1) == self.world:
            self.store.set(f"all at {step}", "")
        while True:
            with suppress(dist.DistStoreError):  # not yet; in short waits, for one that waits keeps the store from the watching thread
                self.store.wait([f"all at {step}"], timedelta(seconds=1))
                break
            while time.monotonic() > self._until:  # the store is the watching thread's, which ends this process
                time.sleep(1)
        self._began.append(time.monotonic())
        self._until = self._began[-1] + self.deadline_s

    @property
    def took_s(self) -> dict[str, float]:
        """Seconds from the beginning of each step to the next one's, the last not begun among them."""
        return {step: b - a for step, a, b in zip(self.steps, self._began, self._began[1:], strict=False)}

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            if time.monotonic() > self._until:
                # the launcher's machine may be what hangs, and whoever asks the store then waits for good
                said = within(self.deadline_s, self.held_up) or f"the launcher at {_launcher()} does not answer: its machine or its process is lost"
                leave(f"preflight: {said}", NodeFault.exit_code)

    def held_up(self) -> str:
        """By whom."""
        came = {}
        for rank in range(self.world):
            if self.store.check([f"at/{rank}"]):
                came[rank] = tuple(json.loads(self.store.get(f"at/{rank}")))
        each = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        host_of = {rank // each: host for rank, (host, _) in came.items()}  # one that never came is where its neighbours are
        absent = [rank for rank in range(self.world) if rank not in came]
        steps = [at for _, at in came.values()]
        late = absent or [rank for rank, (_, at) in came.items() if at == min(steps) < max(steps)]
        in_time = f"within {self.deadline_s:.0f} s (GRAFT_PREFLIGHT_S)"
        if not late:
            return f"no rank came past {self.steps[min(steps)]} {in_time}: look at the network between the nodes"
        names = places((rank, host_of.get(rank // each, f"node {rank // each} of the launch")) for rank in late)
        missed = "did not start" if absent else f"did not come past {self.steps[min(steps)]}"
        hosts = dict.fromkeys(host_of.get(rank // each, "HOST") for rank in late)
        return f"{names} {missed} {in_time} of the others: look there, or take the node out with --exclude={','.join(hosts)}"


def _launcher() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _store(timeout_s: float) -> dist.Store:
    """The launcher's, by a connection of its own; of a process that was not launched, one for itself."""
    if "RANK" not in os.environ:
        return dist.HashStore()

    def connect() -> dist.Store | str:
        try:
            return next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]
        except dist.DistError as e:
            return str(e).splitlines()[0]

    found = within(2 * timeout_s, connect)  # who takes the connection and then says nothing has no timeout
    if found is None or isinstance(found, str):
        raise NodeFault(
            f"preflight: {socket.gethostname()} does not reach the launcher at {_launcher()} ({found or 'it does not answer'}): "
            "is the port open between nodes?"
        )
    return found
