"""`graft run RECIPE --slurm`: what is missing of a recipe becomes jobs, each after the one before it (afterok).

The data stages are one job on CPU nodes, so that no GPU waits for a tokenizer; every training stage is a job of its own; merging,
evaluation and the probe of the server take one node. What can be found wrong is found before anything is submitted.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from graft import pipeline
from graft.core.artifact import write_text_atomic
from graft.core.environment import number
from graft.core.errors import ConfigError
from graft.core.stages import DATA, Plan
from graft.slurm.site import project, site

ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")
KINDS = {"graft.data": "data", "launch": "train", "graft.train.merge": "merge", "graft.evaluate": "evaluate", "graft.serve": "serve"}


@dataclass(frozen=True)
class Sizes:
    """What was asked for on the command line, before the site's. nodes: a number or a range such as 1-2."""

    nodes: str | None = None
    gpus_per_node: int | None = None
    data_nodes: str | None = None


@dataclass
class SlurmJob:
    """One job of the chain. id: "" until it is submitted."""

    kind: str
    stages: list[str]
    id: str = ""
    submitted_unix_s: float = 0.0


def record(plan: Plan) -> Path:
    """Where the jobs of a recipe stand."""
    return plan.home(DATA) / "jobs.json"


def submitted(plan: Plan) -> list[SlurmJob]:
    """The jobs of the last submission, in order."""
    file = record(plan)
    return [SlurmJob(**job) for job in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def chain(plan: Plan, until: str | None = None) -> list[SlurmJob]:
    """The jobs that make what is missing, in order."""
    jobs: list[SlurmJob] = []
    for stage, _, artifact in pipeline.outlook(plan, until=until):
        if artifact is None:
            room = plan.stages[stage].room
            kind = next(kind for start, kind in KINDS.items() if room.startswith(start))
            if kind == "data" and jobs and jobs[-1].kind == "data":
                jobs[-1].stages.append(stage)
            else:
                jobs.append(SlurmJob(kind, [stage]))
    return jobs


def submit(plan: Plan, sizes: Sizes, until: str | None = None) -> list[SlurmJob]:
    """Submit the chain and record it; ConfigError where something is wrong, before any job is."""
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch on this machine: run this on a login node of the cluster")
    folder = project()
    settings = site(folder)
    for kind in ("data", "train"):
        _counts(_sizes(kind, sizes, settings)[0])
    pipeline.check(plan, until)
    if running := [job for job in submitted(plan) if state_of(job.id).get("JobState") in ALIVE]:
        ids = ", ".join(f"{job.id} ({job.kind})" for job in running)
        raise ConfigError(f"jobs of {plan.recipe.name!r} are under way: {ids}; follow them by `graft status`, or end them by `graft cancel`")
    jobs = chain(plan, until)
    if plan.endpoint and any("augment" in job.stages for job in jobs):
        from graft.data.api.caller import check_credentials

        check_credentials(plan.endpoint)
    if any(job.kind == "train" for job in jobs):
        _require_gpus(plan, [job.stages[0] for job in jobs if job.kind == "train"], sizes, settings)
    plan.record_commits()
    before: str | None = None
    try:
        for job in jobs:
            job.id = _sbatch(plan, job, _options(job.kind, sizes, settings), before, folder)
            job.submitted_unix_s = round(time.time(), 3)
            before = job.id
    except ConfigError:
        for job in jobs:
            if job.id:
                subprocess.run(["scancel", job.id], capture_output=True)
        raise
    if jobs:
        record(plan).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(record(plan), json.dumps([asdict(job) for job in jobs], indent=1))
    return jobs


def state_of(job: str) -> dict[str, str]:
    """What SLURM knows of a job, {} once it has forgotten it."""
    done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word) if done.returncode == 0 else {}


