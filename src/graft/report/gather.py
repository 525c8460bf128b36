"""A recipe's artifacts as one tree: which stages are complete, what each made of what, and what the page tells of them.

Reads manifests, metrics.jsonl, predictions.jsonl, the images that it shows and the shards' document lengths (4 bytes each), never their tokens or any weight:
100,000 steps of training take 1.6 s, and as much to draw.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import graft
from graft.core.artifact import MANIFEST, Artifact
from graft.core.artifact import commit as source_commit
from graft.core.errors import ArtifactError
from graft.core.stages import CHECKPOINTS, DATA, Plan
from graft.report.curves import training
from graft.report.data import data_tables, kept_images, lengths, samples
from graft.report.flat import dollars, duration, flat, number
from graft.report.scores import evaluation
from graft.report.scrub import scrubbed, secrets_of
from graft.report.tree import Cost, Evaluation, Pair, Report, Stage, Table, Training

TRAINED = "launch"  # the room of a stage that trains
KEYS = 200  # of a stage, at most: a recipe of many corpora has thousands


def gather(plan: Plan) -> Report:
    """The report of what the recipe has made in its workspace; ArtifactError where that is nothing."""
    if not any(plan.home(DATA).glob(f"*/*/{MANIFEST}")) and not any(plan.home(CHECKPOINTS).glob("runs/*/metrics.jsonl")):
        raise ArtifactError(f"{plan.recipe.name!r} was never run in {plan.root}: run `graft run {plan.path.name}`, or name its --workspace")
    found: dict[str, Artifact] = {}
    stages: list[Stage] = []
    runs: dict[str, Training] = {}  # complete or not
    for name in plan.stages:
        stages.append(_stage(plan, name, found, runs))
    trainings = list(runs.values())
    asked = found["questions"].path if "questions" in found else None
    scores = evaluation(found["evaluate"].path, found["prepare"].path / "rows" / "test.jsonl", asked) if "evaluate" in found else None
    verdict, good = _verdict(stages, found, trainings)
    created = [s.created_unix_s for s in stages if s.created_unix_s]
    newest = max((s for s in stages if s.created_unix_s), key=lambda s: s.created_unix_s or 0.0, default=None)
    report = Report(
        recipe=plan.recipe.name,
        workspace=str(plan.root),
        made_unix_s=time.time(),
        created_unix_s=max(created, default=None),
        graft=newest.graft if newest else graft.__version__,
        commit=newest.commit if newest else source_commit() or "",
        verdict=verdict,
        good=good,
        ledger=tuple(_ledger(found.get("augment"))),
        stages=tuple(stages),
        data=tuple(data_tables(found)),
        samples=tuple(samples(found)),
        lengths=tuple(lengths(found)),
        trainings=tuple(trainings),
        cost=_cost(found, trainings),
        evaluation=_shown(scores),
    )
    return scrubbed(report, secrets_of())


def _shown(scores: Evaluation | None) -> Evaluation | None:
    return scores if scores and (scores.scores or scores.tasks or scores.others or scores.best or scores.worst) else None


# ---- stages -----------------------------------------------------------------------------------------------------------
def _stage(plan: Plan, name: str, found: dict[str, Artifact], runs: dict[str, Training]) -> Stage:
    """The stage as it stands; puts its artifact into `found` and its training into `runs` where they are there."""
    spec = plan.stages[name]
    if waits := [p for p in spec.parents if p not in found]:
        return Stage(name, "waits", f"after {', '.join(waits)}{_earlier(plan, name)}")
    job = plan.resolve(name)
    try:
        artifact = job.artifact
    except ArtifactError as e:
        return Stage(name, "damaged", str(e), _relative(plan, job.directory), job.fingerprint)
    if artifact is None:
        if spec.room == TRAINED and (run := training(name, job.run_directory / "metrics.jsonl", None)):
            runs[name] = run
            note = f"{run.steps:,} of {run.total_steps:,} steps, no artifact yet"
            return Stage(name, "under way", note, _relative(plan, job.run_directory), job.fingerprint, wall_s=run.steps_s)
        return Stage(name, "missing", f"not made yet{_earlier(plan, name)}", "", job.fingerprint)
    found[name] = artifact
    m = artifact.manifest
    if spec.room == TRAINED and (run := training(name, artifact.path / "metrics.jsonl", artifact.counts)):
        runs[name] = run
    return Stage(
        name,
        "complete",
        _made(name, artifact, spec.room == TRAINED),
        _relative(plan, artifact.path),
        m["fingerprint"],
        m["digest"],
        tuple((n, p["fingerprint"]) for n, p in m.get("parents", {}).items()),
        tuple(flat(m.get("inputs", {})))[:KEYS],
        tuple(flat(m.get("keys", {})))[:KEYS],
        tuple(flat(m["counts"]))[:KEYS],
        m["created_unix_s"],
        runs[name].steps_s if name in runs else m["wall_s"],
        m.get("cost", {}).get("usd_of_run"),
        m["graft"],
        m.get("commit") or "",
    )


def _relative(plan: Plan, path: Path) -> str:
    return str(path.relative_to(plan.root))


def _earlier(plan: Plan, name: str) -> str:
    """What is said of an artifact that other keys or inputs made."""
    current = plan.home(plan.stages[name].place) / name / "current"
    return f"; an earlier one, of other keys or inputs, is {current.resolve().name}" if current.exists() else ""


def _made(name: str, artifact: Artifact, trained: bool) -> str:
    """One line of a stage's counts: those that matter most, by what is there."""
    c = artifact.counts
    if trained:
        loss = "".join(f", {text} {c[key]:.3f}" for key, text in (("loss", "loss"), ("validation_loss", "held-out loss")) if key in c)
        return f"{number(c.get('steps', '?'))} steps{loss}"
    if name == "augment" and isinstance(images := c.get("images"), dict):
        return f"{number(c.get('accepted', '?'))} rows from {number(images.get('kept', '?'))} images, {number(c.get('requests', '?'))} requests"
    if name == "augment":
        rows = c.get("rows")
        made = " + ".join(f"{n} {label}" for label, n in rows.items()) if isinstance(rows, dict) else number(rows) if rows is not None else "?"
        asked = ", ".join(f"{number(c[k])} {k}" for k in ("seeds", "requests") if k in c)
        return f"{made} rows" + (f" from {asked}" if asked else "")
    if name == "prepare":
        rows = c.get("rows") or {}
        splits = [f"{sum(rows[s].values()):,} {s}" for s in ("train", "validation", "test") if isinstance(rows.get(s), dict)]
        texts = sum(corpus.get("documents", 0) for corpus in c.get("corpora", {}).values())
        images = kept_images(artifact)
        return ", ".join(
            [f"{', '.join(splits)} rows"] * bool(splits) + [f"{texts:,} documents"] * bool(texts) + [f"{images:,} images"] * bool(images)
        )
    if name.startswith("shard-") and "train" in c:
        return f"{c['train']['bins']:,} bins, {c['train']['tokens']:,} tokens, {c['train']['utilisation']:.1%} used" + _images(c)
    if name == "evaluate" and ("strict_f1" in c or "tasks" in c):
        return "; ".join(([f"F1 {c['strict_f1']:.3f} on {number(c['rows'])} rows"] if "strict_f1" in c else []) + _tasks(c))
    if name == "questions":
        return ", ".join(f"{number(told['rows'])} {task}" for task, told in c.items() if isinstance(told, dict) and "rows" in told)
    if name == "merge" and "logit_difference_max" in c:
        return f"{number(c['layers'])} layers, logits differ by {c['logit_difference_max']:.1e} at most"
    if name == "init" and "parameters" in c:
        return f"{number(c['vocabulary'])} tokens, {number(c['parameters'])} random weights"
    if name == "serve" and c.get("first_token_s"):
        return f"first token after {c['first_token_s']:.3f} s"
    return ", ".join(f"{k} {v}" for k, v in list(flat(c))[:3])


