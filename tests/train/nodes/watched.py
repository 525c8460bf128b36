"""Watches over a run's directory, without a run: `watched.py RUN unreadable | waits`. It leaves as a rank does, or with 0 after some seconds."""

import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from graft.train import fence
from graft.train.nodes.watch import SLOW, Watch

TIMEOUT_S = 0.5


def unreadable(run):
    """The name of the attempt cannot be read for some looks; then a later attempt's stands there."""
    watch = Watch(dist.HashStore(), 0, 1, "sft", run, 60, lambda: 0)
    held = watch.hold()
    (run / fence.FILE).unlink()
    (run / fence.FILE).symlink_to("/proc/self/mem")  # reading it is an OSError, as of a file that another host of NFS just replaced
    time.sleep(2.5)
    (run / fence.FILE).unlink()
    (run / fence.FILE).write_text("7.1")
    time.sleep(10)
    held.close()


def waits(run):
    """Two ranks, for longer than the slowest mark may stay, while another process holds the run's directory."""
    store = dist.HashStore()
    watches = [Watch(store, rank, 2, "sft", run, TIMEOUT_S, lambda: 0) for rank in range(2)]
    other = threading.Thread(target=watches[1].hold)
    other.start()
    began = time.monotonic()
    watches[0].hold().close()
    other.join(10)
    assert time.monotonic() - began > SLOW * TIMEOUT_S + 2


{"unreadable": unreadable, "waits": waits}[sys.argv[2]](Path(sys.argv[1]))
