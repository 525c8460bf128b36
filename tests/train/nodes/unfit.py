"""One of two ranks that go through the preflight again and again, the second with another fault each time, as if on two nodes.

    torchrun --nproc_per_node 2 unfit.py FOLDER FAULT …

Each rank writes FOLDER/FAULT.RANK: {"line": what was raised, or null, "seconds": …}. A fault in which a rank hangs must be the last; its
deadline is 4 s. On a GPU each where there are two, else on gloo.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from graft.core.errors import TrainError
from graft.train.nodes import probes
from graft.train.nodes.inspection import inspected
from graft.train.preempt import leave

NEVER_S = 300


def altered(op, tensor, other):
    return dist.P2POp(op, tensor + 1 if op is dist.isend else tensor, other)


def flipped(dtype):
    def product(a, b):
        c = a @ b
        if c.dtype is dtype:
            c[7, 300] += 256
        return c

    return product


def slow(a, b):
    time.sleep(0.05)
    return a @ b


def off_by_one(tensor):
    done = dist.all_reduce(tensor)
    if tensor.numel() > 1:
        tensor[5] += 1
    return done


class Distributed:
    """torch.distributed with some functions of it replaced, for probes.py alone."""

    def __init__(self, **replaced):
        self.__dict__ |= replaced

    def __getattr__(self, name):
        return getattr(dist, name)


class Clock:
    def __init__(self, ahead_s):
        self.time, self.perf_counter = (lambda: time.time() + ahead_s), time.perf_counter


def other_torch(device, true=probes.versions):
    return true(device) | {"torch": "2.0.1"}


def hang(device, hosts, true=probes.links):
    true(device, hosts)
    time.sleep(NEVER_S)


FAULTS = {
    "healthy": {},
    "version": {"versions": other_torch},
    "matmul-fp32": {"product": flipped(torch.float32)},
    "matmul-bf16": {"product": flipped(torch.bfloat16)},
    "slow": {"product": slow},
    "clock": {"time": Clock(-90)},
    "late-clock": {"time": Clock(5)},
    "sum": {"dist": Distributed(all_reduce=off_by_one)},
    "message": {"dist": Distributed(P2POp=altered)},
    "disk": {},
    "hang": {"links": hang},
}


def look(folder, deadline_s):
    device = probes.device()
    with inspected(folder, deadline_s) as together:
        if not dist.is_initialized():
            if device.type == "cuda":  # at once, as DeepSpeed makes it
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo")
        found = together(device)
        assert (found is not None and found > 0) == (dist.get_rank() == 0), f"the ranks' matmul is told on rank 0: {found}"


def main(folder, *faults):
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    socket.gethostname = lambda: f"node-{'ab'[rank]}"
    for fault in faults:
        if fault == "absent" and rank == 1:
            time.sleep(NEVER_S)
        true = dict(vars(probes))
        if rank == 1:
            vars(probes).update(FAULTS.get(fault, {}))
        started, line = time.perf_counter(), None
        try:
            look(Path(folder) / fault, 4 if fault == faults[-1] else None)
        except TrainError as e:
            line = str(e)
            if fault == faults[-1]:
                leave(str(e), e.exit_code)
        vars(probes).update(true)
        seconds = time.perf_counter() - started
        (Path(folder) / f"{fault}.{rank}").write_text(json.dumps({"line": line, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