def _images(counts: dict[str, Any]) -> str:
    images = counts.get("train", {}).get("images")
    return f", {number(images)} images" if images else ""


def _tasks(counts: dict[str, Any]) -> list[str]:
    return [f"{task} {metric} {value:.3f}" for task, means in counts.get("tasks", {}).items() for metric, value in means.items()]


# ---- verdict, ledger, cost --------------------------------------------------------------------------------------------
def _verdict(stages: list[Stage], found: dict[str, Artifact], trainings: list[Training]) -> tuple[str, bool | None]:
    left = [s for s in stages if s.state != "complete"]
    if "evaluate" in found and "strict_f1" in (c := found["evaluate"].counts):
        best = c.get("best_constant_f1")
        good = c["strict_f1"] > best if best is not None else None
        beside = f", {'above' if good else 'not above'} the best constant's {best:.3f}" if best is not None else ""
        base = _base_f1(found["evaluate"])
        return f"F1 {c['strict_f1']:.3f} on {number(c['rows'])} held-out rows{beside}" + (
            f"; the base alone {base:.3f}" if base is not None else ""
        ), good
    if left:
        return f"Not complete: {left[0].name} is {left[0].state} ({left[0].note})", None
    if "evaluate" in found and (tasks := _tasks(found["evaluate"].counts)):
        seen = _images(found["shard-sft"].counts) if "shard-sft" in found else ""
        return "; ".join([*tasks, *([f"trained on{seen[1:]}"] if seen else [])]), None
    losses = [(t.stage, dict(t.facts).get("validation loss") or dict(t.facts).get("loss")) for t in trainings]
    return "Complete" + "".join(f", {stage} at loss {loss}" for stage, loss in losses[-1:] if loss), None


