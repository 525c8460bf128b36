"""Is every node fit to train? All ranks look before anything is read: what is broken is refused, what is slow is told, each by its name.

Alone: versions, a matmul and a disk write with known answers. Together, once the process group is made: exchanges in pairs, clocks,
an all-reduce. probes.py measures, faults.py judges. Ranks wait for one another in the launcher's store, not in a collective, which could not
say who is missing. A step that takes longer than DEADLINE_S ends the run with the names of those that hold it up, even where NCCL hangs.
0.4 s on two CPU processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist

from graft.core.artifact import write_text_atomic
from graft.core.environment import number
from graft.core.errors import NodeFault, TrainError
from graft.train.launch import GPUS
from graft.train.nodes import probes
from graft.train.nodes.faults import Measured, faults, summary
from graft.train.nodes.roll import Roll
from graft.train.ranks import local_leader

DEADLINE_S = 50.0  # so that the line is there within a minute; GRAFT_PREFLIGHT_S where ranks start further apart
STEPS = ("the matmul and the disk", "the process group", "the exchange in pairs", "the clocks", "the all-reduce", "the end")
LAST_WORD_S = 3.0  # the end of one rank breaks the collectives of all: the launcher ends the others before they say so too


@contextmanager
def inspected(run_directory: Path, deadline_s: float | None = None) -> Iterator[Callable[[torch.device], float | None]]:
    """Around the making of the process group, on all ranks: what it yields is called with their device once the group is made, and returns
    the mean TFLOP/s of their matmuls, on rank 0.

    Raises TrainError, the same on all ranks, on what forbids training. Rank 0 prints what was measured and writes `nodes.json`.
    deadline_s: of each step; where one outlasts it, the process ends with a line, for an exception reaches no hanging collective.
    """
    roll = Roll(STEPS, deadline_s or number("GRAFT_PREFLIGHT_S", DEADLINE_S, 1.0))
    try:
        roll.begin("the matmul and the disk")
        started = time.perf_counter()
        mine = _alone(roll, run_directory)
        _, hosts = _judged(roll, "the process group", mine)
        alone_s = time.perf_counter() - started

        def together(device: torch.device) -> float | None:
            roll.begin("the exchange in pairs")  # first: where it hangs, it is one pair that does not come past it
            started = time.perf_counter()
            mine.link_gb_per_s, mine.altered_from = probes.links(device, hosts)
            roll.begin("the clocks")
            mine.skew_s, mine.skew_error_s = probes.skew(device)
            roll.begin("the all-reduce")
            mine.sum_wrong, mine.all_reduce_gb_per_s = probes.all_reduce(device)
            probes.clean(device)
            measured, _ = _judged(roll, "the end", mine)
            if measured:
                _tell(measured, alone_s + time.perf_counter() - started, roll.took_s, run_directory)
            rates = [m.matmul_tflop_per_s for m in measured]
            return fmean(filter(None, rates)) if any(rates) else None

        yield together
    except torch.OutOfMemoryError:
        raise TrainError(f"preflight: another process holds the GPU of rank {roll.rank} on {roll.host}: end it, or wait for it to leave") from None
    except dist.DistError as e:
        time.sleep(LAST_WORD_S)
        raise NodeFault(f"preflight: rank {roll.rank} on {roll.host} lost the others: {str(e).splitlines()[0]}") from None
    finally:
        roll.close()


def _alone(roll: Roll, run_directory: Path) -> Measured:
    wanted, seen = int(os.environ.get(GPUS, 0)), torch.cuda.device_count()
    if seen < wanted:
        raise TrainError(
            f"preflight: {roll.host} has {wanted} GPUs for this run, of which torch sees {seen}: mend its driver, install a torch for CUDA (this is "
            f"{torch.__version__}), or take the node out with --exclude={roll.host}"
        )
    device = probes.device()
    fault, tflop_per_s = probes.matmul(device)
    mine = Measured(roll.rank, roll.host, {} if fault else probes.versions(device), fault, tflop_per_s)
    if local_leader():
        try:
            mine.disk_mb_per_s = probes.disk(run_directory, roll.rank)
        except OSError as e:
            mine.disk_fault = f"{run_directory} cannot be written ({e.strerror or e})"
    return mine


def _judged(roll: Roll, step: str, mine: Measured) -> tuple[list[Measured], list[str]]:
    """(what all ranks measured so far, on rank 0 alone; their hosts), where rank 0 finds nothing that forbids to go on to `step`."""
    roll.store.set(f"{step} {roll.rank}", json.dumps(asdict(mine)))
    roll.begin(step)
    measured: list[Measured] = []
    if roll.rank == 0:
        measured = [Measured(**json.loads(roll.store.get(f"{step} {rank}"))) for rank in range(roll.world)]
        roll.store.set(f"judged {step}", json.dumps([faults(measured)[0], [m.host for m in measured]]))
    refused, hosts = json.loads(roll.store.get(f"judged {step}"))
    if refused:
        raise TrainError(f"preflight: {'; '.join(refused)}")
    return measured, hosts


def _tell(measured: list[Measured], seconds: float, steps_s: dict[str, float], run_directory: Path) -> None:
    _, told = faults(measured)
    record = {"time_s": time.time(), "preflight_s": seconds, "steps_s": steps_s, "told": told, "ranks": [asdict(m) for m in measured]}
    write_text_atomic(run_directory / "nodes.json", json.dumps(record, indent=1) + "\n")
    for line in [*told, summary(measured, seconds)]:
        print(f"nodes: {line}", flush=True)
