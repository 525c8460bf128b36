"""The tasks of [evaluate.tasks] as a report shows them: means with intervals, and the ten best and worst answers beside the base's and what was wanted.

A task's own score ranks them: ROUGE-L of a generation, right or wrong of a choice or a final answer, nats a token of a text, F1 of the items of JSON and
then whether it is equal. Among equals those come first where the base did otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graft.core.rows import read_jsonl
from graft.report.flat import number
from graft.report.pictures import Album, in_marks
from graft.report.scrub import cut, ends
from graft.report.tree import Answer, Pair, Table, Task

RIGHT_OR_WRONG = ("choice", "exact", "cloze")
SHOWN = 10  # answers of a kind
TEXT = 1500  # code points of a prompt or an answer
QUESTIONS, QUESTION = 50, 160  # rows of the table by question, code points of one
OWN = {
    "generation": "rougeL",
    "choice": "correct",
    "exact": "correct",
    "cloze": "correct_loglikelihood",
    "json": "item_f1",
}  # the score of a row; a text's is told by its nats and tokens
NAMES = {
    ("choice", "correct"): "right, by the generated answer",
    **{(kind, "correct_loglikelihood"): "right, by log-likelihood" for kind in ("choice", "cloze")},
    **{(kind, "correct_loglikelihood_per_character"): "right, by log-likelihood a character" for kind in ("choice", "cloze")},
    ("exact", "correct"): "right",
    ("json", "key_f1"): "F1 of keys",
    ("json", "item_f1"): "F1 of items",
}
Row = dict[str, Any]


def task(name: str, told: dict[str, Any], predictions: Path, questions: Path | None) -> Task:
    """told: of metrics.json. predictions, questions: the task's files of answers and of what was asked; what is not there is left out."""
    kind, systems = str(told.get("kind", "")), [s for s, means in told["systems"].items() if isinstance(means, dict)]
    rows = list(read_jsonl(predictions)) if predictions.is_file() else []
    best, worst = _chosen(kind, rows, systems)
    ids = {str(row.get("id")) for row in (*best, *worst)}
    asked = {str(q.get("id")): q for q in read_jsonl(questions) if str(q.get("id")) in ids} if questions and questions.is_file() else {}
    notes = [kind, *([f"{number(told['rows'])} rows"] if "rows" in told else []), *_counted(rows, systems)]
    album = Album(questions.parent) if questions else None
    good, bad = (tuple(_answer(kind, row, asked.get(str(row.get("id")), {}), systems, album) for row in chosen) for chosen in (best, worst))
    return Task(name, _means(kind, told, systems), ", ".join(n for n in notes if n), good, bad, _by_question(told.get("by_question"), systems))


def _means(kind: str, told: dict[str, Any], systems: list[str]) -> Table:
    """One row a metric, one column a system, then the paired difference with its p."""
    metrics = list(dict.fromkeys(m for s in systems for m, mean in told["systems"][s].items() if isinstance(mean, dict)))
    pair = told.get("paired") if isinstance(told.get("paired"), dict) else None
    cells = []
    for m in metrics:
        apart = (pair or {}).get(m)
        said = (_interval(apart, "difference"), f"{p:.3f}" if isinstance(apart, dict) and isinstance(p := apart.get("p"), int | float) else "")
        cells.append(
            (NAMES.get((kind, m), m.replace("_", " ")), *(_interval(told["systems"][s].get(m), "mean") for s in systems), *(said if pair else ()))
        )
    columns = ("", *systems, *((str(pair.get("of", "difference")), "p") if pair else ()))
    return Table("Mean and interval of 95 %", columns, tuple(cells), tuple(range(1, len(columns))))


def _interval(told: Any, key: str) -> str:
    if not isinstance(told, dict) or not isinstance(mean := told.get(key), int | float):
        return ""
    sign = "+" if key == "difference" else ""
    low, high, std = (told.get(k) for k in ("low", "high", "std"))
    said = f"{mean:{sign}.3f}" + (f" ({low:{sign}.3f} to {high:{sign}.3f})" if isinstance(low, int | float) and isinstance(high, int | float) else "")
    return said + (f" ± {std:.3f}" if isinstance(std, int | float) else "")


def _counted(rows: list[Row], systems: list[str]) -> list[str]:
    """How many answers of each system are valid and how many no parser could read, of a kind that has such."""
    found = {(s, what): [v for row in rows for v in _scores(row, s).get(what, [])] for s in systems for what in ("valid", "unreadable")}
    return [f"{sum(values):,.0f} of {len(values):,} answers of {s} {what}" for (s, what), values in found.items() if values]


def _by_question(told: Any, systems: list[str]) -> Table | None:
    """How often each question is answered right, beside whoever gives its commonest answer always."""
    rows = [q for q in told if isinstance(q, dict)] if isinstance(told, list) else []
    if not rows or not systems:
        return None

    def share(value: Any, sign: str = "") -> str:
        return f"{value:{sign}.1%}" if isinstance(value, int | float) else ""

    cells, bars = [], []
    for q in rows[:QUESTIONS]:
        chance, own = q.get("majority"), q.get(systems[0])
        above = own - chance if isinstance(own, int | float) and isinstance(chance, int | float) else None
        shares = (share(chance), *(share(q.get(s)) for s in systems), share(above, "+"))
        cells.append((cut(str(q.get("question", "")), QUESTION), number(q.get("rows", "")), *shares))
        bars.append(float(own) if isinstance(own, int | float) else 0.0)
    columns = ("question", "rows", "commonest answer", *systems, f"{systems[0]} above it")
    note = f"shares of rows answered right; the bar: {systems[0]}’s; commonest answer: whoever always gives the one most often wanted"
    left = f"; {len(rows) - QUESTIONS:,} more questions are in metrics.json" if len(rows) > QUESTIONS else ""
    return Table("By question", columns, tuple(cells), tuple(range(1, len(columns))), tuple(bars), note + left)


