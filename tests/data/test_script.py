"""Units by script, and the share of a language in them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.augment.novelty import HAN
from graft.data.script import Units, language_share, units


@given(st.text("好臺体ㄚんオ한éaZñЖ1_-. \u0301\u0358，𪜶", max_size=30))
def test_units_are_what_one_pattern_finds(text):
    kana = r"[\u3041-\u30FF\uAC00-\uD7A3]"
    pattern = re.compile(rf"(?P<han>{HAN.pattern})|(?P<kana>{kana})|(?P<word>(?:(?!{HAN.pattern}|{kana})[^\W\d_])+)")
    kinds = [
        ("latin" if re.match("[A-Za-z\u00c0-\u024f]", m[0]) else "other") if m.lastgroup == "word" else m.lastgroup for m in pattern.finditer(text)
    ]
    han, latin = kinds.count("han"), kinds.count("latin")
    assert units(text) == Units(han, latin, len(kinds) - han - latin)


@pytest.mark.parametrize(
    ("text", "zh", "hant", "en"),
    [
        ("民主黨 總統 候選人 Obama 四日", 10 / 11, 10 / 11, 1 / 11),  # Taiwanese in Han characters
        ("Tâi-uân ê lâng", 0, 0, 1),  # and in Latin letters
        ("请画一只狗", 1, 0, 0),
        ("請畫一隻狗", 1, 1, 0),
        ("请画一隻狗 a b 畫", 6 / 8, 6 / 8 * 2 / 4, 2 / 8),
        ("これは日本語", 1 / 2, 1 / 2, 0),
        ("Привет abc", 0, 0, 1 / 2),
        ("12 + 3 = ?", 1, 1, 1),
        ("", 1, 1, 1),
    ],
)
def test_share(text, zh, hant, en):
    assert [language_share(text, x) for x in ("zh", "zh-Hant", "en", "any")] == pytest.approx([zh, hant, en, 1])
