"""The report as one HTML file: no script, nothing from the net, everything that comes from data escaped.

The content security policy allows this page's own style sheet, by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import errno
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path

from graft.core.artifact import write_text_atomic
from graft.core.errors import ConfigError
from graft.core.stages import CHECKPOINTS, Plan
from graft.report.charts import confusion_chart, histogram_chart, line_chart, share_bar
from graft.report.flat import dollars, duration
from graft.report.gather import gather
from graft.report.tree import Answer, Evaluation, Pair, Picture, Prediction, Report, Sample, Stage, Table, Task, Training

SECTIONS = {"lineage": "Lineage", "data": "Data", "training": "Training", "cost": "Cost", "evaluation": "Evaluation"}
STAGE_COLUMNS = ("stage", "state", "made", "artifact", "made of", "time", "API")
SHORT = 12  # digits of a fingerprint
WRAPPED = 28  # characters of a cell that may have several lines
LONG = 400  # characters of a text that has a card's whole width
TOLD = 20  # marks in words; all are in the charts


def write(plan: Plan, out: Path | None = None) -> Path:
    """Write the recipe's report, whole or not at all, and return where it is: beside its checkpoints where `out` is None.

    Raises ArtifactError where the recipe was never run, ConfigError where the file cannot be written.
    """
    text = page(gather(plan))
    path = Path(out) if out else plan.home(CHECKPOINTS) / "report.html"
    try:
        if out is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder: name a file")
        write_text_atomic(path, text)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"{path} cannot be written ({e.strerror}): name another by --out") from None
    return path


def page(report: Report) -> str:
    """The whole document."""
    style = resources.files("graft.report").joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    parts = {"lineage": _lineage(report), "data": _data(report), "training": _trainings(report), "cost": _cost(report), "evaluation": _evaluation(report.evaluation)}  # fmt: skip
    sections = [f'<section id="{name}"><h2>{SECTIONS[name]}</h2>\n' + "\n".join(part) + "</section>" for name, part in parts.items()]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">',
            f"<title>{escape(report.recipe)} · graft report</title><style>{style}</style></head>",
            "<body>",
            *_head(report),
            "<main>",
            *sections,
            "</main></body></html>\n",
        ]
    )


# ---- head and lineage -------------------------------------------------------------------------------------------------
def _head(report: Report) -> Iterator[str]:
    kind = {True: " good", False: " bad", None: ""}[report.good]
    yield f'<header id="head"><h1>{escape(report.recipe)}</h1>'
    yield f'<p class="verdict{kind}">{escape(report.verdict)}</p>'
    run = f"newest artifact {_when(report.created_unix_s)}" if report.created_unix_s else "no artifact yet"
    commit = f" at commit <code>{escape(report.commit[:SHORT])}</code>" if report.commit else ""
    yield f'<p class="dim">{run} · graft {escape(report.graft)}{commit} · workspace <code>{escape(report.workspace)}</code> · page of {_when(report.made_unix_s)}</p>'
    yield "<nav>" + "".join(f'<a href="#{name}">{text}</a>' for name, text in SECTIONS.items()) + "</nav></header>"


def _lineage(report: Report) -> Iterator[str]:
    done = sum(s.state == "complete" for s in report.stages)
    yield f'<p class="note">{done} of {len(report.stages)} stages are complete. From the API’s ledger to the adapter, each made of those named beside it.</p>'
    head = "".join(f"<th>{name}</th>" for name in STAGE_COLUMNS)
    rows = [_stage_row(s) for s in report.stages]
    if report.ledger:
        told = dict(report.ledger)
        rows.insert(0, _row("API ledger", "", escape(_ledger_line(told)), "", "", "", ""))
    yield _scroll("lineage", f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>')
    yield '<div class="stages">'
    for stage in report.stages:
        if stage.state == "complete":
            yield from _stage_details(stage)
    yield "</div>"


def _ledger_line(told: dict[str, str]) -> str:
    said = [told.get("endpoint", ""), *(f"{told[k]} {k}" for k in ("requests", "retries") if k in told)]
    return ", ".join([s for s in said if s] + ([f"{told['spent by this recipe so far']} so far"] if "spent by this recipe so far" in told else []))


def _stage_row(s: Stage) -> str:
    parents = ", ".join(f"{name} <code>{escape(f[:8])}</code>" for name, f in ((escape(n), f) for n, f in s.parents))
    artifact = f"<code>{escape(s.fingerprint[:SHORT])}</code>" if s.state == "complete" else ""
    state = {"complete": "✓ ", "damaged": "✗ "}.get(s.state, "") + s.state
    time, usd = duration(s.wall_s) if s.wall_s is not None else "", dollars(s.usd) if s.usd is not None else ""
    return _row(escape(s.name), f'<span class="{s.state.split()[0]}">{state}</span>', escape(s.note), artifact, parents, time, usd)


def _row(*cells: str) -> str:
    """A row of the lineage; a narrow screen shows it as a block, each cell after its column's name."""
    kinds = ("", "", "wide", "", "wide", "time", "time")
    said = (
        f'<td data-column="{column}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{cell}</td>'
        for column, kind, cell in zip(STAGE_COLUMNS, kinds, cells, strict=True)
    )
    return f"<tr>{''.join(said)}</tr>"


