"""A sweep's results as one table (Markdown) and one plot (an SVG file of its own: no script, no font, no style sheet beside it)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from statistics import mean
from typing import Any

from graft.report.charts import WIDTH, figure, said, spread_chart
from graft.report.flat import duration
from graft.report.tree import Spread

GAP, HEAD, FOOT = 28, 40, 10  # user units of the plot
STYLE = """
text { font: 13px system-ui, "Noto Sans TC", sans-serif; fill: #63625e } .name { font-size: 17px; fill: #1c1c1a }
.title, .arm, .told { fill: #1c1c1a } .title { font-weight: 600 } .told { font-size: 12px; font-variant-numeric: tabular-nums }
.grid { stroke: #e9e7e1 } .bar { stroke: #2563a8; stroke-width: 1.6; fill: none } .mean { fill: #2563a8 } .one { fill: #c2541d; opacity: .75 }
"""
Rows = list[list[str]]


# ---- the table --------------------------------------------------------------------------------------------------------
def table(results: dict[str, Any]) -> str:
    """What each arm saw and the main metric of each task; then every metric of each task; then the differences."""
    arms = results["arms"]
    done, runs = sum(len(arm["runs"]) for arm in arms), results["runs"]
    tasks = list(arms[0]["tasks"])
    parts = [f"# {results['sweep']}", f"{done} of {runs} runs are complete. {_note(results)}", *_markdown(*_overview(arms, tasks))]
    for task in tasks:
        metrics = list(arms[0]["tasks"][task]["metrics"])
        rows = [[name, *(_told(of.get(metric)) for metric in metrics)] for name, of in _systems(arms, task)]
        parts += [f"\n## {task}: {arms[0]['tasks'][task]['kind']}", *_markdown(["arm", *metrics], rows)]
    if apart := [d for task in tasks for d in _main(results["differences"], task, arms[0]["tasks"][task]["main"])]:
        head = ["task", "metric", "arms", "difference", "95 % interval", "p", "seeds", "rows"]
        parts += ["\n## Differences, over the rows and seeds that both arms have", *_markdown(head, [_difference(d) for d in apart])]
    return "\n".join(parts) + "\n"


def _note(results: dict[str, Any]) -> str:
    several = len(results["seeds"]) > 1
    return "Mean ± sample standard deviation between seeds." if several else "One seed: nothing is known of the deviation between seeds."


def _overview(arms: Sequence[dict[str, Any]], tasks: Sequence[str]) -> tuple[list[str], Rows]:
    mains = {task: arms[0]["tasks"][task]["main"] for task in tasks}
    rows: Rows = []
    for arm in arms:
        seen = {key: mean(run[key] for run in arm["runs"]) for key in ("rows", "epochs", "steps", "tokens_seen", "device_s")}
        scores = [_told(arm["tasks"][task]["metrics"].get(metric)) for task, metric in mains.items()]
        facts = [f"{seen['rows']:,.0f}", f"{seen['epochs']:.4g}", f"{seen['steps']:,.0f}", said(seen["tokens_seen"]), duration(seen["device_s"])]
        rows.append([arm["name"], str(len(arm["runs"])), *facts, *scores])
    return ["arm", "seeds", "rows", "epochs", "steps", "tokens seen", "device time", *(f"{task} {metric}" for task, metric in mains.items())], rows


def _systems(arms: Sequence[dict[str, Any]], task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each arm, and the base: once where it is the same for all."""
    for arm in arms:
        yield arm["name"], arm["tasks"][task]["metrics"]
    bases = [arm["tasks"][task]["base"] for arm in arms]
    if all(_means(base) == _means(bases[0]) for base in bases):
        bases = bases[:1]
    for arm, base in zip(arms, bases, strict=False):
        if base:
            yield "base" if len(bases) == 1 else f"base of {arm['name']}", base


def _means(base: dict[str, Any]) -> dict[str, float]:
    return {metric: round(told["mean"], 9) for metric, told in base.items()}


def _told(spread: dict[str, Any] | None) -> str:
    return figure(spread["mean"], spread.get("std")) if spread else ""


def _main(differences: Sequence[dict[str, Any]], task: str, main: str) -> list[dict[str, Any]]:
    """Of the task's main metric, or of the first that rows have."""
    own = [d for d in differences if d["task"] == task]
    metrics = [d["metric"] for d in own]
    return [d for d in own if d["metric"] == (main if main in metrics else metrics[0])]


def _difference(d: dict[str, Any]) -> list[str]:
    between = [f"{d['difference']:+.4f}", f"{d['low']:+.4f} to {d['high']:+.4f}", f"{d['p']:.3f}"]
    return [d["task"], d["metric"], f"{d['of']} less {d['less']}", *between, str(d["seeds"]), f"{d['rows']:,}"]


def _markdown(head: Sequence[str], rows: Rows) -> Iterator[str]:
    """A pipe table, columns padded to be read as text too."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    yield ""
    for n, line in enumerate(lines):
        yield "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, wide, strict=True)) + " |"
        if n == 0:
            yield "|" + "|".join("-" * (w + 2) for w in wide) + "|"


# ---- the plot ---------------------------------------------------------------------------------------------------------
def plot(results: dict[str, Any]) -> str:
    """The main metric of each task, an arm a row; two pictures side by side."""
    arms = results["arms"]
    pictures = []
    for task, told in arms[0]["tasks"].items():
        metric = told["main"]
        found = [(arm["name"], arm["tasks"][task]["metrics"][metric]) for arm in arms]
        spreads = [Spread(name, s["mean"], s.get("std"), tuple(s["by_seed"].values())) for name, s in found]
        pictures.append(spread_chart(f"{task}, {metric}", spreads))
    height = pictures[0][1]  # of all: they have the same rows
    columns = min(2, len(pictures))
    width, total = columns * (WIDTH + GAP) + GAP, HEAD + -(-len(pictures) // columns) * (height + GAP) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}"><style>{STYLE}</style>',
        f'<rect width="{width}" height="{total}" fill="#fff"/><text class="name" x="{GAP}" y="27">{escape(results["sweep"])}</text>',
    ]
    for n, (picture, _) in enumerate(pictures):
        x, y = GAP + n % columns * (WIDTH + GAP), HEAD + n // columns * (height + GAP)
        parts.append(picture.replace("<svg ", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{height}" ', 1))
    note = "blue: the mean, with a standard deviation to either side; orange: each seed" if len(results["seeds"]) > 1 else "one seed: no deviation"
    return "\n".join([*parts, f'<text x="{GAP}" y="{total - 14}">{note}</text></svg>\n'])
