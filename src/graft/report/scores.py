"""The evaluation as a report shows it: scores, confusion, families, and the ten best and worst predictions beside what was wanted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from graft.core.errors import ArtifactError
from graft.core.rows import read_jsonl
from graft.report.flat import flat, number
from graft.report.scrub import cut
from graft.report.tasks import task
from graft.report.tree import Confusion, Evaluation, Prediction, Table

SHOWN = 10  # predictions of a kind
TEXT = 1500  # code points of a prompt or an answer
OTHERS = 100  # rows of the table of what else was measured
NAMES = {"strict.precision": "precision", "strict.recall": "recall", "strict.f1": "F1", "intent.f1": "F1 intent", "accuracy": "accuracy"}
MEASURES = {"argument_exact_share": "right calls whose argument is exactly the wanted one, share"}
KNOWN = {"rows", "scores", "intervals", "paired", "families", "confusion", "per_family_accuracy"}


def evaluation(folder: Path, test: Path | None, questions: Path | None = None) -> Evaluation:
    """folder: the evaluate artifact. test: the rows that it asked, whose last message is what was wanted; None: not known. questions: of its tasks.

    Whatever part an evaluation does not have is left out. ArtifactError where metrics.json is no JSON object, DataError where a line of the rows is none.
    """
    metrics = _metrics(folder / "metrics.json")
    found = list(read_jsonl(folder / "predictions.jsonl")) if (folder / "predictions.jsonl").is_file() else []
    failures = sum(not _right(p) for p in found)
    best, worst = _chosen(found)
    wanted = _wanted(test, {str(p.get("id")) for p in [*best, *worst]}) if test else {}
    tasks = {name: t for name, t in (metrics.get("tasks") or {}).items() if isinstance(t, dict) and isinstance(t.get("systems"), dict)}
    metrics = metrics | {"tasks": {name: t for name, t in (metrics.get("tasks") or {}).items() if name not in tasks}}
    others = list(flat({MEASURES.get(k, k): v for k, v in metrics.items() if k not in KNOWN}))
    return Evaluation(
        rows=int(metrics.get("rows") or len(found)),
        scores=_scores(metrics),
        confusion=_confusion(metrics.get("confusion") or {}),
        families=_families(metrics.get("per_family_accuracy") or {}, Counter(str(p.get("family")) for p in found)),
        tasks=tuple(task(n, t, folder / f"predictions-{n}.jsonl", questions / f"{n}.jsonl" if questions else None) for n, t in tasks.items()),
        others=Table("What else was measured", ("measure", "value"), tuple(others[:OTHERS]), (1,)) if others else None,
        best=tuple(_prediction(p, wanted) for p in best),
        worst=tuple(_prediction(p, wanted) for p in worst),
        failures=failures,
    )


def _metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ArtifactError(f"{file} cannot be read ({e}): make it again with `graft run RECIPE --from evaluate`") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is no JSON object: make it again with `graft run RECIPE --from evaluate`")
    return found


def _scores(metrics: dict[str, Any]) -> Table | None:
    """One row a system, the constants and the base among them, then the paired difference; a score of an unknown name has a column of its own."""
    told = metrics.get("scores") or {}
    by_system = {name: dict(_leaves(s)) for name, s in told.items() if isinstance(s, dict)}
    keys = list(dict.fromkeys(k for s in by_system.values() for k in s))
    keys = [k for k in NAMES if k in keys] + [k for k in keys if k not in NAMES and not k.startswith("intent.")]
    sure = metrics.get("intervals") or {}
    rows = [(name, *(_cell(s[k], _at(sure.get(name), k)) if k in s else "" for k in keys)) for name, s in by_system.items()]
    if pair := metrics.get("paired"):
        rows.append((str(pair.get("of", "difference")), *(_apart(_at(pair, k)) for k in keys)))
    if not rows or not keys:
        return None
    note = f"in parentheses the interval of 95 %: the {number(metrics.get('families', ''))} held-out seed families drawn anew" if sure else ""
    return Table("Scores", ("", *(NAMES.get(k, k) for k in keys)), tuple(rows), tuple(range(1, len(keys) + 1)), note=note)


def _cell(value: float, ends: Any) -> str:
    return f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if isinstance(ends, list) else "")


def _apart(told: Any) -> str:
    return f"{told['difference']:+.3f} ({told['low']:+.3f} to {told['high']:+.3f})" if isinstance(told, dict) else ""


def _at(tree: Any, key: str) -> Any:
    """What stands under a leaf's name; None where nothing does."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _confusion(matrix: dict[str, dict[str, int]]) -> Confusion | None:
    if not matrix:
        return None
    predicted = tuple(dict.fromkeys(p for row in matrix.values() for p in row))
    return Confusion(tuple(matrix), predicted, tuple(tuple(int(row.get(p, 0)) for p in predicted) for row in matrix.values()))


def _families(accuracy: dict[str, float], rows: Counter[str]) -> Table | None:
    """The lowest first."""
    found = sorted(accuracy.items(), key=lambda item: (item[1], item[0]))
    cells = tuple((name, number(rows[name]) if rows[name] else "", f"{share:.1%}") for name, share in found)
    return Table("Accuracy by held-out family", ("family", "rows", "accuracy"), cells, (1, 2), tuple(s for _, s in found)) if found else None


# ---- predictions ------------------------------------------------------------------------------------------------------
def _right(p: dict[str, Any]) -> bool:
    return p.get("predicted") == p.get("label")


def _score(p: dict[str, Any]) -> float | None:
    value = p.get("score")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _chosen(found: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(best, worst): by the predictions' scores where they have some; else what is right, classes in turn, the argument as wanted first, and
    what is wrong, the longest answers first."""
    if found and all(_score(p) is not None for p in found):
        ranked = sorted(found, key=lambda p: _score(p) or 0.0, reverse=True)
        return ranked[:SHOWN], ranked[::-1][: min(SHOWN, max(0, len(found) - SHOWN))]
    worst = sorted((p for p in found if not _right(p)), key=lambda p: len(str(p.get("answer") or "")), reverse=True)
    right = sorted((p for p in found if _right(p)), key=lambda p: p.get("argument") != p.get("wanted_argument"))
    classes: dict[str, list[dict[str, Any]]] = {}
    for p in right:
        classes.setdefault(str(p.get("label")), []).append(p)
    in_turn = [p for p in chain.from_iterable(zip_longest(*classes.values())) if p is not None]
    return in_turn[:SHOWN], worst[:SHOWN]


def _wanted(test: Path, ids: set[str]) -> dict[str, str]:
    if not test.is_file():
        return {}
    return {str(row["id"]): str(row["messages"][-1]["content"]) for row in read_jsonl(test) if str(row.get("id")) in ids and row.get("messages")}


def _prediction(p: dict[str, Any], wanted: dict[str, str]) -> Prediction:
    text = {key: str(p.get(key) if p.get(key) is not None else "") for key in ("id", "family", "label", "predicted", "reason")}
    said = wanted.get(text["id"], str(p.get("wanted") or p.get("wanted_argument") or ""))
    prompt, answer = (cut(str(p.get(key) or ""), TEXT) for key in ("user", "answer"))
    return Prediction(**text, right=_right(p), prompt=prompt, answer=answer, wanted=cut(said, TEXT), score=_score(p))