def _stage_details(s: Stage) -> Iterator[str]:
    made = f"made {_when(s.created_unix_s)}" if s.created_unix_s else ""
    yield f"<details><summary>{escape(s.name)} in full</summary><div>"
    yield f'<p class="note"><code>{escape(s.path)}</code>, {made} by graft {escape(s.graft)} {f"<code>{escape(s.commit[:SHORT])}</code>" if s.commit else ""}</p>'
    own = (("fingerprint", s.fingerprint), ("digest of its files", s.digest), *((f"of {name}", f) for name, f in s.parents))
    for title, pairs in (("identity", own), ("inputs", s.inputs), ("recipe keys", s.keys), ("counts", s.counts)):
        if pairs:
            yield f'<h4>{title}</h4><div class="pairs">{"".join(f"<p><span>{escape(k)}</span> {escape(v)}</p>" for k, v in pairs)}</div>'
    yield "</div></details>"


# ---- data, training, cost ---------------------------------------------------------------------------------------------
def _data(report: Report) -> Iterator[str]:
    if not report.data and not report.lengths:
        yield "<p>No data stage is complete.</p>"
        return
    yield '<div class="tables">'
    for table in report.data:
        yield f"<section>{_table(table)}</section>"
    yield "</div>"
    if report.samples:
        yield f'<h4>Images of the training data</h4><div class="samples">{"".join(map(_sample, report.samples))}</div>'
    yield '<div class="charts">'
    for h in report.lengths:
        yield _figure(h.title, "", histogram_chart(h), below=h.note)
    yield "</div>"


def _sample(s: Sample) -> str:
    said = f'<p class="dim">{escape(s.source)}</p><p class="text" dir="auto">{escape(s.question)}</p><p class="text" dir="auto"><b>{escape(s.answer)}</b></p>'
    return f"<div>{_picture(s.picture)}{said}</div>"


def _trainings(report: Report) -> Iterator[str]:
    if not report.trainings:
        yield "<p>No training stage has taken a step.</p>"
    for t in report.trainings:
        yield from _training(t)


def _training(t: Training) -> Iterator[str]:
    yield f"<h3>{escape(t.stage)}{'' if t.complete else f', not complete: {t.steps:,} of {t.total_steps:,} steps'}</h3>"
    yield _pairs(t.facts)
    yield '<div class="charts">'
    for chart in t.charts:
        legend = "".join(f'<span class="legend c{n}">{escape(s.name)}</span>' for n, s in enumerate(chart.series)) if len(chart.series) > 1 else ""
        yield _figure(
            chart.title,
            chart.unit,
            line_chart(f"{t.stage}: {chart.title}", chart.series, t.marks, from_zero=chart.from_zero, noisy=chart.noisy),
            legend,
        )
    yield "</div>"
    if t.marks:
        told = "".join(f"<li>{escape(m.text)}</li>" for m in t.marks[:TOLD])
        rest = f'<p class="note">{len(t.marks) - TOLD} more are in the charts.</p>' if len(t.marks) > TOLD else ""
        yield f"<h4>Steps left out, and pauses</h4><ul>{told}</ul>{rest}"


def _cost(report: Report) -> Iterator[str]:
    cost = report.cost
    hours = f"{cost.device_hours:,.2f}" if cost.device_hours >= 1 or not cost.device_hours else f"{cost.device_hours:.4f}"
    spent = dict(cost.api).get("spent by this recipe so far")
    yield f"<p>{f'API: <b>{escape(spent)}</b>. ' if spent else ''}Training: <b>{hours}</b> {'GPU' if cost.gpu else 'process'} hours in steps.</p>"
    if cost.api:
        yield f"<h4>API</h4>{_pairs(cost.api)}"
    if cost.devices.rows:
        yield _table(cost.devices)


