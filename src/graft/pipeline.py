"""`graft run`: each stage of a recipe in order; what is complete is skipped, what is missing is made.

Ray lives only while data stages run and is gone before training starts; training is a subprocess of `accelerate launch`.
"""

from __future__ import annotations

import importlib
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from graft.core.artifact import Artifact
from graft.core.errors import ArtifactError
from graft.core.rows import read_seeds
from graft.core.stages import Job, Plan


@dataclass(frozen=True)
class Done:
    """One stage of a finished run."""

    stage: str
    artifact: Artifact
    wall_s: float | None  # None where the stage was complete already


def check(plan: Plan) -> None:
    """Everything that can be found wrong without torch or Ray: the recipe, the seeds, the corpora, the base."""
    read_seeds(plan.beside(plan.recipe.augment.seeds), plan.recipe.task)
    for spec in plan.stages.values():
        for name in spec.inputs:
            plan.external_input(name)
    if not plan.beside(plan.recipe.deepspeed).is_file():
        from graft.core.errors import ConfigError

        raise ConfigError(f"deepspeed = {plan.recipe.deepspeed!r} is no file: it is relative to {plan.path.parent}")


def outlook(plan: Plan, redo_from: str | None = None) -> list[tuple[str, str, Artifact | None]]:
    """(stage, what `run` would do, its artifact) for every stage."""
    order, redo = list(plan.stages), _redo(plan, redo_from)
    found: list[tuple[str, str, Artifact | None]] = []
    made: set[str] = set()
    for name in order:
        waits = [p for p in plan.stages[name].parents if p in made]
        artifact = None if waits else plan.resolve(name).artifact
        if artifact and name not in redo:
            found.append((name, "complete", artifact))
            continue
        made.add(name)
        found.append((name, f"runs, after {', '.join(waits)}" if waits else "runs", None))
    return found


def run(plan: Plan, redo_from: str | None = None, until: str | None = None, console: Console | None = None) -> list[Done]:
    """Make what is missing, in order; returns every stage with its artifact."""
    console = console or Console()
    check(plan)
    for name in (redo_from, until):
        if name:
            plan.stage(name)
    redo, finished = _redo(plan, redo_from), []
    with plan.lock(), ExitStack() as cluster:
        for name, spec in plan.stages.items():
            job = plan.resolve(name)
            artifact = job.artifact
            if artifact and name in redo:
                shutil.rmtree(job.directory)
                shutil.rmtree(job.run_directory, ignore_errors=True)
                artifact = None
            if artifact:
                job.mark_current()
                finished.append(Done(name, artifact, None))
                console.print(f"[dim]{name:<10} complete  {_where(job)}[/dim]")
            else:
                if not spec.room.startswith("graft.data"):
                    cluster.close()
                started = time.perf_counter()
                console.print(f"[bold]{name}[/bold]")
                _run_stage(job, cluster)
                wall_s = time.perf_counter() - started
                artifact = job.artifact
                if artifact is None:
                    raise ArtifactError(f"stage {name!r} ended without its artifact at {job.directory}: run again")
                finished.append(Done(name, artifact, wall_s))
                console.print(f"{name:<10} done in {wall_s:.1f} s  {_where(job)}")
            if name == until:
                break
    return finished


def _run_stage(job: Job, cluster: ExitStack) -> None:
    room = job.stage.room
    if room == "launch":
        from graft.train.launch import launch

        job.run_directory.mkdir(parents=True, exist_ok=True)
        overrides = [a for item in job.plan.overrides for a in ("--set", item)]
        launch([str(job.plan.path), "--stage", job.stage.name, "--workspace", str(job.plan.root), *overrides], log=job.run_directory / "launch.log")
        return
    if room.startswith("graft.data"):
        from graft.data.cluster import ray_cluster

        cluster.enter_context(ray_cluster())  # started by the first data stage, shared by the rest
    importlib.import_module(room).run(job)


def _redo(plan: Plan, redo_from: str | None) -> set[str]:
    if redo_from is None:
        return set()
    plan.stage(redo_from)
    order = list(plan.stages)
    return set(order[order.index(redo_from) :])


def _where(job: Job) -> str:
    return str(job.directory.relative_to(job.plan.root))


def summary(plan: Plan, finished: list[Done], console: Console) -> None:
    """The last screen: what was made, where, how good, how to go on."""
    table = Table(title=f"{plan.recipe.name}", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("stage", "result", "time", "artifact"):
        table.add_column(column, overflow="fold")
    for done in finished:
        table.add_row(
            done.stage, _result(done), "-" if done.wall_s is None else f"{done.wall_s:.0f} s", str(done.artifact.path.relative_to(plan.root))
        )
    console.print(table)
    evaluation = next((d.artifact for d in finished if d.stage == "evaluate"), None)
    if evaluation:
        console.print((evaluation.path / "report.txt").read_text(encoding="utf-8").rstrip(), markup=False, highlight=False)
    reply = next((d.artifact for d in finished if d.stage == "serve"), None)
    if reply:
        console.print(f"asked:   {plan.recipe.serve.prompt}\nreplied: {reply.counts['reply']}", markup=False, highlight=False)
    recipe = _shown(plan)
    console.print(
        f"next:    graft serve {recipe}  |  graft lineage {finished[-1].artifact.path.relative_to(plan.root)}  |  graft run {recipe} --set sft.lr=3e-4",
        markup=False,
        highlight=False,
    )


def _shown(plan: Plan) -> str:
    return str(plan.path.relative_to(plan.root)) if plan.path.is_relative_to(plan.root) else str(plan.path)


def _result(done: Done) -> str:
    counts = done.artifact.counts
    shown = {
        "augment": ("rows", "requests", "endpoint"),
        "prepare": ("train", "validation", "test"),
        "init": ("vocab_size", "parameters"),
        "merge": ("layers", "logit_difference_max"),
        "evaluate": ("rows", "strict_f1", "intent_f1"),
        "serve": ("model", "first_token_s"),
    }.get(done.stage, ("bins", "tokens", "steps", "loss", "validation_loss", "tokens_per_s"))
    return ", ".join(f"{k} {_short(counts[k])}" for k in shown if k in counts)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "+".join(_short(v) for v in value.values())
    return f"{value:,}" if isinstance(value, int) else str(value)
