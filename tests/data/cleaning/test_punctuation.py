"""Width by company: what changes beside Han characters, between Latin ones, and what never does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.cleaning.punctuation import punctuation


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("如:機械,電器", "如：機械，電器"),
        ("消費主義, 污染和傷害", "消費主義，污染和傷害"),  # the space was the half-width mark's
        ("獲獎 , 原因 在佇 ;", "獲獎 ， 原因 在佇 ；"),  # words stay apart
        ("真好!!真的?!", "真好！！真的？！"),
        ("他說, OK", "他說，OK"),
        ("走了. 後來", "走了。後來"),
        ("走了的人.", "走了的人。"),
        ("「好」,他", "「好」，他"),
        ("在北京(順天府)設置", "在北京（順天府）設置"),
        ("（ 大概 六千 萬 票 ) (大概 五千 萬 票)", "（ 大概 六千 萬 票 ) （大概 五千 萬 票）"),
        ("Obama (歐巴馬) 大勝 (2008 年)", "Obama （歐巴馬） 大勝 （2008 年）"),
        ("他(她(誰))說", "他（她（誰））說"),
        ('他說:"你好",然後走了.', "他說：“你好”，然後走了。"),
        ("這是'好'的", "這是‘好’的"),
        ("臺灣 ê 人,真好", "臺灣 ê 人，真好"),
        ("おば,さん", "おば，さん"),
    ],
)
def test_full_width_beside_han(text, wanted):
    assert punctuation(text)[0] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("有2：1的共振，比率１２．５", "有2:1的共振，比率12.5"),
        ("Hello，world！OK", "Hello, world! OK"),
        ("一共 1，000 人", "一共 1,000 人"),
        ("the GDP（2008）was", "the GDP(2008)was"),
        ("the GDP （PPP） was", "the GDP (PPP) was"),
        ("簽訂 ＥＣＦＡ ，", "簽訂 ECFA ，"),
        ("\u3000\u3000四年\u3000漢玄菟 \u3000郡", "\u3000\u3000四年 漢玄菟 郡"),
    ],
)
def test_half_width_between_latin(text, wanted):
    assert punctuation(text)[0] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "iPhone, 很好",  # between a Latin word and Han text there is no telling
        "比數 3:2，12:30 有 1,234.5 元，75，88%，2005，2006",
        "臺灣(Taiwan)很美（Formosa）",
        "約翰.史密斯 等等...好 我..我",
        "一. 前言",
        "檔案 報告.txt 在 https://x.tw/a,b",
        "tâi-uân ê lâng, --ah bô? T'ai-pei 的 Hawai'i",
        "好:) 壞;)",
        'x = "中文", f("中文"), ["甲", "乙"], {"名": "值"}',
        "print(你好) 好",
        "輸血 ' ' ' ' 的 口白 ()好",
        "我用 iPhone。他用 Pixel！",
        "Plain English, (with) \"quotes\": it's fine; isn't it?",
        "騎⿰オ－ト⿰バイ，鷹揚 － 賞鷹 ＊ ％",
    ],
)
def test_everything_else_stays(text):
    assert punctuation(text) == (text, 0)


def test_a_very_long_line_is_done_in_stretches(monkeypatch):
    text = "好的人,真好! (她) x, y 我說:走.\u3000" * 40
    whole = punctuation(text)
    assert whole[1] == 7 * 40 and whole[0].startswith("好的人，真好！（她） x, y 我說：走。好的人")
    monkeypatch.setattr("graft.data.cleaning.punctuation.LONG_LINE", 50)
    assert punctuation(text) == whole


def test_counts_are_of_marks():
    assert punctuation('他說:"你好",好')[1] == 4
    assert punctuation("ＡＢ\u3000ＣＤ，x")[1] == 4  # two runs, one blank, one mark


@settings(max_examples=500, deadline=None)
@given(st.text("好人ab12é，。（）“”,.!?:;()\"' \u3000\n「」ＡÀ-", max_size=40))
def test_only_marks_and_blanks_change(text):
    """Letters and digits stand as they were, in order; no line is added or lost; twice is as once."""
    result, changes = punctuation(text)

    def letters(t):
        return [c for c in t.replace("Ａ", "A") if c.isalnum() or c in "\n-"]

    assert letters(result) == letters(text)
    assert punctuation(result) == (result, 0)
    assert (changes > 0) == (result != text)
