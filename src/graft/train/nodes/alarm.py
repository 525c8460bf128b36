"""What follows an alarm: each living rank writes its stacks and answers, the silent ones are looked at and ended, and one line says who is at fault.

A rank that others wait for has begun fewer collectives than they have. That holds under NCCL, where the CPU runs ahead of its
GPU and waits wherever it reads a result, as under gloo, where it waits inside the collective.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from graft.train.nodes.peers import Process, end, state

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
ANSWER_S = 10.0  # who says nothing for as long is silent
DISK_S = 5.0  # for stacks and the name of a checkpoint: the disk may be what hangs


class Answer(NamedTuple):
    """Of a living rank."""

    host: str
    mark: str
    age_s: float
    collectives: int  # begun so far, over all groups
    at: str  # FILE:LINE in FUNCTION of the main thread


def hear(store: Store, rank: int, peers: dict[int, Process], own: Answer, folder: Path) -> tuple[str, int] | None:
    """All ranks at once: (who is at fault, how many answered) on the lowest that answered, None on the others, which wait for its line.

    Takes as long as ANSWER_S, and 2 s for each silent process of the machine. peers: of all ranks; folder: of the stacks.
    """
    within(DISK_S, lambda: _write_stacks(folder, rank, own))
    store.set(f"answer/{rank}", json.dumps(own))
    keys = {r: f"answer/{r}" for r in peers}
    deadline = time.monotonic() + ANSWER_S
    while not store.check(list(keys.values())) and time.monotonic() < deadline:
        time.sleep(0.1)
    # who was looked at was silent; a stopped one may answer as it is woken to write its stacks
    given = [r for r, key in keys.items() if store.check([key]) and not store.check([f"state/{r}"])]
    silent = [r for r in peers if r not in given]
    looked_at = {r: min(near) for r in silent if (near := [g for g in given if peers[g].machine == peers[r].machine])}
    own_to_end = {r: state(peers[r]) for r, by in looked_at.items() if by == rank}
    for r, how in own_to_end.items():
        store.set(f"state/{r}", how)
    for r, how in own_to_end.items():
        text = f"rank {r} on {peers[r].host}: {how}\n{end(peers[r]).decode()}"
        within(DISK_S, partial(_stacks(folder, r).write_text, text, encoding="utf-8"))
    if rank not in given[:1]:
        with suppress(RuntimeError):  # it may have been ended too
            store.wait(["line"], timedelta(seconds=2 * ANSWER_S))
            return None
    with suppress(RuntimeError):
        store.wait([f"state/{r}" for r in looked_at], timedelta(seconds=DISK_S))
    answers = {r: Answer(*json.loads(store.get(keys[r]))) for r in given}
    states = {r: (peers[r].host, store.get(f"state/{r}").decode() if store.check([f"state/{r}"]) else None) for r in silent}
    return blame(answers, states), len(given)


def blame(answers: dict[int, Answer], silent: dict[int, tuple[str, str | None]]) -> str:
    """Who holds the others up. answers: by rank; silent: (host, state, None where nobody could look) of the ranks that gave none."""
    if silent:
        alike = defaultdict(list)
        for rank, seen in sorted(silent.items()):
            alike[seen].append(rank)
        return ", ".join(
            f"{ranks(who)} on {host} {'does' if len(who) == 1 else 'do'} not answer" + (f" ({how})" if how else "")
            for (host, how), who in alike.items()
        )
    counts = {a.collectives for a in answers.values()}
    rank, a = min(answers.items(), key=lambda item: (item[1].collectives, item[0]))
    if len(counts) == 1 < len(answers):
        return f"no rank is behind the others, all wait for a GPU or the network ({ranks([rank])} on {a.host} at {a.at})"
    more = [r for r in sorted(answers) if answers[r].collectives == a.collectives and r != rank]
    line = f"{ranks([rank])} on {a.host} has been at {a.at} for {a.age_s:.0f} s"
    return line + (f", {ranks(more)} too" if more else "") + (", the others wait for it" if len(counts) > 1 else "")


def ranks(numbers: list[int]) -> str:
    """`rank 3`, or `ranks 1, 2, 4`; of many the first eight."""
    return f"rank{'s' * (len(numbers) > 1)} " + ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def main_thread_at() -> str:
    """FILE:LINE in FUNCTION of this process."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def within(limit_s: float, act: Callable[[], T]) -> T | None:
    """What `act` returns, None where it takes longer or fails."""
    done: list[T] = []

    def run() -> None:
        with suppress(OSError, RuntimeError):  # of the disk, of the store
            done.append(act())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return done[0] if done else None


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def _write_stacks(folder: Path, rank: int, own: Answer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _stacks(folder, rank).open("w", encoding="utf-8") as f:
        f.write(f"rank {rank} on {own.host}: {own.mark} for {own.age_s:.0f} s, {own.collectives} collectives begun\n")
        f.flush()
        faulthandler.dump_traceback(f, all_threads=True)
