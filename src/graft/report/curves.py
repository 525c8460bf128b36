"""Training stages as a report shows them: curves, numbers and what went amiss, all from metrics.jsonl and the manifest's counts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from graft.core.metrics import read_metrics
from graft.report.charts import said
from graft.report.flat import duration, number
from graft.report.tree import Chart, Mark, Pair, Series, Training

PAUSE_S, PAUSE_STEPS = 5.0, 20  # between two steps, at least, both: a start takes 10 s, and a checkpoint's border a part of a step
MARKS = 200  # at most; a run that leaves out more has its number told


def training(stage: str, file: Path, counts: dict[str, Any] | None) -> Training | None:
    """One stage; None where it has taken no step. counts: the manifest's, None while the stage is not complete."""
    metrics = [m for m in read_metrics(file) if isinstance(m, dict) and "step" in m] if file.is_file() else []
    if not metrics:
        return None
    total = int(metrics[-1].get("total_steps") or len(metrics))
    marks = [*_left_out(metrics), *_pauses(metrics)]
    spent_s = sum(map(_spent_s, metrics))
    return Training(
        stage=stage,
        complete=counts is not None,
        steps=int(metrics[-1]["step"]) + 1,
        total_steps=total,
        steps_s=spent_s,
        facts=tuple(_facts(metrics, counts or {}, marks, spent_s)),
        charts=tuple(_charts(metrics)),
        marks=tuple(marks[:MARKS]),
    )


def _spent_s(m: dict[str, Any]) -> float:
    """In a step and the validation after it."""
    return (m.get("step_time_s") or 0.0) + (m.get("validation_s") or 0.0)


def _series(metrics: list[dict[str, Any]], key: str, name: str, sparse: bool = False) -> Series | None:
    """A key's curve, None where no step has it. sparse: only of the steps that have it."""
    pairs = [(m["step"], m.get(key)) for m in metrics]
    if sparse:
        pairs = [(x, y) for x, y in pairs if y is not None]
    return Series(name, tuple(x for x, _ in pairs), tuple(y for _, y in pairs)) if any(y is not None for _, y in pairs) else None


def _charts(metrics: list[dict[str, Any]]) -> list[Chart]:
    for m in metrics:
        if m.get("data_s") is not None and m.get("step_time_s"):
            m["stall"] = 100 * m["data_s"] / m["step_time_s"]
        if m.get("mfu_nominal") is not None:
            m["mfu"] = 100 * m["mfu_nominal"]
    memory = (_series(metrics, "peak_mem_gib", "peak"), _series(metrics, "predicted_mem_gib", "predicted") if "peak_mem_gib" in metrics[-1] else None)
    wanted = [
        ("Loss", "nats a target", (_series(metrics, "loss", "training"), _series(metrics, "validation_loss", "validation", sparse=True)), False),
        ("Learning rate", "", (_series(metrics, "lr", "learning rate"),), True),
        ("Gradient norm", "before clipping", (_series(metrics, "grad_norm", "gradient norm"),), True),
        ("Throughput", "tokens a second", (_series(metrics, "tokens_per_s", "throughput"),), True),
        ("Rate of work", "TFLOP/s a process", (_series(metrics, "tflops_per_process", "TFLOP/s"),), True),
        ("MFU", "% of the nominal peak", (_series(metrics, "mfu", "MFU"),), True),
        ("Peak memory", "GiB a GPU", memory if memory[0] else (), True),
        ("Waiting for data", "% of the step", (_series(metrics, "stall", "data stall"),), True),
    ]
    found = [
        Chart(title, unit, tuple(s for s in series if s), zero, noisy=title not in ("Learning rate", "Peak memory"))
        for title, unit, series, zero in wanted
    ]
    names = [c.title for c in found if c.series]
    return [c for c in found if c.series and not (c.title == "Rate of work" and "MFU" in names)]  # the same curve by another name


def _left_out(metrics: list[dict[str, Any]]) -> list[Mark]:
    return [Mark(m["step"], "left out", f"step {m['step']} was left out: {m['skipped']}") for m in metrics if m.get("skipped")]


def _pauses(metrics: list[dict[str, Any]]) -> list[Mark]:
    """Where more time passed between two steps than saving takes: the run was ended and went on."""
    if len(metrics) < 2:
        return []
    usual_s = median(m.get("step_time_s") or 0.0 for m in metrics)
    found = []
    for before, after in pairwise(metrics):
        if before.get("ended_unix_s") and after.get("ended_unix_s"):
            idle_s = after["ended_unix_s"] - before["ended_unix_s"] - _spent_s(after)
            if idle_s > max(PAUSE_S, PAUSE_STEPS * usual_s):
                found.append(Mark(after["step"], "pause", f"{duration(idle_s)} passed before step {after['step']}: a resume, or a slow save"))
    return found


def _facts(metrics: list[dict[str, Any]], counts: dict[str, Any], marks: list[Mark], spent_s: float) -> list[Pair]:
    """Numbers beside the curves; what the metrics do not know is left out."""
    tokens = sum(m.get("tokens") or 0 for m in metrics)
    losses = [m["validation_loss"] for m in metrics if m.get("validation_loss") is not None]
    trained = [m["loss"] for m in metrics if m.get("loss") is not None and not m.get("skipped")]
    last = metrics[-1]
    mfu, of_measured = ([m[key] for m in metrics if m.get(key) is not None] for key in ("mfu_nominal", "mfu_measured"))
    peak = [m["peak_mem_gib"] for m in metrics if m.get("peak_mem_gib") is not None]
    stalled_s = sum(m.get("data_s") or 0.0 for m in metrics)
    trained_s = sum(m.get("step_time_s") or 0.0 for m in metrics)
    left_out = [m for m in marks if m.kind == "left out"]
    pauses = len(marks) - len(left_out)
    changes = counts.get("data_changes") or []
    found = {
        "steps": f"{last['step'] + 1:,} of {last.get('total_steps', len(metrics)):,}",
        "loss": f"{trained[-1]:.4g}" if trained else None,
        "validation loss": f"{losses[-1]:.4g}" + (f", lowest {min(losses):.4g}" if min(losses) < losses[-1] else "") if losses else None,
        "tokens": f"{tokens:,}",
        "throughput": f"{said(tokens / trained_s)} tokens/s" if trained_s else None,
        "median step": f"{median(m.get('step_time_s') or 0.0 for m in metrics):.3g} s",
        "time in steps": duration(spent_s) + (f", {duration(spent_s - trained_s)} of it in validations" if spent_s > trained_s else ""),
        "MFU": f"{median(mfu):.1%}" if mfu else None,
        "MFU to the measured matmul": f"{median(of_measured):.1%}" if of_measured else None,
        "peak memory": f"{max(peak):.1f} GiB" + (f", predicted {last['predicted_mem_gib']:.1f}" if last.get("predicted_mem_gib") else "") if peak else None,
        "waiting for data": f"{stalled_s / trained_s:.2%} of the time" if trained_s else None,
        "processes": number(counts["processes"]) if counts.get("processes") else None,
        "micro batch": f"{last['micro_batch']} bins" if last.get("micro_batch") else None,
        "activation checkpointing": last.get("activation_checkpointing"),
        "steps left out": f"{len(left_out):,}",
        "pauses": f"{pauses:,} (resumes, slow saves)" if pauses else None,
        "data changed": f"at step {', '.join(str(c.get('step')) for c in changes)}" if changes else None,
    }  # fmt: skip
    return [(name, text) for name, text in found.items() if text is not None]
