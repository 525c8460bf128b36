"""What rank 0 tells of a run: metrics.jsonl always, a progress bar, and wandb by choice (core/tracking.py)."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from graft.core import tracking
from graft.core.artifact import Artifact
from graft.core.metrics import MetricsWriter
from graft.core.stages import Job
from graft.train.flops import Flops, peak_flops
from graft.train.sizing.memory import MemoryPlan

MFU = ("mfu_nominal", "mfu_measured")
PACE = ("tokens", "step_time_s", "validation_s", *MFU)  # of a step, what the rates of a run are made of


class Reporter:
    """One object a run, on rank 0 only."""

    def __init__(
        self, job: Job, run_dir: Path, total: int, first: int, world: int, flops: Flops, plan: MemoryPlan, ceiling_tflop_per_s: float | None = None
    ):
        """ceiling_tflop_per_s: what the GPUs multiplied in bf16 before the run; None where that is not known."""
        self.total, self.world, self.flops, self.peak = total, world, flops, peak_flops()
        self.ceiling_tflop_per_s = ceiling_tflop_per_s if torch.cuda.is_available() else None  # the CPU's is of fp32
        self.stage, self.plan = job.stage.name, plan
        self.last: dict[str, Any] = {}
        self.paces: list[dict[str, Any]] = []
        self.steps = first  # of the whole run so far
        self.writer = MetricsWriter(run_dir / "metrics.jsonl", first)
        for before in self.writer.kept:
            self._note(before)
        self.before = len(self.paces)
        self.tracker = tracking.begin(job, run_dir / "metrics.jsonl")
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))
        self.progress = Progress(*columns, console=console, transient=True)
        self.bar = self.progress.add_task(f"train {self.stage}", total=total, completed=first, numbers="")
        console.print(
            f"train {self.stage}: {total} steps" + (f", resumed at step {first}" if first else "") + f", {world} process{'es' if world > 1 else ''}"
        )
        self.progress.start()

    def step(self, metrics: dict[str, Any]) -> str | None:
        """metrics: of one step, with step_time_s (without its validation, validation_s), tokens and mean_document_tokens; adds throughput, MFU and memory.

        Returns why the disk does not take them (core/metrics.py).
        """
        seconds = metrics["step_time_s"]
        flop_rate = self.flops.per_step(metrics["tokens"], metrics["mean_document_tokens"]) / seconds / self.world
        metrics |= self.plan.numbers | {
            "total_steps": self.total,
            "tokens_per_s": metrics["tokens"] / seconds,
            "tflops_per_process": flop_rate / 1e12,
            "mfu_nominal": flop_rate / self.peak if self.peak else None,
            "mfu_measured": flop_rate / 1e12 / self.ceiling_tflop_per_s if self.ceiling_tflop_per_s else None,
            "peak_mem_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "ended_unix_s": time.time(),  # from one step's to the next is all that passed, saves too
        }
        unwritten = self.writer.write(metrics)
        if "skipped" in metrics:
            self.progress.console.print(f"train {self.stage}: step {metrics['step']} is left out: {metrics['skipped']}; bins {metrics['bins']}")
        if self.tracker:
            self.tracker.log(metrics)
        self._note(metrics)
        self.steps = metrics["step"] + 1
        self.progress.update(self.bar, advance=1, numbers=f"loss {metrics['loss']:.3f}  {metrics['tokens_per_s']:,.0f} tokens/s")
        return unwritten

    def _note(self, metrics: dict[str, Any]) -> None:
        self.paces.append({key: metrics.get(key) for key in PACE})
        if "skipped" not in metrics:
            self.last |= {k: v for k, v in metrics.items() if v is not None}

    def finish(self) -> dict[str, Any]:
        """Close all but wandb; the numbers for the manifest. Rates are of this launch's training, without its start; where no step was left for it, of the run's."""
        self.progress.stop()
        if unwritten := self.writer.close():
            Console().print(f"train {self.stage}: {unwritten}; its last lines are lost")
        counts: dict[str, Any] = {k: self.last[k] for k in ("loss", "validation_loss", "peak_mem_gib") if k in self.last}
        paces = self.paces[self.before :] or self.paces
        of = {key: [pace[key] for pace in paces if pace[key] is not None] for key in PACE}
        counts |= {key: median(of[key]) for key in MFU if of[key]}
        if times_s := of["step_time_s"]:
            counts |= {"step_time_s": median(times_s), "tokens_per_s": sum(of["tokens"]) / sum(times_s)}
            counts["steps_s"] = sum(times_s) + sum(of["validation_s"])
        Console().print(f"train {self.stage}: " + ", ".join(f"{k} {v:,.0f}" if v >= 1000 else f"{k} {v:.4g}" for k, v in counts.items()))
        if (peak := counts.get("peak_mem_gib")) and (predicted := self.plan.predicted_gib):
            Console().print(f"train {self.stage}: peak {peak:.1f} GiB, predicted {predicted:.1f} ({predicted / peak - 1:+.1%})")
        return counts | self.plan.numbers

    def published(self, artifact: Artifact | None) -> None:
        """Tell wandb what the run has made, and close it."""
        if self.tracker:
            self.tracker.finish(artifact)
