"""Call or text, on held-out seed families, by a parser of the call.

Strict: a malformed call is wrong whatever was meant (neither a call nor text). By intent: a malformed call counts as a
call. Beside the adapter stand the two constants, always-call and always-text, and the base without the adapter.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich.progress import track

from graft.core.calls import parse_answer
from graft.core.rows import read_jsonl, write_jsonl
from graft.core.stages import Job
from graft.engine.protocol import Engine, Request
from graft.model.chat import render_prompt

LABELS, PREDICTED = ("call", "text"), ("call", "text", "malformed")


def measure(job: Job, folder: Path, engine: Engine, tokenizer: Any, systems: dict[str, str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, the artifact's counts); writes predictions.jsonl, predictions-base.jsonl, failures.jsonl, confusion.csv and confusion.png.

    systems: {what it is called: the adapter's name, None for none}, that which was trained first.
    """
    rows = list(read_jsonl(job.parents["prepare"].path / "rows" / "test.jsonl"))
    trained = next(iter(systems))
    predictions = {name: _predict(engine, tokenizer, rows, adapter, job) for name, adapter in systems.items()}
    truth = [row["label"] for row in rows]
    table = {name: score(truth, [p["predicted"] for p in found]) for name, found in predictions.items()}
    table["always-call"] = score(truth, ["call"] * len(rows))
    table["always-text"] = score(truth, ["text"] * len(rows))
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
    out: dict[str, Any] = {"accuracy": sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)}
    for name, positive in (("strict", {"call"}), ("intent", {"call", "malformed"})):
        hit = sum(t == "call" and p in positive for t, p in zip(truth, predicted, strict=True))
        said, real = sum(p in positive for p in predicted), truth.count("call")
        precision, recall = hit / said if said else 0.0, hit / real if real else 0.0
        out[name] = {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall) if hit else 0.0}
    return out


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
        f"evaluation on {metrics['rows']} rows of held-out seed families",
        f"{'':<14}{'precision':>10}{'recall':>8}{'F1':>8}{'F1 intent':>11}{'accuracy':>10}",
    ]
    for name, s in metrics["scores"].items():
        lines.append(
            f"{name:<14}{s['strict']['precision']:>10.3f}{s['strict']['recall']:>8.3f}{s['strict']['f1']:>8.3f}{s['intent']['f1']:>11.3f}{s['accuracy']:>10.3f}"
        )
    lines.append(f"{'true / predicted':<18}" + "".join(f"{p:>10}" for p in PREDICTED))
    lines += [f"{label:<18}" + "".join(f"{n:>10}" for n in row.values()) for label, row in metrics["confusion"].items()]
    lines.append("accuracy by family: " + ", ".join(f"{f} {a:.2f}" for f, a in metrics["per_family_accuracy"].items()))
    if metrics["argument_exact_share"] is not None:
        lines.append(f"call argument exactly as the row's: {metrics['argument_exact_share']:.3f} of the right calls")
    return "\n".join(lines) + "\n"


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
