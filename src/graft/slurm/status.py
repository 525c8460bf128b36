"""`graft status` and `graft cancel`: what each stage of a recipe is doing, from its artifacts, its metrics and SLURM's queue.

No accounting database is asked: what SLURM has forgotten of a job, its folder under slurm/logs still says.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

from graft import pipeline
from graft.core.artifact import Artifact
from graft.core.errors import ArtifactError, ConfigError
from graft.core.metrics import read_metrics
from graft.core.stages import Plan
from graft.slurm.site import project
from graft.slurm.submit import ALIVE, SlurmJob, state_of, submitted

RECENT = 20  # steps whose median is the pace


@dataclass(frozen=True)
class Line:
    """One stage. tokens_per_s and left_s are of training alone; restarts counts the attempts after the first."""

    stage: str
    state: str
    job: str = ""
    nodes: str = ""
    restarts: int | None = None
    steps: str = ""
    tokens_per_s: float | None = None
    left_s: float | None = None


def status(plan: Plan) -> list[Line]:
    """A line a stage, in order."""
    jobs = {stage: job for job in submitted(plan) for stage in job.stages}
    slurm = shutil.which("scontrol") is not None
    return [_line(plan, stage, artifact, jobs.get(stage), slurm) for stage, _, artifact in pipeline.outlook(plan)]


def cancel(plan: Plan) -> list[str]:
    """End the recipe's jobs; the ids of those that were still alive. ConfigError where there is no SLURM."""
    if shutil.which("scancel") is None:
        raise ConfigError("there is no scancel on this machine: run this on a login node of the cluster")
    alive = [job.id for job in submitted(plan) if state_of(job.id).get("JobState") in ALIVE]
    if alive:
        subprocess.run(["scancel", *alive], check=True)
    return alive


def shown(lines: list[Line]) -> Iterator[str]:
    """The lines as columns, for people."""
    rows = [("stage", "state", "job", "restarts", "nodes", "steps", "tokens/s", "left")]
    for at in lines:
        pace, left = (f"{at.tokens_per_s:,.0f}" if at.tokens_per_s else ""), ("" if at.left_s is None else str(timedelta(seconds=round(at.left_s))))
        rows.append((at.stage, at.state, at.job, "" if at.restarts is None else str(at.restarts), at.nodes, at.steps, pace, left))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True) if width).rstrip()


def _line(plan: Plan, stage: str, artifact: Artifact | None, job: SlurmJob | None, slurm: bool) -> Line:
    if artifact:
        pace = artifact.counts.get("tokens_per_s")
        return Line(stage, "complete", job.id if job else "", tokens_per_s=pace, steps=str(artifact.counts.get("steps", "")))
    run = _run_directory(plan, stage)
    steps, pace, left_s = _progress(run)
    if job is None:
        return Line(stage, "running" if run and _held(run) else "missing", steps=steps, tokens_per_s=pace, left_s=left_s)
    found = state_of(job.id) if slurm else {}
    logs = next(iter((project() / "slurm/logs").glob(f"*-{job.id}/latest")), None)
    if not found:
        code = logs / "code" if logs else None
        state = f"ended with {code.read_text().strip()}" if code and code.is_file() else "not known to SLURM"
        return Line(stage, state, job.id, _nodes(logs), _attempt(logs), steps, pace, left_s)
    state = found["JobState"].lower()
    if state == "pending":
        state += f" ({found.get('Reason', '')})"
    nodes = found.get("NodeList", "")
    running = found["JobState"] == "RUNNING"
    return Line(
        stage,
        state,
        job.id,
        "" if nodes == "(null)" else nodes,
        int(found.get("Restarts", 0)),
        steps,
        pace if running else None,
        left_s if running else None,
    )


def _run_directory(plan: Plan, stage: str) -> Path | None:
    if plan.stages[stage].room != "launch":
        return None
    try:
        return plan.resolve(stage).run_directory
    except ArtifactError:  # what it is made of is not complete
        return None


def _progress(run: Path | None) -> tuple[str, float | None, float | None]:
    """(steps done of all, tokens a second, seconds that are left) of a training run."""
    metrics = list(read_metrics(run / "metrics.jsonl")) if run and (run / "metrics.jsonl").is_file() else []
    if not metrics:
        return "", None, None
    done, total = metrics[-1]["step"] + 1, metrics[-1].get("total_steps", 0)
    step_s = median(m["step_time_s"] for m in metrics[-RECENT:])
    return f"{done}/{total}", median(m["tokens_per_s"] for m in metrics[-RECENT:]), max(0, total - done) * step_s


def _held(run: Path) -> bool:
    """Whether a process trains there: it holds the lock."""
    try:
        with (run / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _nodes(logs: Path | None) -> str:
    file = logs / "nodes" if logs else None
    return file.read_text().split()[1] if file and file.is_file() else ""


def _attempt(logs: Path | None) -> int | None:
    return int(logs.resolve().name.removeprefix("attempt-")) if logs else None


def followed(jobs: list[SlurmJob], recipe: str) -> Iterator[str]:
    """What a person is told after a submission."""
    for job in jobs:
        yield f"{job.id}  {job.kind:<8}  {', '.join(job.stages)}"
    yield f"follow    graft status {recipe}      (queue: squeue -j {','.join(job.id for job in jobs)}; logs: slurm/logs/*-JOB/latest/)"
    yield f"cancel    graft cancel {recipe}"
