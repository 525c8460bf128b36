"""A run that is asked to leave: SIGTERM or SIGUSR2, to any one rank or to the launcher, ends it with a checkpoint of the step at hand.

SLURM sends one of them before it takes a node away. The loop gathers the question at each step's border, so all ranks save the
same step; they leave with the exit code of errors.Preempted, 75, which says: start the same command again.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

EXIT_CODE_FILE = "GRAFT_EXIT_CODE_FILE"  # of the environment: where a rank that refuses or leaves writes its exit code
RUN_FILE = "GRAFT_RUN_FILE"  # of the environment: where a rank that begins to train writes its run's directory
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not SIGUSR1, which NCCL takes


class Asked:
    """`by`: the name of the first signal that this process was sent, None until then."""

    def __init__(self) -> None:
        self.by: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.by = self.by or signal.Signals(number).name


def begins(run: Path) -> None:
    """Tell the launcher that training begins there; who is killed as he saves could not say it any more."""
    if told := os.environ.get(RUN_FILE):
        Path(told).write_text(str(run), encoding="utf-8")


def leave(line: str | None, code: int) -> NoReturn:
    """This rank's process ends at once, cleaning up nothing that might wait for other ranks. line: for the user; the launcher says it once."""
    if line:
        sys.stderr.write(f"graft: {line}\n")  # in one piece: several ranks say it at once
        sys.stderr.flush()
    if told := os.environ.get(EXIT_CODE_FILE):  # the launcher itself leaves with 1, whatever a rank left with
        with suppress(FileExistsError), open(told, "x", encoding="utf-8") as file:  # the first says why, the others that it is gone
            file.write(str(code))
    os._exit(code)
