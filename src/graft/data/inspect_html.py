"""The report of `graft inspect` as one page: no script, nothing from the net, everything from the data escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from graft.data.inspect_bin import RenderedBin, visible
from graft.data.inspect_report import Report, Section

LABEL, WIDTH, LINE = 220, 420, 20  # of a plot, in pixels

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
th { color: #666; font-weight: normal } .n { text-align: right; font-variant-numeric: tabular-nums } .note { color: #666 }
svg { display: block; margin: .8rem 0; max-width: 100% } svg text { font-size: 12px; fill: #444 } svg rect { fill: #3b7dd8 }
.bin { border: 1px solid #ccc; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 13px }
.border { display: block; color: #3b7dd8; border-top: 1px dashed #3b7dd8; margin-top: .4rem; font-size: 12px }
.s { background: #c9efc9 } .u { color: #666 } .s:hover, .u:hover { outline: 1px solid #3b7dd8 }
"""


def page(report: Report) -> str:
    """The whole document."""
    body = [f"<h1>{escape(report.title)}</h1>", *(part for s in report.sections for part in _section(s))]
    body += [part for found in report.bins for part in _bin(found)]
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title><style>{STYLE}</style></head>'
    return head + "\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    if not section.rows:
        yield "<p>none</p>"
        return
    if section.measure:
        yield chart(section.title, [" ".join(row[:1] if row[0] else row[1:2]) for row in section.rows], section.measure)
    numbers = [section.is_number(n) for n in range(len(section.columns))]

    def line(cells: tuple[str, ...], tag: str) -> str:
        said = (f"<{tag}{' class=n' if number else ''}>{escape(visible(cell))}</{tag}>" for cell, number in zip(cells, numbers, strict=True))
        return f"<tr>{''.join(said)}</tr>"

    yield f"<table>{line(section.columns, 'th')}{''.join(line(row, 'td') for row in section.rows)}</table>"
    if section.note:
        yield f"<p class=note>{escape(visible(section.note))}</p>"


def chart(title: str, labels: list[str], values: Sequence[float]) -> str:
    """Horizontal bars as SVG, the longest as wide as the plot; the value shows under the pointer."""
    top = max(values) or 1.0
    rows = []
    for n, (label, value) in enumerate(zip(labels, values, strict=True)):
        short = visible(label if len(label) <= 28 else label[:27] + "…")
        rows.append(
            f'<text x="{LABEL - 8}" y="{n * LINE + 14}" text-anchor="end">{escape(short)}</text>'
            f'<rect x="{LABEL}" y="{n * LINE + 3}" width="{max(value / top * WIDTH, 1 if value else 0):.1f}" height="{LINE - 6}">'
            f"<title>{escape(visible(label))}: {value:,.6g}</title></rect>"
        )
    size = f'width="{LABEL + WIDTH}" height="{len(values) * LINE}" viewBox="0 0 {LABEL + WIDTH} {len(values) * LINE}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" {size}>{"".join(rows)}</svg>'


def _bin(found: RenderedBin) -> Iterator[str]:
    yield f"<h2>Bin {found.number}</h2><p class=note><span class=s>supervised</span>, <span class=u>not supervised</span></p>"
    if found.note:
        yield f"<p class=note>{escape(visible(found.note))}</p>"
    parts = []
    for document in found.documents:
        tokens = sum(len(run.ids) for run in document.runs)
        parts.append(f"<span class=border>{escape(visible(document.source))} · {tokens} tokens</span>")
        for run in document.runs:
            ids = " ".join(map(str, run.ids))
            parts.append(f'<span class={"s" if run.supervised else "u"} title="{ids}">{escape(visible(run.text))}</span>')
    yield f"<div class=bin>{''.join(parts)}<span class=border>padding · {found.padding} tokens</span></div>"
