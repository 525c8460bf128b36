import math
from xml.etree import ElementTree

import pytest

from graft.report.charts import COLUMNS, confusion_chart, histogram_chart, line_chart, said, smoothed, span, thinned, ticks
from graft.report.tree import Confusion, Histogram, Mark, Series


def series(ys, name="loss"):
    return Series(name, tuple(range(len(ys))), tuple(ys))


def svg(text):
    return ElementTree.fromstring(text)


def titles(text):
    return [t.text for t in svg(text).iter("title")]


def test_thinning_keeps_every_columns_extremes_and_the_ends():
    ys = [math.sin(n / 3000) for n in range(100_000)]
    ys[41_417], ys[77_003] = 9.0, -9.0
    (run,) = thinned(series(ys), 0, 99_999)
    assert len(run) <= 2 * COLUMNS + 2
    assert (41_417, 9.0) in run and (77_003, -9.0) in run and run[0][0] == 0 and run[-1][0] == 99_999
    assert run == sorted(run) and set(run) <= set(enumerate(ys))
    width = 99_999 / COLUMNS
    for column in range(0, COLUMNS, 37):
        there = [y for x, y in enumerate(ys) if min(COLUMNS - 1, int(x / width)) == column]
        kept = [y for x, y in run if min(COLUMNS - 1, int(x / width)) == column]
        assert (min(kept), max(kept)) == (min(there), max(there))


def test_a_short_curve_keeps_all_its_points_and_breaks_where_nothing_is_known():
    assert thinned(series([1, 2, None, 3, math.nan, None, 4]), 0, 6) == [[(0, 1), (1, 2)], [(3, 3)], [(6, 4)]]
    assert thinned(series([]), 0, 1) == [] == thinned(series([None, None]), 0, 1)


def test_a_gap_of_whole_columns_parts_a_long_curve():
    ys = [None if 40_000 <= n < 50_000 else 1.0 for n in range(100_000)]
    before, after = thinned(series(ys), 0, 99_999)
    assert before[-1][0] < 40_000 <= 50_000 <= after[0][0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.03, 0.11, [0.04, 0.06, 0.08, 0.1]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.405, "0.405"), (2e-4, "2e-4"), (12_400, "12.4k"), (1e6, "1M"), (999_999, "1M"), (-1500, "-1.5k"), (3, "3")]
)
def test_numbers_for_people(value, text):
    assert said(value) == text


@pytest.mark.parametrize("values", [[], [0], [3.0], [5, 5, 5], [-2, -2], [1e-9, 1e-9]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_an_axis_always_has_a_length(values, from_zero):
    low, high = span(values, from_zero)
    assert low < high and all(low <= v <= high for v in values) and ticks(low, high)


def test_an_empty_series_says_so_and_one_point_is_a_dot():
    for nothing in ([], [None, None], [math.nan]):
        assert "no numbers" in line_chart("Loss", [series(nothing)])
    assert "no numbers" in line_chart("Loss", [])
    chart = svg(line_chart("Loss", [series([2.5])]))
    (dot,) = chart.iter("circle")
    assert 0 < float(dot.get("cx")) < 420 and 0 < float(dot.get("cy")) < 220


def test_values_show_under_the_pointer_and_marks_are_told():
    chart = line_chart("Loss", [series([4, 3, 2]), Series("validation", (2,), (2.5,))], [Mark(1, "left out", "step 1 was left out: <nan>")])
    assert "step 2: loss 2; validation 2.5" in titles(chart) and "step 1 was left out: <nan>" in titles(chart)
    assert svg(chart).get("aria-label") == "Loss: loss ends at 2, validation ends at 2.5"


def test_100_000_steps_are_small_and_all_is_within_the_picture():
    chart = line_chart("Loss", [series([math.exp(-n / 1e4) + (n % 7) / 50 for n in range(100_000)])])
    assert len(chart) < 60_000
    for path in (p for p in svg(chart).iter("path") if "line" in p.get("class")):
        points = [tuple(map(float, p.split())) for p in path.get("d").strip("M").replace("M", "L").split("L")]
        assert all(0 <= x <= 420 and 0 <= y <= 220 for x, y in points)


def test_a_moving_mean_is_of_what_is_known():
    assert smoothed(series([1.0] * 50 + [None] + [1.0] * 50)).ys == (1.0,) * 101
    flat = smoothed(series([float(n % 2) for n in range(1000)])).ys
    assert all(abs(y - 0.5) < 0.05 for y in flat if y is not None)


def test_histogram_and_confusion_tell_every_count():
    told = titles(histogram_chart(Histogram("lengths", "tokens", (0.0, 4.0, 8.0), (3, 1_000))))
    assert told == ["0–4 tokens: 3", "4–8 tokens: 1,000"]
    assert "nothing to count" in histogram_chart(Histogram("lengths", "tokens", (0.0, 1.0), (0,)))
    matrix = confusion_chart(Confusion(("call", "<b>"), ("call", "<b>", "malformed"), ((8, 2, 0), (0, 0, 0))))
    assert titles(matrix)[0] == "call taken for call: 8, 80.0% of the row" and len(titles(matrix)) == 6
    assert [t.text for t in svg(matrix).iter("text") if "count" in (t.get("class") or "")] == ["8", "2", "0", "0", "0", "0"]
