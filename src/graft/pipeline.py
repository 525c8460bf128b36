"""`graft run`: each stage of a recipe in order; what is complete is skipped, what is missing is made.

Ray lives only while data stages run and is gone before training starts; training is a subprocess of `accelerate launch`.
"""

from __future__ import annotations

import importlib
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass

from rich import get_console
from rich.table import Table

from graft.core import tracking
from graft.core.artifact import Artifact
from graft.core.errors import ArtifactError
from graft.core.rows import read_seeds
from graft.core.stages import Job, Plan

OWN_PROGRESS = {"graft.data.augment.stage", "graft.evaluate.stage", "graft.data.questions", "launch"}  # they draw bars; the others get a spinner


@dataclass(frozen=True)
class Done:
    """One stage of a finished run."""

    stage: str
    artifact: Artifact
    wall_s: float | None  # None where the stage was complete already


def check(plan: Plan, until: str | None = None) -> None:
    """Everything that can be found wrong without torch or Ray: the recipe, the seeds, the corpora, the base.

    Of what the stages up to `until` read: rows are made without the right to a gated base.
    """
    if plan.recipe.augment and plan.recipe.augment.seeds:
        read_seeds(plan.beside(plan.recipe.augment.seeds), plan.recipe.task)
    for stage in _order(plan, until):
        for name in plan.stages[stage].inputs:
            plan.external_input(name)


def outlook(plan: Plan, redo_from: str | None = None, until: str | None = None) -> list[tuple[str, str, Artifact | None]]:
    """(stage, what `run` would do, its artifact) for every stage up to `until`."""
    order, redo = _order(plan, until), _redo(plan, redo_from)
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


def run(
    plan: Plan,
    redo_from: str | None = None,
    until: str | None = None,
    allow_data_change: bool = False,
    only: str | None = None,
    data: bool = False,
) -> list[Done]:
    """Make what is missing, in order; returns every stage with its artifact.

    only: this stage, of those before it nothing is made. data: the stages that need no GPU, which come first.
    """
    console = get_console()
    names = [plan.resolve(only).stage.name] if only else _order(plan, until)
    if data:
        names = [name for name in names if plan.stages[name].room.startswith("graft.data")]
    until = until or names[-1]
    check(plan, until)
    redo, finished = _redo(plan, redo_from), []
    options = ["--allow-data-change"] if allow_data_change else []
    to_make = {stage for stage, _, artifact in outlook(plan, redo_from, until) if artifact is None and stage in names}
    if "augment" in to_make and plan.endpoint:
        from graft.data.api.caller import check_credentials

        check_credentials(plan.endpoint)
    if to_make & {"evaluate", *(name for name, spec in plan.stages.items() if spec.room == "launch")}:
        tracking.check(plan.recipe.tracking)
    if "serve" in to_make:  # the server will be started at the end: its port must be free
        from graft.serve.app import check_address

        check_address(plan.recipe.serve.host, plan.recipe.serve.port, os.environ.get("GRAFT_API_KEY"))
    with plan.lock(), ExitStack() as cluster:
        plan.record_commits()
        for name in names:
            spec, job = plan.stages[name], plan.resolve(name)
            artifact = job.artifact
            if artifact and name in redo:
                job.discard()
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
                if spec.room in OWN_PROGRESS:
                    _run_stage(job, cluster, options)
                else:
                    with console.status(f"{name} …"):
                        _run_stage(job, cluster, options)
                wall_s = time.perf_counter() - started
                artifact = job.artifact
                if artifact is None:
                    raise ArtifactError(f"stage {name!r} ended without its artifact at {job.directory}: run again")
                finished.append(Done(name, artifact, wall_s))
                console.print(f"{name:<10} done in {wall_s:.1f} s  {_where(job)}")
    return finished


def _run_stage(job: Job, cluster: ExitStack, train_options: list[str]) -> None:
    room = job.stage.room
    if room == "launch":
        from graft.train.launch import launch, processes_per_node

        get_console().print(f"train {job.stage.name}: starting {processes_per_node()} processes under accelerate launch, about 10 s")
        job.run_directory.mkdir(parents=True, exist_ok=True)
        overrides = [a for item in job.plan.overrides for a in ("--set", item)]
        arguments = [str(job.plan.path), "--stage", job.stage.name, "--workspace", str(job.plan.root), *overrides, *train_options]
        launch(arguments, log=job.run_directory / "launch.log")
        return
    if room.startswith("graft.data"):
        from graft.data.cluster import ray_cluster

        cluster.enter_context(ray_cluster())  # started by the first data stage, shared by the rest
    importlib.import_module(room).run(job)


