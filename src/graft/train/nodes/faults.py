"""What is wrong with a node, and which, from what all ranks measured: pure, and without torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

TOLD_ONLY = ("GPU", "python's patch")  # may differ between ranks
# Beyond this, tokens and leases of other services fail, and a node that keeps no time is seldom well; below, only logs are out of order.
SKEW_REFUSED_S, SKEW_TOLD_S = 60.0, 1.0
# Of the others' median. Healthy GPUs and links are within 10 %, a throttled GPU or a link that fell back to half its lanes is not;
# a file system that others use too swings by a factor of two.
SLOW = {"matmul": 0.7, "link": 0.7, "disk": 0.25}


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
        for other in (measured[rank] for rank in dict.fromkeys(m.altered_from)):
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
    if untried := [m for m in measured if not m.matmul_fault and m.matmul_tflop_per_s is None]:
        told.append(f"the matmul was not tried on {_named(untried)}: another process holds the GPU")
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


def summary(measured: list[Measured], seconds: float) -> str:
    """For people: the slowest of each."""
    hosts, world = len({m.host for m in measured}), len(measured)
    words = [f"{world} process{'es' if world > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"]
    if matmul := [m.matmul_tflop_per_s for m in measured if m.matmul_tflop_per_s]:
        words.append(f"{min(matmul):,.0f} TFLOP/s" if min(matmul) >= 1 else f"{min(matmul) * 1e3:,.0f} GFLOP/s")
    if link := [m.best_link_gb_per_s for m in measured if m.best_link_gb_per_s]:
        words.append(f"{min(link):.3g} GB/s between them, all-reduce {min(m.all_reduce_gb_per_s or 0 for m in measured):.3g} GB/s")
    if disk := [m.disk_mb_per_s for m in measured if m.disk_mb_per_s]:
        words.append(f"disk {min(disk):,.0f} MB/s")
    if world > 1:
        words.append(f"clocks within {max(abs(m.skew_s) + m.skew_error_s for m in measured) * 1e3:.2g} ms")
    return ", ".join([*words, f"{seconds:.1f} s"])


def places(found: Iterable[tuple[int, str]]) -> str:
    """Of (rank, host), such as "rank 3 on node-1 and ranks 8-15 on node-2"; of more than four hosts the first."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank, host in found:
        by_host[host].append(rank)
    words = []
    for host, ranks in by_host.items():
        in_a_row = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
        numbers = f"{ranks[0]}-{ranks[-1]}" if in_a_row else ", ".join(map(str, ranks))
        words.append(f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {host}")
    return " and ".join(words[:4]) + (f" and of {len(words) - 4} more hosts" if len(words) > 4 else "")
