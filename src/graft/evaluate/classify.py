"""Call or text, on held-out seed families, by a parser of the call.

Strict: a malformed call is wrong whatever was meant (neither a call nor text). By intent: a malformed call counts as a
call. Beside the adapter stand the two constants, always-call and always-text, and the base without the adapter. Answers
are greedy. Rows of one seed family are alike, so intervals draw whole families, of each class as many as were held out.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from graft.core.calls import parse_answer
from graft.core.rows import read_jsonl, write_jsonl
from graft.core.stages import Job
from graft.engine.protocol import Engine, Request
from graft.evaluate.statistics import Clusters, interval, other_sign
from graft.model.chat import render_prompt

LABELS, PREDICTED = ("call", "text"), ("call", "text", "malformed")
JUDGED = {"strict": ["call"], "intent": ["call", "malformed"]}  # what counts as a call
SHOWN = (("strict", "precision"), ("strict", "recall"), ("strict", "f1"), ("intent", "f1"), ("accuracy",))  # columns of the report


def measure(job: Job, folder: Path, engine: Engine, tokenizer: Any, systems: dict[str, str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, the artifact's counts); writes predictions.jsonl, predictions-base.jsonl, failures.jsonl, confusion.csv and confusion.png.

    systems: {what it is called: the adapter's name, None for none}, that which was trained first.
    """
    rows = list(read_jsonl(job.parents["prepare"].path / "rows" / "test.jsonl"))
    trained = next(iter(systems))
    predictions = {name: _predict(engine, tokenizer, rows, adapter, job) for name, adapter in systems.items()}
    truth = [row["label"] for row in rows]
    said = {name: [p["predicted"] for p in found] for name, found in predictions.items()}
    said |= {f"always-{label}": [label] * len(rows) for label in LABELS}
    table = {name: score(truth, own) for name, own in said.items()}
    ours = predictions[trained]
    write_jsonl(folder / "predictions.jsonl", ours)
    if "base" in predictions:
        write_jsonl(folder / "predictions-base.jsonl", predictions["base"])
    failures = [p for p in ours if p["predicted"] != p["label"]]
    write_jsonl(folder / "failures.jsonl", failures)
    matrix = confusion(truth, [p["predicted"] for p in ours])
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["true \\ predicted", *PREDICTED], *([label, *matrix[label].values()] for label in LABELS)])
    _draw(matrix, folder / "confusion.png")
    copied = [p["argument"] == p["wanted_argument"] for p in ours if p["label"] == p["predicted"] == "call"]
    metrics = {
        "rows": len(rows),
        "scores": table,
        **certainty(rows, said, [*systems], job.recipe.seed),
        "confusion": matrix,
        "per_family_accuracy": family_accuracy(ours),
        "argument_exact_share": sum(copied) / len(copied) if copied else None,
    }
    strict = table[trained]["strict"]
    best_constant = max(table["always-call"]["strict"]["f1"], table["always-text"]["strict"]["f1"])
    counts = {f"strict_{key}": strict[key] for key in ("f1", "precision", "recall")} | {"intent_f1": table[trained]["intent"]["f1"]}
    counts |= {"accuracy": table[trained]["accuracy"], "best_constant_f1": best_constant, "beats_constants": strict["f1"] > best_constant}
    return metrics, {"rows": len(rows), **counts, "failures": len(failures)}


def _predict(engine: Engine, tokenizer: Any, rows: list[dict[str, Any]], adapter: str | None, job: Job) -> list[dict[str, Any]]:
    e, task = job.recipe.evaluate, job.recipe.task
    requests = [Request(render_prompt(tokenizer, row["messages"][:-1]), e.max_new_tokens, adapter=adapter) for row in rows]
    found = []
    starts = range(0, len(rows), e.batch_size)
    for at in track(starts, f"evaluate {adapter or 'base'}", transient=True):
        for row, answer in zip(rows[at : at + e.batch_size], engine.generate(requests[at : at + e.batch_size]), strict=True):
            parsed = parse_answer(answer.text, task.function, task.argument)
            wanted = parse_answer(row["messages"][-1]["content"], task.function, task.argument)
            found.append(
                {
                    "id": row["id"], "family": row["family"], "label": row["label"], "predicted": parsed.kind, "user": row["messages"][-2]["content"], "answer": answer.text,
                    "reason": parsed.reason, "argument": (parsed.arguments or {}).get(task.argument), "wanted_argument": (wanted.arguments or {}).get(task.argument),
                }
            )  # fmt: skip
    return found


def score(truth: list[str], predicted: list[str]) -> dict[str, Any]:
    """Precision, recall and F1 of the class "call", strict and by intent, with strict accuracy; 0 where undefined."""
    return _each(float, _scores(_counts(truth, predicted).sum(axis=0)))


