"""The figures and the table of benchmarks/checkpoint.py: from when steps ended and checkpoints were whole, to Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any, NamedTuple

SETTLE = 5  # first steps that no median counts
HEAD = (
    *("of", "a checkpoint, MB", "share", "step", "first save holds", "saves hold, median", "max", "saves"),
    *("steps after, median", "max", "written after", "whole after"),
)


class Saved(NamedTuple):
    """A checkpoint begun when `step` steps were done; Unix times in seconds, None where the run ended before. written: by all ranks;
    whole: under its own name."""

    step: int
    written_unix_s: float | None
    whole_unix_s: float | None


def figures(ends_unix_s: list[float], saves: list[Saved]) -> dict[str, Any]:
    """What saves cost, from border to border of steps, so that whatever holds the GPU counts.

    The interval that follows a save is `held`; the one after it, and all until the checkpoint is whole, come `after`; the
    others are quiet. A save's stall is its held interval less the median quiet one. A save after the last step has none.
    ValueError where no interval is quiet, or no save was seen.
    """
    lasts_s = {n: b - a for n, (a, b) in enumerate(pairwise(ends_unix_s), 1)}  # by the steps done before it
    held = {s.step for s in saves} & lasts_s.keys()
    after: set[int] = set()
    for s in saves:
        writes = {n for n in lasts_s if n > s.step and ends_unix_s[n - 1] < (s.whole_unix_s or inf)}
        after |= (writes | {s.step + 1}) & lasts_s.keys() - held
    quiet = [lasts_s[n] for n in lasts_s if n >= SETTLE and n not in held | after]
    if not quiet:
        raise ValueError("no step is free of saves: a larger --every leaves some")
    if not held:
        raise ValueError("no save was seen before the last step")
    usual_s = median(quiet)
    stalls_s = [lasts_s[s.step] - usual_s for s in saves if s.step in held]
    slower = [lasts_s[n] / usual_s - 1 for n in sorted(after)]
    return {
        "step_time_s": usual_s,
        "quiet_steps": len(quiet),
        "step_spread_s": max(quiet) - min(quiet),
        "first_stall_s": stalls_s[0],
        "stalls_s": stalls_s[1:],
        "steps_after": len(slower),
        "slower_after": median(slower) if slower else 0.0,
        "slower_after_max": max(slower, default=0.0),
        "written_s": median(written) if (written := [s.written_unix_s - ends_unix_s[s.step - 1] for s in saves if s.written_unix_s]) else None,
        "whole_s": median(whole) if (whole := [s.whole_unix_s - ends_unix_s[s.step - 1] for s in saves if s.whole_unix_s]) else None,
    }


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Cells, HEAD's first. The share is of what accelerate.save_state wrote."""
    whole = next((r["bytes"] for r in runs if r["of"] == "save_state" and "failed" not in r), None)
    found = [list(HEAD)]
    for r in runs:
        if "failed" in r:
            found.append([r["of"], f"failed: {r['failed'].replace('|', '/')[:200]}", *[""] * (len(HEAD) - 2)])
            continue
        stalls = r["stalls_s"]
        found.append(
            [
                r["of"] + (f", ended: {r['ended'][:60]}" if r.get("ended") else ""),
                f"{r['bytes'] / 1e6:,.1f}",
                f"1/{whole / r['bytes']:.1f}" if whole else "",
                f"{r['step_time_s'] * 1e3:,.0f} ± {r['step_spread_s'] * 5e2:,.0f} ms",
                _ms(r["first_stall_s"]),
                _ms(median(stalls)) if stalls else "",
                _ms(max(stalls)) if stalls else "",
                f"1 + {len(stalls)}",
                f"{r['slower_after']:+.1%} of {r['steps_after']}",
                f"{r['slower_after_max']:+.1%}",
                *(f"{r[key]:.2f} s" if r[key] is not None else "" for key in ("written_s", "whole_s")),
            ]
        )
    return found


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


LEGEND = (
    "A save holds: the time from the border of the step before it to that of the step after it, less the median of steps without one. Steps after: how much longer\n"
    "the step after that took, and those until the checkpoint was whole. Step: median of quiet steps, ± half of their range. Peers do not ask for the disk (fsync), graft does.\n"
)


def report(calls: Iterable[dict[str, Any]]) -> str:
    """Markdown: an entry of RESULTS.md each."""
    parts = []
    for call in calls:
        head, *rows = (f"| {' | '.join(cells)} |" for cells in table(call["runs"]))
        versions = ", ".join(f"{name} {version}" for name, version in call["versions"].items())
        processes = f"{call['processes']} process{'es' if call['processes'] > 1 else ''}"
        about = f"{call['device']} (driver {call['driver']}), {processes}, {versions}; the tree of commit `{call['commit']}`."
        lines = "\n".join([head, "|---" * len(HEAD) + "|", *rows])
        parts.append(f"## Checkpoints: {call['what']} ({call['date']})\n\n{about}\n\n    {call['command']}\n\n{lines}\n\n{LEGEND}")
    return "\n".join(parts)


def appended(results: str, entry: str) -> str:
    """The text of RESULTS.md with an entry before its others: the newest comes first."""
    head, mark, rest = results.partition("\n## ")
    return f"{head}\n{entry.rstrip()}\n{mark}{rest}"
