"""Which attempt may write into a run's directory. One process holds the lock; the newest attempt's name stands in `attempt`.

A node that a scheduler gave up may run on, cut off, while its job was started again elsewhere: the new attempt puts its name there, and
the old one finds it before it publishes anything and at its next look (watch.py), and leaves. A fencing token, as in M. Kleppmann,
"How to do distributed locking" (2016).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from graft.core.artifact import write_text_atomic
from graft.core.errors import TrainError

VARIABLE = "GRAFT_ATTEMPT"  # JOB.RESTART, as slurm/job.sh sets it
FILE = "attempt"
OTHER_JOB_S = 60.0  # for which a job waits for another: that one may have been asked to leave


def own() -> str:
    """The name of this attempt."""
    return os.environ.get(VARIABLE) or f"{socket.gethostname()}:{os.getpid()}"


def hold(run: Path, waiting: Callable[[], None] = lambda: None) -> IO[str]:
    """The right to write into a run's directory, for as long as the file is open, by rank 0.

    Waits for who holds it, which may still be saving. An earlier attempt of the same job is told to leave; beside another job
    this one leaves after OTHER_JOB_S, by TrainError. On NFS and Lustre the file system must have locks.

    waiting: called again and again while this waits.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / "lock").open("a", encoding="utf-8")
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_text_atomic(run / FILE, own())
            return lock
        except BlockingIOError:
            holder = _named(run)
        if not said:
            print(f"{run}: {holder or 'another process'} is training here, waiting for it to leave", flush=True)
        said = True
        if _succeeds(own(), holder):
            write_text_atomic(run / FILE, own())
        elif os.environ.get(VARIABLE) and time.monotonic() - began > OTHER_JOB_S:
            raise TrainError(f"{run}: {_job(holder)} is training here already: follow it by `graft status`, or end it first")
        waiting()
        time.sleep(0.2)


def lost(run: Path) -> str | None:
    """Why this attempt may publish nothing into the run's directory any more, None where it may. By the process that holds it."""
    holder = _named(run)
    return None if holder in (own(), "") else f"{run}: {_job(holder)} has taken this run over, nothing more is written by {own()}"


def check(run: Path) -> None:
    """TrainError where lost()."""
    if line := lost(run):
        raise TrainError(line)


def _named(run: Path) -> str:
    try:
        return (run / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _succeeds(attempt: str, other: str) -> bool:
    """Whether both are of one job and `attempt` is the later."""
    (job, _, restart), (other_job, _, other_restart) = attempt.partition("."), other.partition(".")
    return job == other_job and restart.isdigit() and other_restart.isdigit() and int(restart) > int(other_restart)


def _job(attempt: str) -> str:
    job, dot, restart = attempt.partition(".")
    return f"job {job} (attempt {restart})" if dot and restart.isdigit() and job.isdigit() else attempt or "another process"
