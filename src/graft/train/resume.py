"""Where a run goes on: the newest checkpoint that holds, chosen by rank 0, and one writer a run directory."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

import torch.distributed as dist

from graft.train import checkpoint


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


def newest_of_all(run_dir: Path) -> Path | None:
    """Rank 0 chooses the checkpoint, all ranks go on from that one; None for a fresh start."""
    choice: list[str | None] = [None]
    if dist.get_rank() == 0:
        folder, passed = checkpoint.newest(run_dir)
        for line in passed:
            print(f"resume: {line}", flush=True)
        choice = [str(folder) if folder else None]
    dist.broadcast_object_list(choice)
    return Path(choice[0]) if choice[0] else None