def certainty(rows: list[dict[str, Any]], said: dict[str, list[str]], systems: list[str], seed: int) -> dict[str, Any]:
    """{families: how many, intervals: {system: the scores, each as [low, high] of 95 %}, paired: {of, the scores, each as difference, low, high, p}}.

    rows: each with its label and family. said: {system: its predictions}. systems: one, or two that are compared: both are scored on the same draws.
    """
    truth = [row["label"] for row in rows]
    clusters = Clusters.drawn(truth, [row["family"] for row in rows], seed)
    drawn = {name: _scores(clusters.sums(_counts(truth, own))) for name, own in said.items()}

    def compared(ours: float, theirs: float, of_ours: Any, of_theirs: Any) -> dict[str, float]:
        low, high = interval(of_ours - of_theirs)
        told = {"difference": ours - theirs, "low": low, "high": high, "p": other_sign(of_ours - of_theirs)}
        return {key: round(value, 6) for key, value in told.items()}

    found: dict[str, Any] = {
        "families": len({row["family"] for row in rows}),
        "intervals": {name: _each(lambda of: [round(end, 6) for end in interval(of)], own) for name, own in drawn.items()},
    }
    if len(systems) > 1:
        both = systems[:2]
        points = [score(truth, said[name]) for name in both]
        found["paired"] = {"of": " less ".join(both), **_each(compared, *points, *(drawn[name] for name in both))}
    return found


def _counts(truth: list[str], predicted: list[str]) -> Any:
    """[rows, 7] of 0 and 1: the row, whether it is right, truly a call, and strictly and by intent: said to be one, and rightly so."""
    real = np.array(truth) == "call"
    said = [np.isin(predicted, positive) for positive in JUDGED.values()]
    right = np.array([t == p for t, p in zip(truth, predicted, strict=True)])
    return np.stack([np.ones(len(real)), right, real, *(column for own in said for column in (own, own & real))], axis=-1).astype(np.float64)


def _scores(counts: Any) -> dict[str, Any]:
    """counts: [..., 7], sums over rows -> the scores, each [...]."""
    rows, right, real, *judged = np.moveaxis(counts, -1, 0)
    scores: dict[str, Any] = {"accuracy": _share(right, rows)}
    for name, said, hit in zip(JUDGED, judged[::2], judged[1::2], strict=True):
        scores[name] = {"precision": _share(hit, said), "recall": _share(hit, real), "f1": _share(2 * hit, said + real)}
    return scores


def _share(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def _each(f: Callable[..., Any], *trees: dict[str, Any]) -> dict[str, Any]:
    """f of the scores that stand at the same place of all trees."""

    def at(*own: Any) -> Any:
        return _each(f, *own) if isinstance(own[0], dict) else f(*own)

    return {key: at(*(tree[key] for tree in trees)) for key in trees[0]}


def confusion(truth: list[str], predicted: list[str]) -> dict[str, dict[str, int]]:
    """Counts by true label (call, text) and prediction (call, text, malformed)."""
    matrix = {label: dict.fromkeys(PREDICTED, 0) for label in LABELS}
    for t, p in zip(truth, predicted, strict=True):
        matrix[t][p] += 1
    return matrix


def family_accuracy(predictions: list[dict[str, Any]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for p in predictions:
        right.setdefault(p["family"], []).append(p["predicted"] == p["label"])
    return {family: sum(hits) / len(hits) for family, hits in sorted(right.items())}


def render_report(metrics: dict[str, Any]) -> str:
    """The evaluation as plain text: the table of scores, the confusion matrix, accuracy by held-out family."""
    lines = [
        f"evaluation on {metrics['rows']} rows of {metrics['families']} held-out seed families; below each score its interval of 95 %, by family",
        f"{'':<14}{'precision':>10}{'recall':>11}{'F1':>11}{'F1 intent':>11}{'accuracy':>11}",
    ]
    for name, scores in metrics["scores"].items():
        lines.append(f"{name:<13}" + "".join(f"{_at(scores, place):>11.3f}" for place in SHOWN))
        ends = [_at(metrics["intervals"][name], place) for place in SHOWN]
        lines.append(" " * 13 + "".join(f"{f'{low:.2f}-{high:.2f}':>11}" for low, high in ends))
    if pair := metrics.get("paired"):
        told = ((title, _at(pair, place)) for title, place in (("F1", ("strict", "f1")), ("accuracy", ("accuracy",))))
        shown = [f"{title} {d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}), p {d['p']:.3f}" for title, d in told]
        lines.append(f"{pair['of']}: {'; '.join(shown)}")
    lines.append(f"{'true / predicted':<18}" + "".join(f"{p:>10}" for p in PREDICTED))
    lines += [f"{label:<18}" + "".join(f"{n:>10}" for n in row.values()) for label, row in metrics["confusion"].items()]
    lines.append("accuracy by family: " + ", ".join(f"{f} {a:.2f}" for f, a in metrics["per_family_accuracy"].items()))
    if metrics["argument_exact_share"] is not None:
        lines.append(f"call argument exactly as the row's: {metrics['argument_exact_share']:.3f} of the right calls")
    return "\n".join(lines) + "\n"


def _at(tree: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _draw(matrix: dict[str, dict[str, int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = [list(matrix[label].values()) for label in LABELS]
    fig, ax = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    ax.imshow(values, cmap="Blues")
    ax.set_xticks(range(3), PREDICTED)
    ax.set_yticks(range(2), LABELS)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    top = max(max(v) for v in values)
    for y, row in enumerate(values):
        for x, n in enumerate(row):
            ax.text(x, y, str(n), ha="center", va="center", color="white" if n > top / 2 else "black")
    fig.savefig(path, dpi=150)
    plt.close(fig)
