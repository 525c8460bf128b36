"""Is every node fit to train? All ranks look before anything is read: what is broken is refused, what is slow is told, each by its name.

Alone: versions, a matmul and a disk write with known answers. Together, once the process group is made: clocks, an all-reduce,
exchanges in pairs. Ranks wait for one another in the launcher's store, not in a collective, which could not say who is missing.
A step that takes longer than DEADLINE_S ends the run with the names of those that hold it up, even where NCCL hangs.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from graft.core.artifact import write_text_atomic
from graft.core.errors import TrainError
from graft.train import probes
from graft.train.ranks import local_leader
from graft.train.roll import Roll, places

DEADLINE_S = 50.0  # so that the line is there within a minute; GRAFT_PREFLIGHT_S where ranks start further apart
STEPS = ("the matmul and the disk", "the process group", "the exchange in pairs", "the clocks", "the all-reduce", "the end")
TOLD_ONLY = ("GPU", "python's patch")  # may differ between ranks
# Beyond this, tokens and leases of other services fail, and a node that keeps no time is seldom well; below, only logs are out of order.
SKEW_REFUSED_S, SKEW_TOLD_S = 60.0, 1.0
# Of the others' median. Healthy GPUs and links are within 10 %, a throttled GPU or a link that fell back to half its lanes is not;
# a file system that others use too swings by a factor of two.
SLOW = {"matmul": 0.7, "link": 0.7, "disk": 0.25}
LAST_WORD_S = 3.0  # the end of one rank breaks the collectives of all: the launcher ends the others before they say so too


@dataclass
class Measured:
    """By one rank."""

    rank: int
    host: str
    versions: dict[str, str]
    matmul_fault: str | None = None
    matmul_tflop_per_s: float | None = None
    disk_fault: str | None = None
    disk_mb_per_s: float | None = None  # of the node, by one of its ranks
    skew_s: float = 0.0  # ahead of rank 0's clock
    skew_error_s: float = 0.0
    sum_wrong: int = 0  # elements of the all-reduce
    all_reduce_gb_per_s: float | None = None
    link_gb_per_s: dict[str, float] = field(default_factory=dict)  # by the other rank
    altered_from: list[int] = field(default_factory=list)

    @property
    def best_link_gb_per_s(self) -> float | None:
        return max(self.link_gb_per_s.values(), default=None)


# ---- judging ------------------------------------------------------------------------------------------------------------
def faults(measured: list[Measured]) -> tuple[list[str], list[str]]:
    """(what forbids training, what a person should know), a line each that names ranks and hosts, with the numbers."""
    refused, told = [], []
    for what in dict.fromkeys(name for m in measured for name in m.versions):
        by_version = defaultdict(list)
        for m in filter(lambda m: m.versions, measured):  # a broken GPU tells none
            by_version[m.versions.get(what, "absent")].append(m)
        usual, *others = sorted(by_version, key=lambda version: -len(by_version[version]))
        for version in others:
            mine = by_version[version]
            line = f"{what} is {version} on {_named(mine)}, {usual} on {_named(by_version[usual])}"
            if what in TOLD_ONLY:
                told.append(line)
            else:
                refused.append(f"{line}: install the same, or {_mend(mine)}")
    for why, mine in _alike(measured, lambda m: m.matmul_fault):
        refused.append(f"{why} on {_named(mine)}: {_mend(mine)}")
    for why, mine in _alike(measured, lambda m: m.disk_fault):
        refused.append(f"{why} on {_named(mine)}: make room there, or {_mend(mine)}")
    for m in measured:
        for other in (measured[rank] for rank in m.altered_from):
            refused.append(f"what {_named([other])} sent came altered to {_named([m])}: {_mend([other, m])}")
    if wrong := [m for m in measured if m.sum_wrong]:
        most = max(m.sum_wrong for m in wrong)
        refused.append(f"the all-reduce gives a wrong sum on {_named(wrong)}, of up to {most} elements: {_mend(wrong)}")
    near = sum(abs(m.skew_s) <= SKEW_TOLD_S for m in measured)
    right_s = 0.0 if 2 * near >= len(measured) else median(m.skew_s for m in measured)  # rank 0's own clock may be the wrong one
    for off, mine in _alike(measured, lambda m: f"{m.skew_s - right_s:+.1f} s" if abs(m.skew_s - right_s) > SKEW_TOLD_S else None):
        line = f"the clock is {off} off on {_named(mine)}"
        if abs(mine[0].skew_s - right_s) > SKEW_REFUSED_S:
            refused.append(f"{line}, more than {SKEW_REFUSED_S:.0f} s: set it, or {_mend(mine)}")
        else:
            told.append(line)
    told += _slow(measured, "matmul", "TFLOP/s", lambda m: m.matmul_tflop_per_s)
    told += _slow(measured, "link", "GB/s", lambda m: m.best_link_gb_per_s)
    told += _slow(measured, "disk", "MB/s", lambda m: m.disk_mb_per_s)
    return refused, told


def _slow(measured: list[Measured], what: str, unit: str, rate: Callable[[Measured], float | None]) -> Iterator[str]:
    """With two there is no telling the usual from the odd: then it takes half the share."""
    rates = [(m, r) for m in measured if (r := rate(m)) is not None]
    slow = defaultdict(list)
    for at, (m, mine) in enumerate(rates):
        others = [r for n, (_, r) in enumerate(rates) if n != at]
        if others and mine < (usual := median(others)) * SLOW[what] / (1 if len(others) > 1 else 2):
            slow[m.host].append((m, mine, usual))
    for found in slow.values():
        _, mine, usual = min(found, key=lambda f: f[1])
        yield f"{_named([m for m, *_ in found])}: {what} {mine:.3g} {unit}, the median of the others {usual:.3g}"


def _alike(measured: list[Measured], said: Callable[[Measured], str | None]) -> Iterable[tuple[str, list[Measured]]]:
    found = defaultdict(list)
    for m in measured:
        if (what := said(m)) is not None:
            found[what].append(m)
    return found.items()


def _named(measured: list[Measured]) -> str:
    return places((m.rank, m.host) for m in measured)


def _mend(measured: list[Measured]) -> str:
    hosts = dict.fromkeys(m.host for m in measured)
    return f"take {'the node' if len(hosts) == 1 else 'one of these nodes'} out with --exclude={','.join(hosts)}"


# ---- looking ------------------------------------------------------------------------------------------------------------
@contextmanager
def inspected(run_directory: Path, deadline_s: float | None = None) -> Iterator[Callable[[torch.device], None]]:
    """Around the making of the process group, on all ranks: what it yields is called with their device once the group is made.

    Raises TrainError, the same on all ranks, on what forbids training. Rank 0 prints what was measured and writes `nodes.json`.
    deadline_s: of each step; where one outlasts it, the process ends with a line, for an exception reaches no hanging collective.
    """
    roll = Roll(STEPS, deadline_s or float(os.environ.get("GRAFT_PREFLIGHT_S", DEADLINE_S)))
    try:
        roll.begin("the matmul and the disk")
        started = time.perf_counter()
        mine = _alone(roll, run_directory)
        _, hosts = _judged(roll, "the process group", mine)
        alone_s = time.perf_counter() - started

        def together(device: torch.device) -> None:
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
                _tell(measured, alone_s + time.perf_counter() - started, run_directory)

        yield together
    except dist.DistError as e:
        time.sleep(LAST_WORD_S)
        raise TrainError(f"preflight: rank {roll.rank} on {roll.host} lost the others: {str(e).splitlines()[0]}") from None
    finally:
        roll.close()


def _alone(roll: Roll, run_directory: Path) -> Measured:
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


def _tell(measured: list[Measured], seconds: float, run_directory: Path) -> None:
    _, told = faults(measured)
    record = {"time_s": time.time(), "preflight_s": seconds, "told": told, "ranks": [asdict(m) for m in measured]}
    write_text_atomic(run_directory / "nodes.json", json.dumps(record, indent=1) + "\n")
    for line in [*told, summary(measured, seconds)]:
        print(f"nodes: {line}", flush=True)


def summary(measured: list[Measured], seconds: float) -> str:
    """For people: the slowest of each."""
    hosts, world = len({m.host for m in measured}), len(measured)
    words = [f"{world} process{'es' if world > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"]
    if matmul := [m.matmul_tflop_per_s for m in measured if m.matmul_tflop_per_s]:
        words.append(f"{min(matmul):,.0f} TFLOP/s" if min(matmul) >= 1 else f"{min(matmul) * 1e3:,.0f} GFLOP/s")
    if link := [m.best_link_gb_per_s for m in measured if m.best_link_gb_per_s]:
        words.append(f"{min(link):.3g} GB/s between them, all-reduce {min(m.all_reduce_gb_per_s or 0 for m in measured):.3g} GB/s")
    words.append(f"disk {min(m.disk_mb_per_s for m in measured if m.disk_mb_per_s):,.0f} MB/s")
    if world > 1:
        words.append(f"clocks within {max(abs(m.skew_s) + m.skew_error_s for m in measured) * 1e3:.2g} ms")
    return ", ".join([*words, f"{seconds:.1f} s"])
