"""Line charts, histograms and a confusion matrix as inline SVG: no script, colours by the page's classes.

A curve of any length is drawn by the lowest and the highest point of every pixel column, so a spike of one step shows and 100,000 steps
are some 10 kB. 100,000 points take 0.25 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from graft.report.tree import Confusion, Histogram, Mark, Series, Spread

WIDTH, HEIGHT = 420, 220  # user units; the page scales, on a phone to 0.85
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 10, 36
ACROSS, DOWN = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
BANDS = 60  # places under the pointer that tell their values
COLUMNS = 6 * BANDS  # of a curve that is thinned: a band has whole columns, so what it tells is exact
DOTS = 40  # points at most that have a dot each
NAMED = 18  # characters of a row's name beside a spread
SMOOTHED = 120  # points at least that get a smoothed curve over them

Points = list[tuple[float, float]]
Scale = Callable[[float], float]


# ---- scales -----------------------------------------------------------------------------------------------------------
def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low .. high; low < high."""
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if n == 0 else float(f"{n * step:.12g}") for n in range(first, last + 1)]


def said(value: float) -> str:
    """A number for people, in at most some six characters: 0.405, 12.4k, 2e-4."""
    size = abs(value)
    if size >= 1e3:
        for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit * 0.9995:
                return f"{value / unit:.4g}{name}" if size < unit * 1e3 else f"{value:.3g}"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def span(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    """The ends of an axis over `values`, never equal."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high * 1.05, 0.0)  # room over what is flat
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        return (0.0, room) if from_zero and high == 0 else (low - (0 if from_zero else room), high + room)
    return low, high


# ---- thinning ---------------------------------------------------------------------------------------------------------
def thinned(series: Series, low: float, high: float, columns: int = COLUMNS) -> list[Points]:
    """The points to draw, as runs with a gap between them where nothing is known.

    Up to two points a column all are kept; else the lowest and the highest of each column, in their order, and the first and last of all.
    A column without any number parts two runs.
    """
    runs: list[Points] = [[]]
    pairs = [(x, y if y is not None and math.isfinite(y) else None) for x, y in zip(series.xs, series.ys, strict=True)]
    if len(pairs) <= 2 * columns:
        for x, y in pairs:
            if y is None:
                runs.append([])
            else:
                runs[-1].append((x, y))
        return [run for run in runs if run]
    scale = columns / ((high - low) or 1.0)
    found: dict[int, Points] = {}
    for pair in pairs:
        column = found.setdefault(min(columns - 1, int((pair[0] - low) * scale)), [])
        if pair[1] is not None:
            column.append((pair[0], pair[1]))
    for column in found.values():
        if not column:
            runs.append([])
            continue
        ends = {min(column, key=_height), max(column, key=_height)}
        ends |= {point for point in (column[0], column[-1]) if point in (pairs[0], pairs[-1])}
        runs[-1] += sorted(ends)
    return [run for run in runs if run]


def _height(point: tuple[float, float]) -> float:
    return point[1]


def smoothed(series: Series) -> Series:
    """A mean over the fiftieth of the points around each, at least 11, which lags behind no fall."""
    half = max(5, len(series.ys) // 100)
    sums, counts = [0.0], [0]
    for y in series.ys:
        known = y if y is not None and math.isfinite(y) else None
        sums.append(sums[-1] + (known or 0.0))
        counts.append(counts[-1] + (known is not None))
    ys: list[float | None] = []
    for n in range(len(series.ys)):
        first, last = max(0, n - half), min(len(series.ys), n + half + 1)
        count = counts[last] - counts[first]
        ys.append((sums[last] - sums[first]) / count if count else None)
    return Series(series.name, series.xs, tuple(ys))


# ---- charts -----------------------------------------------------------------------------------------------------------
def line_chart(
    title: str, series: Sequence[Series], marks: Sequence[Mark] = (), unit_x: str = "step", from_zero: bool = False, noisy: bool = True
) -> str:
    """Curves over a common axis; where one is long and noisy, its moving mean lies over it. Without any number: a line that says so."""
    known = [y for s in series for y in s.ys if y is not None and math.isfinite(y)]
    xs = [x for s in series for x in (s.xs[:1] + s.xs[-1:])]
    if not known:
        return _svg(title, f'<text class="none" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no numbers</text>')
    (low_x, high_x), (low, high) = span(xs), span(known, from_zero)
    place_x, place_y = _to(low_x, high_x, LEFT, LEFT + ACROSS), _to(low, high, TOP + DOWN, TOP)
    parts = _axes(low_x, high_x, low, high, unit_x)
    for mark in marks:
        at = f"{place_x(mark.x):.1f}"
        kind = "skip" if mark.kind == "left out" else "pause"
        parts.append(f'<path class="mark {kind}" d="M{at} {TOP}v{DOWN}"><title>{escape(mark.text)}</title></path>')
    drawn: list[tuple[str, list[Points]]] = []
    for n, one in enumerate(series):
        runs = thinned(one, low_x, high_x)
        drawn.append((one.name, runs))
        long = noisy and len(one.ys) >= SMOOTHED
        parts.append(f'<path class="line c{n}{" faint" if long else ""}" d="{_path(runs, place_x, place_y)}"/>')
        if long:
            parts.append(f'<path class="line c{n}" d="{_path(thinned(smoothed(one), low_x, high_x), place_x, place_y)}"/>')
        dots = [p for run in runs for p in run if len(one.ys) <= DOTS or len(run) == 1]
        parts += [f'<circle class="c{n}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.2"/>' for x, y in dots]
    parts += _hovers(drawn, low_x, high_x, unit_x)
    last = ", ".join(f"{s.name} ends at {said(y)}" for s in series if (y := next((y for y in reversed(s.ys) if y is not None), None)) is not None)
    return _svg(f"{title}: {last}", "".join(parts))


def histogram_chart(histogram: Histogram) -> str:
    """Upright bars between their edges, the range and the count under the pointer."""
    if not sum(histogram.counts):
        return _svg(histogram.title, f'<text class="none" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">nothing to count</text>')
    low, high, top = histogram.edges[0], histogram.edges[-1], max(histogram.counts)
    place_x, place_y = _to(low, high, LEFT, LEFT + ACROSS), _to(0, top, TOP + DOWN, TOP)
    parts = _axes(low, high, 0, top, histogram.unit, whole=True)
    for a, b, n in zip(histogram.edges[:-1], histogram.edges[1:], histogram.counts, strict=True):
        x, y = place_x(a), place_y(n)
        size = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(0.5, place_x(b) - x - 1):.1f}" height="{TOP + DOWN - y:.1f}"'
        parts.append(f'<rect class="bar" {size}/>')
        over = f'x="{x:.1f}" y="{TOP}" width="{place_x(b) - x:.1f}" height="{DOWN}"'  # a low bar too is found by the pointer
        parts.append(f'<rect class="over" {over}><title>{said(a)}–{said(b)} {escape(histogram.unit)}: {n:,}</title></rect>')
    return _svg(histogram.title, "".join(parts))


def confusion_chart(confusion: Confusion) -> str:
    """Counts by what is true (rows) and predicted (columns), as dark as their share of the row."""
    side, left, top = 46, 86, 26
    across = (WIDTH - left - RIGHT) / max(1, len(confusion.predicted))
    parts = []
    for x, name in enumerate(confusion.predicted):
        parts.append(f'<text x="{left + (x + 0.5) * across:.1f}" y="{top - 8}" text-anchor="middle">{escape(name)}</text>')
    for y, (label, row) in enumerate(zip(confusion.labels, confusion.counts, strict=True)):
        parts.append(f'<text x="{left - 8}" y="{top + y * side + side / 2 + 4}" text-anchor="end">{escape(label)}</text>')
        for x, n in enumerate(row):
            share = n / max(1, sum(row))
            right = confusion.predicted[x] == label
            box = f'x="{left + x * across:.1f}" y="{top + y * side}" width="{across - 2:.1f}" height="{side - 2}"'
            parts.append(f'<rect class="under" {box}/><rect class="{"right" if right else "wrong"}" fill-opacity="{share:.2f}" {box}>')
            parts.append(f"<title>{escape(label)} taken for {escape(confusion.predicted[x])}: {n:,}, {share:.1%} of the row</title></rect>")
            middle = f'x="{left + (x + 0.5) * across - 1:.1f}" y="{top + y * side + side / 2 + 4}" text-anchor="middle"'
            parts.append(f'<text class="count{" on" if share > 0.5 else ""}" {middle}>{n:,}</text>')
    height = top + side * len(confusion.labels)
    said_of = "; ".join(
        f"{label}: " + ", ".join(f"{n} {p}" for p, n in zip(confusion.predicted, row, strict=True))
        for label, row in zip(confusion.labels, confusion.counts, strict=True)
    )
    return _svg(f"confusion matrix, true by predicted: {said_of}", "".join(parts), height)


def spread_chart(title: str, spreads: Sequence[Spread]) -> tuple[str, int]:
    """(picture, its height): a row each, with every run as a small dot, their mean as a large one, a bar of a standard deviation to either side.

    A row whose mean is not finite has its name alone, and what it is.
    """
    row, left, right, top = 28, 12 + 7 * min(NAMED, max(len(s.name) for s in spreads)), 112, 26
    finite = [s for s in spreads if math.isfinite(s.mean)]
    low, high = span([v for s in finite for v in (*s.each, s.mean - (s.std or 0), s.mean + (s.std or 0))])
    place = _to(low, high, left + 8, WIDTH - right - 8)
    bottom = top + row * len(spreads)
    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    for value, text in _labelled(ticks(low, high, 4)):
        x = f"{place(value):.1f}"
        parts.append(f'<path class="grid" d="M{x} {top}V{bottom}"/><text x="{x}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    for n, s in enumerate(spreads):
        y = top + row * n + row / 2
        name = s.name if len(s.name) <= NAMED else f"{s.name[: NAMED - 1]}…"
        parts.append(f'<text class="arm" x="{left - 6}" y="{y + 4}" text-anchor="end">{escape(name)}<title>{escape(s.name)}</title></text>')
        if s in finite:
            parts += _spread(s, place, y)
        parts.append(f'<text class="told" x="{WIDTH}" y="{y + 4}" text-anchor="end">{figure(s.mean, s.std)}</text>')
    told = "; ".join(f"{s.name} {figure(s.mean, s.std)}" for s in spreads)
    height = bottom + 24
    return _svg(f"{title}: {told}", "".join(parts), height), height


def _spread(s: Spread, place: Scale, y: float) -> list[str]:
    parts = []
    if s.std is not None:
        a, b = place(s.mean - s.std), place(s.mean + s.std)
        parts.append(f'<path class="bar" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}v10M{b:.1f} {y - 5}v10"/>')
    if len(s.each) > 1:
        parts += [f'<circle class="one" cx="{place(v):.1f}" cy="{y}" r="2.4"/>' for v in s.each]
    return [*parts, f'<circle class="mean" cx="{place(s.mean):.1f}" cy="{y}" r="4.2"/>']


def figure(mean: float, std: float | None = None) -> str:
    """0.3120 ± 0.0041, and without a deviation the mean alone."""
    digits = 4 if abs(mean) < 10 else 2
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def share_bar(share: float) -> str:
    """A bar for a cell of a table; what it says stands beside it."""
    width = 100 * min(1.0, max(0.0, share))
    return f'<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="under" width="100" height="10"/><rect class="bar" width="{width:.1f}" height="10"/></svg>'


def _svg(label: str, body: str, height: int = HEIGHT) -> str:
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height}">{body}</svg>'


def _to(low: float, high: float, start: float, end: float) -> Scale:
    scale = (end - start) / ((high - low) or 1.0)
    return lambda value: start + (value - low) * scale


def _axes(low_x: float, high_x: float, low: float, high: float, unit_x: str, whole: bool = False) -> list[str]:
    """whole: of the y axis whole numbers alone are named, as of the steps."""
    place_x, place_y = _to(low_x, high_x, LEFT, LEFT + ACROSS), _to(low, high, TOP + DOWN, TOP)
    parts = []
    for value, text in _labelled([t for t in ticks(low, high) if not whole or t == int(t)]):
        y = f"{place_y(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}h{ACROSS}"/><text x="{LEFT - 5}" y="{float(y) + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in _labelled([t for t in ticks(low_x, high_x) if unit_x != "step" or t == int(t)]):
        x = place_x(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP + DOWN}v4"/><text x="{x:.1f}" y="{TOP + DOWN + 16}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP + DOWN}h{ACROSS}"/>')
    parts.append(f'<text class="unit" x="{LEFT + ACROSS}" y="{HEIGHT - 4}" text-anchor="end">{escape(unit_x)}</text>')
    return parts


def _labelled(values: list[float]) -> list[tuple[float, str]]:
    """Each tick with its label: the short forms, or all written out where these differ in kind and fit, or where two are the same."""
    short, plain = [said(v) for v in values], [f"{v:.6g}" for v in values]
    mixed = any("e" in t for t in short) and max(map(len, plain)) <= 6
    return list(zip(values, plain if mixed else short if len(set(short)) == len(short) else [f"{v:,.10g}" for v in values], strict=True))


def _path(runs: list[Points], place_x: Scale, place_y: Scale) -> str:
    return "".join("M" + "L".join(f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in run) for run in runs)


def _hovers(drawn: list[tuple[str, list[Points]]], low: float, high: float, unit_x: str) -> list[str]:
    """Bands over the plot, each with the lowest and the highest value below it as a title."""
    bands: dict[int, dict[str, tuple[float, float]]] = {}
    ends: dict[int, tuple[float, float]] = {}
    width = (high - low) / BANDS
    for name, runs in drawn:
        for x, y in (point for run in runs for point in run):
            band = min(BANDS - 1, int((x - low) / width))
            here = bands.setdefault(band, {})
            a, b = here.get(name, (y, y))
            here[name] = (min(a, y), max(b, y))
            first, last = ends.get(band, (x, x))
            ends[band] = (min(first, x), max(last, x))
    parts = []
    for band, here in sorted(bands.items()):
        first, last = ends[band]
        where = f"{unit_x} {first:,.0f}" + (f"–{last:,.0f}" if last > first else "")
        values = "; ".join(f"{name} {said(a)}" + (f" to {said(b)}" if said(a) != said(b) else "") for name, (a, b) in here.items())
        box = f'x="{LEFT + band * ACROSS / BANDS:.1f}" y="{TOP}" width="{ACROSS / BANDS:.1f}" height="{DOWN}"'
        parts.append(f'<rect class="over" {box}><title>{escape(f"{where}: {values}")}</title></rect>')
    return parts
