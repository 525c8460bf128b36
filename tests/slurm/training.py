"""A small training stage as a job of the cluster, watched until it is complete; what the tests of train.sbatch share."""

from __future__ import annotations

import time
from pathlib import Path

from graft.core.artifact import Artifact, sha256_file
from graft.core.metrics import read_metrics
from graft.core.stages import Plan
from graft.train.checkpoint import fault, steps

from ..e2e.tree import Tree
from ..train.small import curve, small_plan
from .cluster import Cluster, until

STEPS, SAVE_EVERY = 60, 6
SETTINGS = (f"sft.max_steps={STEPS}", "sft.epochs=999", f"sft.save_every={SAVE_EVERY}", "sft.validate_every=1000", "sft.hang_timeout_s=5")


def plan_in(root: Path, *overrides: str) -> Plan:
    root.mkdir(parents=True, exist_ok=True)
    return small_plan(root, *SETTINGS, *overrides)


def submit(cluster: Cluster, project: Tree, plan: Plan, *options: str) -> str:
    """The id of the job."""
    sets = [word for o in plan.overrides for word in ("--set", o)]
    words = (*options, "slurm/train.sbatch", plan.path, "--workspace", plan.root, *sets)
    return cluster.sbatch(*words, cwd=project.path, environment=project.environment() | {"PATH": cluster.environment["PATH"]})


def run_of(plan: Plan) -> Path:
    return plan.resolve("sft").run_directory


def steps_done(plan: Plan) -> int:
    file = run_of(plan) / "metrics.jsonl"
    return max((m["step"] + 1 for m in read_metrics(file)), default=0) if file.exists() else 0


def wait_for_step(cluster: Cluster, plan: Plan, job: str, step: int, within_s: float = 120) -> None:
    """TimeoutError with the job where it does not come there."""
    try:
        until(lambda: steps_done(plan) >= step, within_s)
    except TimeoutError:
        raise TimeoutError(f"step {step} was not reached: {cluster.job(job)}") from None


def complete(cluster: Cluster, project: Tree, plan: Plan, job: str, within_s: float = 300) -> Artifact:
    """The artifact of a job that ends well, with no checkpoint torn."""
    found = cluster.wait(job, within_s)
    assert found["JobState"] == "COMPLETED", said(project, job)
    artifact = plan.resolve("sft").artifact
    assert artifact, said(project, job)
    kept = steps(run_of(plan))
    assert kept and [fault(folder) for folder in kept] == [None] * len(kept)
    return artifact


def said(project: Tree, job: str) -> str:
    """What a job's script and its nodes printed, of all attempts."""
    logs = project.path / "slurm/logs"
    files = [*sorted(logs.glob(f"*-{job}.log")), *sorted(logs.glob(f"*-{job}/attempt-*/*.log"))]
    return "\n".join(f"--- {file.relative_to(logs)}\n{file.read_text(errors='replace')}" for file in files)[-6000:]


def attempts(project: Tree, job: str) -> int:
    return len(list((project.path / "slurm/logs").glob(f"*-{job}/attempt-*")))


def result(artifact: Artifact) -> tuple[str, list]:
    """What two runs must share to the last bit."""
    return sha256_file(artifact.path / "adapter_model.safetensors"), curve(artifact.path)


def seconds_to_step(plan: Plan, step: int, since: float, within_s: float = 300) -> float:
    until(lambda: steps_done(plan) > step, within_s)
    return time.monotonic() - since