# ---- evaluation -------------------------------------------------------------------------------------------------------
def _evaluation(e: Evaluation | None) -> Iterator[str]:
    if e is None:
        yield "<p>The recipe’s adapter was not evaluated yet.</p>"
        return
    if e.rows:
        yield f'<p class="note">{e.rows:,} held-out rows, {e.failures:,} answered wrong.</p>'
    yield '<div class="tables">'
    if e.scores:
        yield f"<section>{_table(e.scores)}</section>"
    if e.confusion:
        told = "rows: what is true; columns: predicted; the stronger the colour, the larger the share of the row"
        yield f'<section class="confusion"><h4>Confusion matrix</h4><figure>{confusion_chart(e.confusion)}<figcaption>{told}</figcaption></figure></section>'
    for table in (e.families, e.others):
        if table:
            yield f"<section>{_table(table)}</section>"
    yield "</div>"
    for task in e.tasks:
        yield from _task(task)
    if not e.rows:
        return
    for title, shown, none in (("Worst predictions", e.worst, "None was wrong."), ("Best predictions", e.best, "None was right.")):
        yield f"<h3>{title}</h3>" + ("" if shown else f"<p>{none}</p>")
        for p in shown:
            yield _prediction(p)


def _prediction(p: Prediction) -> str:
    judged = f"true <b>{escape(p.label)}</b>, predicted <b>{escape(p.predicted)}</b>"
    facts = [judged, *([escape(p.reason)] if p.reason else []), *([f"score {p.score:.4g}"] if p.score is not None else [])]
    return _card(p.id, p.right, facts, (("prompt", p.prompt), ("answer", p.answer), ("wanted", p.wanted)))


def _task(t: Task) -> Iterator[str]:
    yield f'<h3>Task {escape(t.name)}</h3><p class="note">{escape(t.note)}</p>'
    tables = [_table(table) for table in (t.means, t.by_question) if table]
    yield f'<div class="tables">{"".join(f"<section>{table}</section>" for table in tables)}</div>' if len(tables) > 1 else tables[0]
    for title, shown in (("worst", t.worst), ("best", t.best)):
        if shown:
            yield f"<details><summary>The {len(shown)} {title}</summary><div>{''.join(map(_answer, shown))}</div></details>"


def _answer(a: Answer) -> str:
    return _card(a.id, a.right, [escape(a.judged)], a.sides, a.code, a.pictures)


def _card(name: str, right: bool | None, facts: list[str], sides: Sequence[Pair], code: bool = False, pictures: Sequence[Picture] = ()) -> str:
    """One prediction. facts: HTML; sides: a title and a text each; code, pictures: as of an Answer."""
    shown = ""
    for n, (title, text) in enumerate(sides):
        said = f'<div class="text" dir="auto">{escape(text)}</div>' if text else '<div class="empty">empty</div>'
        side = f"<h5>{escape(title)}</h5>{said}"
        if n == 0 and pictures:
            shown += f'<div class="long asked"><div>{side}</div><div class="pictures">{"".join(map(_picture, pictures))}</div></div>'
        else:
            shown += f'<div class="{"code" if code and n else "long" if len(text) > LONG else "short"}">{side}</div>'
    kind, mark = {True: (" right", "✓ "), False: ("", "✗ "), None: (" graded", "")}[right]
    told = " · ".join([*facts, f"<code>{escape(name)}</code>"])
    return f'<article class="prediction{kind}"><p class="dim">{mark}{told}</p><div class="sides">{shown}</div></article>'


def _picture(p: Picture) -> str:
    """The thumbnail with its name and size, or the line of why there is none."""
    if not p.data:
        return f'<p class="empty">{escape(p.name)}: {escape(p.wrong)}</p>'
    image = f'<img src="{escape(p.data)}" alt="{escape(p.alt)}" width="{p.width}" height="{p.height}">'
    return f"<figure>{image}<figcaption>{escape(p.name)}, {escape(p.size)}</figcaption></figure>"


# ---- parts ------------------------------------------------------------------------------------------------------------
def _table(table: Table) -> str:
    """A table in a box of its own that scrolls, so that the page does not."""

    def line(cells: Sequence[str], tag: str, share: str) -> str:
        kinds = [' class="n"' if n in table.numbers else ' class="wide"' if len(cell) > WRAPPED else "" for n, cell in enumerate(cells)]
        said = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{said}{share}</tr>"

    bars = [f'<td class="share-cell">{share_bar(s)}</td>' for s in table.shares] or [""] * len(table.rows)
    head = line(table.columns, "th", "<th></th>" if table.shares else "")
    body = "".join(line(row, "td", bar) for row, bar in zip(table.rows, bars, strict=True))
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<h4>{escape(table.title)}</h4>" + _scroll(table.title, f"<table><thead>{head}</thead><tbody>{body}</tbody></table>") + note


def _scroll(name: str, inner: str) -> str:
    return f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">{inner}</div>'


def _pairs(pairs: Sequence[Pair]) -> str:
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in pairs)}</dl>"


def _figure(title: str, unit: str, chart: str, legend: str = "", below: str = "") -> str:
    note = f'<p class="note">{escape(below)}</p>' if below else ""
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(unit)}{legend}</figcaption>{chart}{note}</figure>"


def _when(unix_s: float | None) -> str:
    return datetime.fromtimestamp(unix_s or 0, UTC).strftime("%Y-%m-%d %H:%M UTC")