def _sizes(kind: str, sizes: Sizes, settings: dict[str, str]) -> tuple[str, int]:
    """(nodes, GPUs a node) of a job."""
    gpus = sizes.gpus_per_node if sizes.gpus_per_node is not None else int(settings.get("GPUS_PER_NODE", 0))
    if kind == "data":
        return sizes.data_nodes or settings.get("DATA_NODES", "1"), 0
    if kind == "train":
        return sizes.nodes or settings.get("NODES", "1"), gpus
    return "1", min(gpus, 1)


def _counts(nodes: str) -> range:
    """Every number of nodes that a job may get; ConfigError where `nodes` is neither a number nor a range."""
    least, _, most = nodes.partition("-")
    if not re.fullmatch("[1-9][0-9]*(-[1-9][0-9]*)?", nodes) or int(most or least) < int(least):
        raise ConfigError(f"{nodes!r} nodes: give a number from 1 on, or a range such as 1-2")
    return range(int(least), int(most or least) + 1)


def _options(kind: str, sizes: Sizes, settings: dict[str, str]) -> list[str]:
    nodes, gpus = _sizes(kind, sizes, settings)
    data = kind == "data"
    partition = settings.get("CPU_PARTITION" if data else "PARTITION")
    limit = settings.get({"data": "DATA_TIME", "serve": "SERVE_TIME"}.get(kind, "TIME"), settings.get("TIME"))
    given = {"nodes": nodes, "partition": partition, "account": settings.get("ACCOUNT"), "qos": settings.get("QOS"), "time": limit}
    options = [f"--{name}={value}" for name, value in given.items() if value]
    if gpus:
        options += [f"--gpus-per-node={gpus}", *shlex.split(settings.get("OPTIONS", ""))]
    return options


def _sbatch(plan: Plan, job: SlurmJob, options: list[str], after: str | None, folder: Path) -> str:
    if after:
        options = [*options, f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    options = [*options, f"--job-name={plan.recipe.name}-{'data' if job.kind == 'data' else job.stages[0]}", f"--chdir={folder}"]
    sets = [word for item in plan.overrides for word in ("--set", item)]
    own = {"train": ["--stage", job.stages[0]], "data": ["--until", job.stages[-1]]}.get(job.kind, [])
    words = [*(["--probe"] if job.kind == "serve" else []), str(plan.path), *own, "--workspace", str(plan.root), *sets]
    command = ["sbatch", "--parsable", *options, f"slurm/{job.kind}.sbatch", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"it left with {done.returncode}"]
        raise ConfigError(f"sbatch refuses the {job.kind} job ({' '.join(options)}): {why[-1].removeprefix('sbatch: error: ')}")
    return done.stdout.strip().split(";")[0]


def _require_gpus(plan: Plan, stages: list[str], sizes: Sizes, settings: dict[str, str]) -> None:
    """ConfigError where the batch cannot be shared out, or where the model does not fit the site's GPU."""
    from graft.train.launch import CPU_PROCESSES
    from graft.train.split import micro_batch_of

    nodes, gpus = _sizes("train", sizes, settings)
    counts = _counts(nodes)
    each = gpus or number("GRAFT_PROCESSES", CPU_PROCESSES, 1)
    for stage in stages:
        bins = plan.recipe.train_stage(stage).global_batch
        for count in counts:
            if bins % (count * each) and len(counts) > 1:  # SLURM may give any number of a range
                usable = [n for n in range(1, bins // each + 1) if bins % (n * each) == 0]
                raise ConfigError(
                    f"of {nodes} nodes {stage} may get {count}, and its global_batch = {bins} bins cannot be split over {count * each} processes: "
                    f"{each} a node can use {usable} nodes: ask for one of these, for a range of nothing else, or set another global_batch"
                )
            micro_batch_of(bins, count * each, 1)
    if gpus and "GPU" in settings:
        from graft.train.sizing.check import report

        lines, fits = report(plan, f"{counts[0] * gpus}x{settings['GPU']}", None)
        if not fits:
            raise ConfigError(f"{counts[0]} nodes of {gpus} {settings['GPU']} are too few: {next(line for line in lines if 'does not fit' in line)}")
