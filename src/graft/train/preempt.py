"""A run that is asked to leave: SIGTERM or SIGUSR2, to any one rank or to the launcher, ends it with a checkpoint of the step at hand.

SLURM sends one of them before it takes a node away. The loop gathers the question at each step's border, so all ranks save the
same step; they leave with the exit code of errors.Preempted, 75, which says: start the same command again.
"""

from __future__ import annotations

import fcntl
import signal
import time
from pathlib import Path
from types import FrameType
from typing import IO

EXIT_CODE_FILE = "GRAFT_EXIT_CODE_FILE"  # of the environment: where a rank that refuses or leaves writes its exit code
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not SIGUSR1, which NCCL takes


class Asked:
    """`by`: the name of the first signal that this process was sent, None until then."""

    def __init__(self) -> None:
        self.by: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.by = self.by or signal.Signals(number).name


def hold(run: Path) -> IO[str]:
    """The right to write into a run's directory, for as long as the file is open: a run that was asked to leave may still be saving there.

    Waits for it; on NFS and Lustre the file system must have locks.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / "lock").open("a", encoding="utf-8")
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if not said:
                print(f"{run}: another process is training here, waiting for it to leave", flush=True)
            said = True
            time.sleep(0.2)
