"""`graft sweep`: one recipe at several settings and seeds, each an ordinary run of `graft run`, and their evaluations side by side.

The runs stand under the sweep's name, so what some of them have in common (the prepared corpora and shards of an arm's seeds, or of two arms
that differ in training alone) is made once. All data is made first, under one Ray cluster; then each run is trained and evaluated. What lies on
the hub is read at the commit that the sweep found when it began.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from rich import get_console

from graft import pipeline
from graft.core import sweep
from graft.core.artifact import Artifact, write_text_atomic
from graft.core.errors import ConfigError, GraftError
from graft.core.recipe import load
from graft.core.stage_list import CHECKPOINTS, stages
from graft.core.stages import Plan
from graft.core.sweep import Arm
from graft.evaluate import arms
from graft.report.arms import plot, table
from graft.train.split import total_steps

END, SHARDS = "evaluate", "shard-sft"


@dataclass(frozen=True)
class Run:
    """An arm at a seed. settled: whether its plan is the last word; of an arm that matches another's tokens, whether both have their shards."""

    arm: Arm
    seed: int
    plan: Plan
    settled: bool = True

    @property
    def title(self) -> str:
        return f"arm {self.arm.name!r}, seed {self.seed}"

    def artifacts(self) -> dict[str, Artifact | None]:
        """By stage, up to the evaluation."""
        with self.named():
            found = {stage: artifact for stage, _, artifact in pipeline.outlook(self.plan, until=END)}
        return found if self.settled else found | {"sft": None, END: None}

    def finished(self) -> dict[str, Artifact] | None:
        """The same of a run that is complete, None of one that is not."""
        found = {stage: artifact for stage, artifact in self.artifacts().items() if artifact}
        return found if END in found else None

    @contextmanager
    def named(self) -> Iterator[None]:
        """An error says whose it is."""
        try:
            yield
        except GraftError as e:
            raise type(e)(f"{self.title}: {e}") from None