def _base_f1(artifact: Artifact) -> float | None:
    try:
        return float(json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8"))["scores"]["base"]["strict"]["f1"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ledger(augment: Artifact | None) -> list[Pair]:
    """The API's ledger as the augment artifact tells it: where, how many requests, what they cost."""
    if augment is None:
        return []
    counts, cost = augment.counts, augment.manifest.get("cost", {})
    found = [("endpoint", counts.get("endpoint")), ("requests", counts.get("requests")), ("sent in this run", counts.get("sent")), ("failed", counts.get("failed"))]  # fmt: skip
    pairs = [(name, number(value)) for name, value in found if value is not None]
    names = {
        "usd_of_run": "spent in this run",
        "usd_of_recipe": "spent by this recipe so far",
        "usd_presumed": "of it presumed, for answers that never came",
        "usd_per_accepted_row": "an accepted row",
    }
    pairs += [(text, dollars(cost[key])) for key, text in names.items() if cost.get(key) is not None]
    return pairs + [
        (text, number(cost[key])) for key, text in (("tokens_of_recipe", "tokens of this recipe so far"), ("retries", "retries")) if key in cost
    ]


def _cost(found: dict[str, Artifact], trainings: list[Training]) -> Cost:
    """Device hours are steps' time times processes, of all launches; an unfinished stage's processes are not known and count as one."""
    rows, total, gpu = [], 0.0, False
    for t in trainings:
        counts = found[t.stage].counts if t.stage in found else {}
        processes = counts.get("processes") or 1
        hours = counts.get("device_hours", t.steps_s * processes / 3600)
        total, gpu = total + hours, gpu or any(c.title == "Peak memory" for c in t.charts)
        rows.append((t.stage, number(processes) if counts else "not known", duration(t.steps_s), f"{hours:.4f}" if hours < 1 else f"{hours:,.2f}"))
    table = Table("Training", ("stage", "processes", "time in steps", "GPU hours" if gpu else "process hours"), tuple(rows), (1, 2, 3))
    return Cost(tuple(_ledger(found.get("augment"))), table, total, gpu)
