"""Cuts: nothing is lost, bounds hold, and they fall where a reader would pause."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.cleaning.segments import segment

PROSE = st.lists(
    st.sampled_from(["好", "的人", "word ", "a.b ", "e.g. ", "說。」", "嗎？", "!", "，", "\n", "\n\n", " ", "3.5", "O\u0358", "Dr. "]), max_size=120
)


@settings(max_examples=500, deadline=None)
@given(PROSE.map("".join) | st.text("ab。 \n，", max_size=200), st.integers(0, 30), st.integers(1, 60))
def test_nothing_is_lost_and_bounds_hold(text, low, high):
    pieces = segment(text, low, high)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(p) <= high and p == p.strip() for p in pieces)
    at = 0
    spans = []
    for p in pieces:
        at = text.index(p, at)
        spans.append((at, at + len(p)))
        at += len(p)
    for (a, b), (c, d) in pairwise(spans):
        assert text[b:c].strip() == ""
        assert min(b - a, d - c) >= low or d - a > high, "a short piece that could be joined"


@settings(max_examples=300, deadline=None)
@given(st.text("ab好。，", max_size=400), st.integers(0, 30), st.integers(0, 40))
def test_no_short_piece_where_there_is_room(text, low, more):
    high = max(2 * low + more, 1)
    pieces = segment(text, low, high)
    assert len(text) < low or all(len(p) >= low for p in pieces)


@pytest.mark.parametrize(
    ("text", "low", "high", "wanted"),
    [
        ("短文", 100, 2048, ["短文"]),
        ("  ", 1, 9, []),
        ("long " * 9, 0, None, [("long " * 9).strip()]),
        ("第一段文字。又一句。\n\n第二段。\n第三段的文字。", 3, 16, ["第一段文字。又一句。", "第二段。\n第三段的文字。"]),
        ("甲甲甲。\n乙乙乙。丙丙丙。", 2, 10, ["甲甲甲。", "乙乙乙。丙丙丙。"]),
        ("他說：「走吧。」我們就走了。後來", 4, 12, ["他說：「走吧。」", "我們就走了。後來"]),
        ("甲甲甲，乙乙乙，丙丙丙丁丁丁", 2, 9, ["甲甲甲，乙乙乙，", "丙丙丙丁丁丁"]),
        ("Dr. Lin paid 3.5 dollars. He left. Mr. Chen", 5, 40, ["Dr. Lin paid 3.5 dollars. He left.", "Mr. Chen"]),
        ("we met Mr. Chen there", 3, 14, ["we met Mr.", "Chen there"]),  # no sentence end: a space
        ("甲" * 10, 2, 4, ["甲" * 4, "甲" * 4, "甲" * 2]),
        ("甲" * 9, 2, 4, ["甲" * 4, "甲" * 3, "甲" * 2]),  # the rest is left long enough
        ("aaO\u0358O\u0358O\u0358", 1, 3, ["aa", "O\u0358", "O\u0358", "O\u0358"]),  # a letter keeps its mark
    ],
)
def test_cuts(text, low, high, wanted):
    assert segment(text, low, high) == wanted


def test_a_long_text_takes_linear_time():
    import time

    def cost(n):
        begin = time.process_time()
        assert len(segment("好" * n, 100, 2048)) > 1 and len(segment(("好" * 99 + "\n") * (n // 100), 100, 2048)) > 1
        return time.process_time() - begin

    cost(50_000)
    small, large = min(cost(200_000) for _ in range(3)), min(cost(800_000) for _ in range(3))
    assert large < 12 * small, "four times the text"
