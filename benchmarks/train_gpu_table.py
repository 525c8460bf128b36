"""The table of benchmarks/train_gpu.py: runs of graft and its peers, of one call or of several, to Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

HEAD = ("row", "of", "tokens/s", "min–max", "runs", "to best peer", "step", "MFU", "peak GiB", "first step", "start", "to first step")


def of_peers(row: str) -> str:
    """The row whose runs of peers stand beside `row`: they have no FP8 base."""
    return row.replace("fp8", "bf16")


def alike(calls: Iterable[dict[str, Any]]) -> None:
    """ValueError where calls are of other GPUs or shapes: no median goes over those."""
    if len(kinds := {f"{call['like']} on {call['device']}" for call in calls}) > 1:
        raise ValueError(f"no table joins {' and '.join(sorted(kinds))}")


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Cells, HEAD's first. runs: each has row, of (graft or a peer), and figures or failed.

    Medians over a row's runs, the spread of their tokens/s, and graft's tokens/s over the best peer's.
    """
    found = [list(HEAD)]
    for row in dict.fromkeys(r["row"] for r in runs if r["of"] == "graft"):
        here = [r for r in runs if r["row"] == (row if r["of"] == "graft" else of_peers(row))]
        done = {of: [r for r in here if r["of"] == of and "failed" not in r] for of in dict.fromkeys(["graft", *(r["of"] for r in here)])}
        pace = {of: median(r["tokens_per_s"] for r in its) for of, its in done.items() if its}
        best = max((pace[of] for of in pace if of != "graft"), default=None)
        for of, its in done.items():
            if its:
                found.append([row, of, *_figures(its, pace[of] / best if best else None)])
            reasons = dict.fromkeys(r["failed"] for r in here if r["of"] == of and "failed" in r)
            found += [[row, of, f"failed: {why.replace('|', '/')[:200]}", *[""] * (len(HEAD) - 3)] for why in reasons]
    return found


def _figures(runs: list[dict[str, Any]], ratio: float | None) -> list[str]:
    m = {
        key: median(r.get(key) or 0 for r in runs)
        for key in ("step_time_s", "mfu_nominal", "peak_mem_gib", "first_step_s", "launch_s", "to_first_step_s")
    }
    paces = [r["tokens_per_s"] for r in runs]
    return [
        f"{median(paces):,.0f}",
        f"{min(paces):,.0f}–{max(paces):,.0f}",
        f"{len(runs)}",
        f"{ratio:.2f}" if ratio else "",
        f"{m['step_time_s'] * 1e3:.0f} ms",
        f"{m['mfu_nominal']:.1%}" if m["mfu_nominal"] else "",
        f"{m['peak_mem_gib']:.1f}",
        f"{m['first_step_s']:.1f} s",
        f"{m['launch_s']:.0f} s",
        f"{m['to_first_step_s']:.0f} s" if m["to_first_step_s"] else "",
    ]


def report(calls: list[dict[str, Any]]) -> str:
    """Markdown: the table of all calls together, and what each ran on."""
    head, *rows = (f"| {' | '.join(cells)} |" for cells in table([r for c in calls for r in c["runs"]]))
    about = [f"{c['device']}, driver {c['driver']}, {_joined(c['versions'])}, commit {c['commit']}: {c['command']}" for c in calls]
    return "\n".join([head, "|---" * len(HEAD) + "|", *rows, "", *about])


def _joined(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
