"""Evaluations of several runs side by side: of each arm of a sweep the mean and the standard deviation between its seeds, and of two arms the
difference, paired by seed and by row. Read from what the stage wrote, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean
from typing import Any

import numpy as np

from graft.core.artifact import Artifact
from graft.core.rows import read_jsonl
from graft.evaluate.statistics import paired_runs

CALLS = "call or text"  # the evaluation of a recipe that makes rows


@dataclass(frozen=True)
class Task:
    """One run's answers to one task. main: the metric that stands for it."""

    kind: str
    main: str
    means: dict[str, float]
    base: dict[str, float]  # of the untrained base, {} where that was not asked
    rows: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> id of a row -> score; of metrics that rows have


def read(evaluation: Artifact) -> dict[str, Task]:
    """What an artifact of the stage `evaluate` says of each task."""
    metrics = json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))
    found: dict[str, Task] = {}
    if scores := metrics.get("scores"):
        means, base = ({"F1": s["strict"]["f1"], "accuracy": s["accuracy"]} if s else {} for s in (next(iter(scores.values())), scores.get("base")))
        right = {str(p["id"]): float(p["predicted"] == p["label"]) for p in read_jsonl(evaluation.path / "predictions.jsonl")}
        found[CALLS] = Task("calls", "F1", means, base, {"accuracy": right})
    for name, told in (metrics.get("tasks") or {}).items():
        trained, *others = told["systems"]
        means, base = ({m: s["mean"] for m, s in told["systems"].get(system, {}).items()} for system in (trained, *(others or [""])))
        (main,) = evaluation.counts["tasks"][name]
        rows: dict[str, dict[str, float]] = {}
        for line in read_jsonl(evaluation.path / f"predictions-{name}.jsonl"):
            for metric, score in _scores(line[trained]).items():
                rows.setdefault(metric, {})[str(line["id"])] = score
        found[name] = Task(told["kind"], main, means, base, rows)
    return found


def _scores(kept: dict[str, Any]) -> dict[str, float]:
    """A row's score of each metric, the mean over its repeats."""
    if "nats" in kept:
        return {"nats_per_token": kept["nats"] / max(kept["tokens"], 1)}
    return {metric: mean(each) for metric, each in kept["scores"].items()}


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """values: by seed. Mean, sample standard deviation where there are two and more, and each."""
    each = list(values.values())
    return {
        "mean": mean(each),
        **({"std": float(np.std(each, ddof=1))} if len(each) > 1 else {}),
        "n": len(each),
        "by_seed": {str(s): v for s, v in values.items()},
    }


def tasks(runs: Mapping[int, dict[str, Task]]) -> dict[str, Any]:
    """{task: kind, main, metrics: {metric: spread}, base: {metric: spread}} of an arm's runs by seed."""
    found: dict[str, Any] = {}
    for name, first in next(iter(runs.values())).items():
        own = {metric: spread({seed: run[name].means[metric] for seed, run in runs.items()}) for metric in first.means}
        base = {metric: spread({seed: run[name].base[metric] for seed, run in runs.items()}) for metric in first.base}
        found[name] = {"kind": first.kind, "main": first.main, "metrics": own, "base": base}
    return found


def differences(arms: Mapping[str, Mapping[int, dict[str, Task]]]) -> list[dict[str, Any]]:
    """Of every two arms, the later less the earlier, for each metric that rows have: over the seeds that both have, and the rows that are the same in all."""
    found = []
    for (theirs, before), (ours, after) in combinations(arms.items(), 2):
        seeds = [seed for seed in before if seed in after]
        for name in before[seeds[0]] if seeds else ():
            for metric in before[seeds[0]][name].rows:
                a, b = ([arm[seed][name].rows[metric] for seed in seeds] for arm in (after, before))
                ids = list(a[0])
                if any(rows.keys() != a[0].keys() for rows in (*a, *b)):
                    continue  # rows that a recipe makes are others for every seed
                told = paired_runs([[rows[i] for i in ids] for rows in a], [[rows[i] for i in ids] for rows in b]).told()
                found.append({"task": name, "metric": metric, "of": ours, "less": theirs, **told, "seeds": len(seeds), "rows": len(ids)})
    return found
