"""Stage `evaluate`: what was trained beside its base, by one engine, the one that serves: calls and texts where the recipe makes rows
from seeds (classify.py), and its tasks (tasks.py), of which held-out rows of images are one. Predictions are always kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from graft.core import tracking
from graft.core.recipe import Recipe
from graft.core.stages import Job
from graft.core.store import AdapterStore
from graft.engine.protocol import Engine
from graft.engine.start import start
from graft.evaluate import classify, tasks
from graft.evaluate.semantic import Encoder
from graft.model.chat import load_tokenizer


def run(job: Job) -> None:
    """Write metrics.json, report.txt and the predictions; an adapter's figures also stand beside the version that servers find."""
    recipe, plan = job.recipe, job.plan
    tracker = tracking.begin(job)
    base, revision, adapters = plan.trained()
    encoder = (
        Encoder(*plan.semantic_encoder(), recipe.evaluate.batch_size) if recipe.evaluate.semantic else None
    )  # before the engine takes what is free
    tokenizer = load_tokenizer(str(job.parents["sft"].path))
    schemas = {name: plan.answer_schema(name) for name in recipe.tasks}
    systems: dict[str, str | None] = {"adapter": recipe.name, "base": None} if adapters else {"model": None}
    with closing(engine_of(recipe, base, revision, adapters, tokenizer)) as engine, job.writing() as draft:
        metrics: dict[str, Any] = {}
        draft.counts["engine"] = type(engine).__name__  # two engines round differently, and draw other samples
        report = ""
        if recipe.learns_calls:
            metrics, counts = classify.measure(job, draft.path, engine, tokenizer, systems)
            draft.counts.update(counts)
            report = classify.render_report(metrics)
        if recipe.tasks:
            found = tasks.measure(recipe, job.parents["questions"].path, draft.path, engine, tokenizer, systems, encoder, schemas)
            metrics["tasks"] = found
            draft.counts["tasks"] = tasks.counts(found)
            report += tasks.render_report(found)
        (draft.path / "metrics.json").write_text(json.dumps(metrics, ensure_ascii=False, indent=1), encoding="utf-8")
        (draft.path / "report.txt").write_text(report, encoding="utf-8")
        if adapters:
            store, told = AdapterStore(plan.served), {k: v for k, v in draft.counts.items() if isinstance(v, int | float)}
            told |= {f"{task} {metric}": v for task, means in draft.counts.get("tasks", {}).items() for metric, v in means.items()}
            store.note(store.publish(recipe.name, job.parents["sft"]).id, evaluation=told)
    if tracker:
        figures = list(_figures(metrics))
        summary = {"/".join(part for part in figure[:3] if part): float(figure[3]) for figure in figures}
        tracker.table("evaluation", ("task", "system", "metric", "value", "low", "high"), figures, summary)
        tracker.finish(job.artifact)


def _figures(metrics: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float | None, float | None]]:
    """Task ("" of calls and texts), system or pair of systems, metric, its value and its interval where it has one."""
    if "scores" in metrics:
        for system, scores in metrics["scores"].items():
            sure = metrics["intervals"][system]
            yield "", system, "accuracy", scores["accuracy"], *sure["accuracy"]
            for judged in ("strict", "intent"):
                for metric, value in scores[judged].items():
                    yield "", system, f"{judged} {metric}", value, *sure[judged][metric]
        if pair := metrics.get("paired"):
            apart = {
                "accuracy": pair["accuracy"],
                **{f"{judged} {metric}": d for judged in ("strict", "intent") for metric, d in pair[judged].items()},
            }
            for metric, d in apart.items():
                yield "", pair["of"], metric, d["difference"], d["low"], d["high"]
    for task, told in metrics.get("tasks", {}).items():
        pair = told.get("paired", {})
        for system, means in (*told["systems"].items(), *([(pair["of"], pair)] if pair else [])):
            for metric, mean in means.items():
                if metric != "of":
                    yield task, system, metric, mean.get("mean", mean.get("difference")), mean.get("low"), mean.get("high")


def engine_of(recipe: Recipe, base: str, revision: str | None, adapters: dict[str, Path], tokenizer: Any) -> Engine:
    """The one that the recipe is served by, for `evaluate.batch_size` rows at once."""
    return start(
        recipe.serve.engine,
        base,
        revision,
        recipe.model.precision,
        tokenizer,
        adapters=adapters,
        max_batch=recipe.evaluate.batch_size,
        max_adapters=len(adapters),
        max_rank=recipe.serve.max_rank,
        image_pixels=recipe.shard.image_pixels,
    )