# ---- answers ----------------------------------------------------------------------------------------------------------
def _scores(row: Row, system: str) -> dict[str, list[float]]:
    own = row.get(system)
    return own.get("scores") or {} if isinstance(own, dict) else {}


def _score(kind: str, row: Row, system: str) -> float | None:
    """Of all repeats; the more, the better."""
    if kind == "perplexity":
        own = row.get(system)
        return -own["nats"] / own["tokens"] if isinstance(own, dict) and own.get("tokens") else None
    values = _scores(row, system).get(OWN.get(kind, ""))
    return sum(values) / len(values) if values else None


def _equal(kind: str, row: Row, system: str) -> float:
    """What parts rows of one score: whether JSON is equal as a whole."""
    values = _scores(row, system).get("equal") if kind == "json" else None
    return sum(values) / len(values) if values else 1.0


def _chosen(kind: str, rows: list[Row], systems: list[str]) -> tuple[list[Row], list[Row]]:
    """(best, worst), none in both: nothing wrong is among the best, nothing perfect among the worst."""

    def rank(row: Row) -> tuple[float, float, float]:
        own = _score(kind, row, systems[0]) or 0.0
        return own, _equal(kind, row, systems[0]), own - ((_score(kind, row, systems[1]) or 0.0) if len(systems) > 1 else 0.0)

    ranked = sorted((row for row in rows if systems and _score(kind, row, systems[0]) is not None), key=rank, reverse=True)
    half = (len(ranked) + 1) // 2
    best, worst = ranked[:half][:SHOWN], ranked[half:][::-1][:SHOWN]
    if kind == "perplexity":
        return best, worst
    return [row for row in best if rank(row)[0] > 0], [row for row in worst if min(rank(row)[:2]) < 1]


def _answer(kind: str, row: Row, question: Row, systems: list[str], album: Album | None) -> Answer:
    """One answer with what was asked, shown and wanted, and what the base said."""
    score = _score(kind, row, systems[0])
    right = score == 1 if kind in RIGHT_OR_WRONG else None
    told = ", ".join(f"{s} {_judged(kind, row, question, s)}" for s in systems)
    if kind == "perplexity":
        return Answer(str(row.get("id", "")), right, told, (("text", cut(str(question.get("text", "")), TEXT)),))
    form = _pretty if kind == "json" else str
    said: list[Pair] = [(f"{s}’s answer" if len(systems) > 1 else "answer", cut(form(_said(row, question, s)), TEXT)) for s in systems]
    messages = [m for m in question.get("messages") or [] if isinstance(m, dict)]
    asked = str(question.get("text", "")) if kind == "cloze" else _prompt(messages)
    sides = [("prompt", ends(asked, TEXT)), said[0], ("wanted", cut(form(_wanted(row, question)), TEXT)), *said[1:]]
    return Answer(str(row.get("id", "")), right, told, tuple(sides), kind == "json", album.pictures(messages) if album else ())


def _judged(kind: str, row: Row, question: Row, system: str) -> str:
    """A system's answer in a few words: its score, and how an option's likelihood would have chosen."""
    score = _score(kind, row, system)
    if score is None:
        return "no score"
    scores = _scores(row, system)
    if kind == "json":
        state = "unreadable" if all(scores.get("unreadable") or [0]) else "valid" if all(scores.get("valid", [])) else "not valid"
        return f"F1 of items {score:.3f}, {'equal' if _equal(kind, row, system) == 1 else state}"
    if kind not in RIGHT_OR_WRONG:
        return f"{-score:.3f} nats a token" if kind == "perplexity" else f"{OWN[kind]} {score:.3f}"
    repeats = len(scores[OWN[kind]])
    said = f"right in {sum(scores[OWN[kind]]):.0f} of {repeats}" if repeats > 1 else "right" if score else "wrong"
    if not score and all(scores.get("unreadable", [0])):
        said = "unreadable"
    likeliest = _likeliest(row, question, system)
    return f"{said}, likeliest {cut(likeliest, 40)}" if likeliest and kind == "choice" else said


def _likeliest(row: Row, question: Row, system: str) -> str:
    nats, replies = row[system].get("loglikelihoods_nats"), question.get("replies")
    return str(replies[max(range(len(replies)), key=nats.__getitem__)]) if nats and replies and len(nats) == len(replies) else ""


def _said(row: Row, question: Row, system: str) -> str:
    """The first repeat's answer; where none is generated, the likeliest reply."""
    if not isinstance(row.get(system), dict):
        return ""
    answers = row[system].get("answers")
    return str(answers[0]) if answers else _likeliest(row, question, system)


def _wanted(row: Row, question: Row) -> str:
    wanted, replies = row.get("wanted"), question.get("replies")
    if isinstance(wanted, int):  # an option's place
        return str(replies[wanted]) if replies and wanted < len(replies) else f"option {wanted + 1}"
    return json.dumps(wanted, ensure_ascii=False) if isinstance(wanted, dict | list) else str(wanted if wanted is not None else "")


def _pretty(text: str) -> str:
    """JSON with a line a value; as it is where it is none, or names a key twice."""
    try:
        return json.dumps(json.loads(text, object_pairs_hook=_once), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return found


def _prompt(messages: list[dict[str, Any]]) -> str:
    said = in_marks(messages)
    return said[0][1] if len(said) == 1 else "\n\n".join(f"{role}: {text}" for role, text in said)