def _order(plan: Plan, until: str | None) -> list[str]:
    """The stages in the order they run; ConfigError where there is none named `until`."""
    order = list(plan.stages)
    return order[: order.index(plan.stage(until).name) + 1] if until else order


def _redo(plan: Plan, redo_from: str | None) -> set[str]:
    if redo_from is None:
        return set()
    plan.stage(redo_from)
    order = list(plan.stages)
    return set(order[order.index(redo_from) :])


def _where(job: Job) -> str:
    return str(job.directory.relative_to(job.plan.root))


def summary(plan: Plan, finished: list[Done]) -> None:
    """The last screen: what was made, where, how good, how to go on."""
    console = get_console()
    table = Table(title=f"{plan.recipe.name}: each artifact at */{plan.recipe.name}/STAGE/current", title_justify="left", show_edge=False)
    for column in ("stage", "made", "time"):
        table.add_column(column, overflow="fold")
    for done in finished:
        table.add_row(done.stage, _made(done), "kept" if done.wall_s is None else f"{done.wall_s:.0f} s")
    lines = []
    by_stage = {done.stage: done.artifact for done in finished}
    if "evaluate" in by_stage:
        lines.append((by_stage["evaluate"].path / "report.txt").read_text(encoding="utf-8"))
    if "serve" in by_stage:
        lines += [f"asked    {plan.recipe.serve.prompt}", f"replied  {by_stage['serve'].counts['reply']}", ""]
    recipe = os.path.relpath(plan.path)
    if finished[-1].stage == "serve":
        lines.append(f"serve it     graft serve {recipe}")
    lines.append(f"ancestry     graft lineage {os.path.relpath(finished[-1].artifact.path)}")
    lines.append(f"another run  graft run {recipe} --set seed=1")
    console.print(table)
    console.print("\n".join(["", *lines]), markup=False, highlight=False)


def _made(done: Done) -> str:
    """One stage's numbers, for people."""
    c = done.artifact.counts
    if done.stage == "augment":
        made = (
            f"{c['accepted']} rows from {c['images']['kept']} images"
            if "images" in c
            else f"{' + '.join(map(str, c['rows'].values()))} rows from {c['seeds']} seeds"
        )
        return f"{made}, {c['requests']} requests, {c['endpoint'].split()[0]}"
    if done.stage == "prepare":
        if rows := c.get("rows"):
            splits = ", ".join(f"{sum(rows[s].values())} {s}" for s in ("train", "validation", "test"))
            return f"{splits} rows, {c['families']['test']} families held out"
        return ", ".join(f"{corpus['documents']:,} {name}" for name, corpus in c["corpora"].items()) + " documents"
    if done.stage.startswith("shard-"):
        return f"{c['train']['bins']:,} bins, {c['train']['tokens']:,} tokens, {c['train']['utilisation']:.1%} used"
    if done.stage == "init":
        return f"{c['vocabulary']:,} tokens, {c['parameters']:,} random weights"
    if done.stage == "questions":
        return ", ".join(f"{told['rows']:,} {name}" for name, told in c.items())
    if done.stage == "merge":
        return f"{c['layers']} layers, logits differ by {c['logit_difference_max']:.1e} at most"
    if done.stage == "evaluate":
        calls = [f"F1 {c['strict_f1']:.3f} on {c['rows']} rows, best constant {c['best_constant_f1']:.3f}"] if "strict_f1" in c else []
        tasks = [f"{name} {value:.3f} ({metric})" for name, means in c.get("tasks", {}).items() for metric, value in means.items()]
        return "; ".join([*calls, *tasks])
    if done.stage == "serve":
        return f"first token after {c['first_token_s'] or 0:.3f} s"
    held_out = f", held-out loss {c['validation_loss']:.3f}" if "validation_loss" in c else ""
    return (
        f"{c['steps']} steps, loss {c['loss']:.3f}{held_out}, {c['tokens_per_s'] / 1000:.1f}k tokens/s"
        if "tokens_per_s" in c
        else f"{c['steps']} steps"
    )