class Sweep:
    """A sweep bound to a workspace. ConfigError where an arm is no valid recipe, reads what is not there, or cannot be compared."""

    def __init__(self, path: str | Path, root: str | Path = "."):
        self.path = Path(path)
        self.told = sweep.load(self.path)
        self.recipe = self.path.parent / self.told.recipe
        self.root = Path(root)
        whole = load(self.recipe)
        if END not in [stage.name for stage in stages(whole)]:
            raise ConfigError(
                f"{self.path}: {self.recipe} has no evaluation of what it trains, so there is nothing to compare: add [evaluate.tasks.NAME]"
            )
        self.evaluate = whole.evaluate
        self.runs = [self._run(arm, seed) for arm in self.told.arms for seed in self.told.seeds]
        self.settle()

    def _run(self, arm: Arm, seed: int, more: tuple[str, ...] = ()) -> Run:
        own = (f"name={json.dumps(self.told.name)}", f"seed={seed}")
        try:
            plan = Plan(self.recipe, (*arm.overrides, *more, *own), self.root, "recorded")
            if plan.recipe.evaluate != self.evaluate:
                raise ConfigError("it changes [evaluate], but arms are compared on the same questions: change it in the recipe")
            pipeline.check(plan, END)
            plan.record_commits()
        except ConfigError as e:
            raise ConfigError(f"{self.path}: arm {arm.name!r}: {e}") from None
        return Run(arm, seed, plan, settled=arm.match_tokens is None or bool(more))

    def settle(self) -> None:
        """Give runs that match another's tokens their steps, where the shards of both are there."""
        for n, run in enumerate(self.runs):
            other = next((o for o in self.runs if o.arm.name == run.arm.match_tokens and o.seed == run.seed), None)
            if other is None or run.settled:
                continue
            mine, its = run.artifacts()[SHARDS], other.artifacts()[SHARDS]
            if mine and its:
                self.runs[n] = self._run(run.arm, run.seed, _matching(run.plan, mine.counts["train"], other.plan, its.counts["train"]))

    # ---- what is done ------------------------------------------------------------------------------------------------
    def make(self) -> None:
        """Make what is missing, in order; the first run that fails ends it, in one line that names it."""
        self._make_data()
        self.settle()
        console = get_console()
        for n, run in enumerate(self.runs, 1):
            if run.finished():
                continue
            console.print(f"[bold]{self.told.name}: {run.title}[/bold] ({n} of {len(self.runs)})")
            with run.named():
                pipeline.run(run.plan, until=END)
            _release_gpu()

    def _make_data(self) -> None:
        from graft.data.cluster import ray_cluster

        with ExitStack() as cluster:
            for run in self.runs:
                missing = [run.plan.stages[stage] for stage, artifact in run.artifacts().items() if artifact is None]
                if any(stage.room.startswith("graft.data") for stage in missing):
                    cluster.enter_context(ray_cluster())
                    with run.named():
                        pipeline.run(run.plan, until=END, data=True)

    def outlook(self) -> list[str]:
        """A line a run: complete, or what is missing of it."""
        lines, done = [], 0
        widest = max(len(arm.name) for arm in self.told.arms)
        for run in self.runs:
            artifacts = run.artifacts()
            missing = ", ".join(stage for stage, artifact in artifacts.items() if artifact is None)
            waits = "" if run.settled else f" (steps: once {run.arm.match_tokens} has its shards)"
            last = artifacts[END]
            done += last is not None
            said = f"complete  {os.path.relpath(last.path, self.root)}" if last else f"missing   {missing}{waits}"
            lines.append(f"{run.arm.name:<{widest}}  seed {run.seed:<6} {said}")
        return [*lines, f"{done} of {len(lines)} runs are complete"]

    def commands(self) -> list[str]:
        """What submits each missing run to SLURM."""
        lines = [f"# one after another, for they share data_shards/{self.told.name}; then: graft sweep {self.path} --report-only"]
        for run in self.runs:
            if run.finished():
                continue
            sets = [word for item in run.plan.overrides for word in ("--set", item)]
            command = ["graft", "run", str(self.recipe), "--slurm", "--until", END, "--workspace", str(self.root), *sets]
            lines.append(
                shlex.join(command) if run.settled else f"# {run.title}: its steps follow from the shards of {run.arm.match_tokens}, ask again then"
            )
        return lines

    # ---- what is said ------------------------------------------------------------------------------------------------
    def results(self) -> dict[str, Any]:
        """The complete runs by arm: what they saw, the means of each task and their deviation between seeds, and the arms' differences.

        ConfigError where no run is complete.
        """
        told, read = [], {}
        for arm in self.told.arms:
            complete = {run.seed: found for run in self.runs if run.arm is arm and (found := run.finished())}
            if not complete:
                continue
            read[arm.name] = {seed: arms.read(found[END]) for seed, found in complete.items()}
            seen = [{"seed": seed, **self._seen(found)} for seed, found in complete.items()]
            told.append({"name": arm.name, "set": arm.set, "match_tokens": arm.match_tokens, "runs": seen, "tasks": arms.tasks(read[arm.name])})
        if not told:
            raise ConfigError(f"no run of {self.told.name!r} is complete: `graft sweep {self.path}` makes them")
        head = {"sweep": self.told.name, "recipe": self.told.recipe, "seeds": list(self.told.seeds), "runs": len(self.runs)}
        return {**head, "arms": told, "differences": arms.differences(read)}

    def _seen(self, artifacts: dict[str, Artifact]) -> dict[str, Any]:
        """What the run was trained on. device_s: of all its processes together, in steps."""
        shards, sft, evaluation = (artifacts[stage] for stage in (SHARDS, "sft", END))
        rows, bins, steps = shards.counts["train"]["documents"], sft.counts["bins"], sft.counts["steps"]
        batch = sft.manifest["recipe"]["sft"]["global_batch"]
        return {
            "evaluation": os.path.relpath(evaluation.path, self.root),
            "rows": rows,
            "steps": steps,
            "epochs": round(steps * batch / bins, 4),
            "tokens_seen": sft.counts["tokens"],
            "device_s": round(sft.counts["device_hours"] * 3600, 3),
        }

    def report(self) -> str:
        """Write results.json, table.md and plot.svg of what is complete; the table, and where it lies."""
        found = self.results()
        folder = self.runs[0].plan.home(CHECKPOINTS) / "sweep"
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"results.json": json.dumps(found, ensure_ascii=False, indent=1), "table.md": table(found), "plot.svg": plot(found)}
        for name, text in texts.items():
            write_text_atomic(folder / name, text)
        return f"{texts['table.md']}\n{os.path.relpath(folder)}/{{{','.join(texts)}}}"


def _matching(plan: Plan, mine: dict[str, Any], other: Plan, its: dict[str, Any]) -> tuple[str, str]:
    """The overrides by which `plan` sees as many tokens (context and supervised, no padding) as `other`, to the nearest step. mine, its: what their
    training shards count."""
    a, b = plan.recipe.train_stage("sft"), other.recipe.train_stage("sft")
    steps = total_steps(its["bins"], b.epochs, b.global_batch, b.max_steps)
    tokens = steps * b.global_batch * its["tokens"] / its["bins"]
    steps = max(1, round(tokens / (a.global_batch * mine["tokens"] / mine["bins"])))
    return f"sft.epochs={ceil(steps * a.global_batch / mine['bins'])}", f"sft.max_steps={steps}"


def _release_gpu() -> None:
    """What the evaluation held here is the next training's, which is another process."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
