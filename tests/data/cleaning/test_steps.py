"""The steps on characters and lines: what each changes and leaves, on short texts; twice is as once on made ones."""

import itertools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.sections import CLEANING
from graft.data.cleaning.document import STEPS

PIECES = [  # what the steps look for, whole and in parts
    *"好的壹年a1éＡ５，。？「」（）()\"',.!?:; \t\u3000\n\r\u2028/-[]",
    *("\n\n", "  ", "...", "tâi-uân", "Ta\u030d", "O\u0358", "e\u0301", "\u200b", "\u200d", "\ufeff", "\u202e", "\ue000", "\x85", "👩", "❤\ufe0f"),
    *(
        "http",
        "https://a.bc",
        "://",
        "www.",
        "x.com",
        "<",
        ">",
        "12",
        "\n3\n",
        "第3頁",
        "Page ",
        "- 4 -",
        "（三）",
        "重複的一行文字在此\n",
        "A long line\n",
    ),
    *("Ã", "©", "â€", "å°ç£", "鍙版咕", "锟斤拷", "\ufffd", "Â", "\x81"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


@pytest.mark.parametrize("name", CLEANING)
@settings(max_examples=400, deadline=None)
@given(text=TEXTS | st.text(max_size=40))
def test_twice_is_as_once(name, text):
    once, changes = STEPS[name](text)
    assert (changes > 0) == (once != text)
    assert STEPS[name](once) == (once, 0)


def test_every_step_of_the_recipe_is_there():
    assert tuple(STEPS) == CLEANING


# ---- mojibake --------------------------------------------------------------------------------------------------------
RIGHT = [
    "臺灣的綠能科技，得著世界肯定。",
    "Góa bē-hiáu kóng Tâi-gí, m̄-koh góa ài tha̍k-chheh; siaⁿ-tiāu, O͘-á",
    "Grüße aus Köln: »MENÜ« und „schön“, 5 € für Ärger",
    "À la carte, garçon ! « Ça va » — œuvre, déjà vu…",
    "Tiếng Việt: Đặng Thị Ánh, Âu Cơ",
    "São Paulo, IRMÃ «X», ½ × 5 ± 3°",
    "👩‍💻 ❤️‍🔥 🇹🇼 (ง'⌣')ง",
    "Привет, мир: «да»",
    "&eacute; &#233; caf&eacute;",
]


@pytest.mark.parametrize("text", RIGHT)
def test_right_text_is_not_repaired(text):
    assert STEPS["mojibake"](text) == (text, 0)


@pytest.mark.parametrize("text", [t for t in RIGHT if not t.isascii()])
@pytest.mark.parametrize("codec", ["latin-1", "sloppy-windows-1252"])
def test_utf8_read_as_a_western_encoding_is_read_right(text, codec):
    import ftfy.bad_codecs  # noqa: F401  # registers CP1252 as browsers read it

    wrong = text.encode().decode(codec)
    assert STEPS["mojibake"](wrong) == (text, 1)
    assert STEPS["mojibake"](f"真正的字\n{wrong}\n好") == (f"真正的字\n{text}\n好", 1)


def test_utf8_read_as_gbk_is_read_right():
    text = "今天天气很好"
    assert text.encode().decode("gbk") == "浠婂ぉ澶╂皵寰堝ソ"
    assert STEPS["mojibake"](f"a {text.encode().decode('gbk')} b 好") == (f"a {text} b 好", 1)
    assert STEPS["mojibake"]("真的 浠婂ぉ 好") == ("真的 浠婂ぉ 好", 0), "two characters are too few to be sure"
    assert STEPS["mojibake"]("結果：锟斤拷锟斤拷 了") == ("結果： 了", 2)  # read right, that is U+FFFD, and removed
    assert STEPS["mojibake"]("民主黨 \ufffd\ufffd民視\ufffd新聞") == ("民主黨 民視新聞", 2)


# ---- nfc -------------------------------------------------------------------------------------------------------------
def test_nfc():
    assert STEPS["nfc"]("cafe\u0301 tha\u030dk O\u0358 o\u0358\u0301 sia\u207f ＡＢ，㎏") == ("café tha\u030dk O\u0358 ó\u0358 sia\u207f ＡＢ，㎏", 2)
    assert STEPS["nfc"]("a\r\nb\rc\u2028d\u2029e\n\r") == ("a\nb\nc\nd\ne\n\n", 5)


# ---- control ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\x00\x07b\tc\nd\x7f\x85e", "ab\tc\nde"),
        ("字\u200b\u2060\ufeff字 soft\u00adhyphen \ue000私", "字字 softhyphen 私"),
        ("abc\u202edef\u202c \u2066x\u2069", "abcdef x"),
        ("Auf\u200clage 字\u200d字", "Auflage 字字"),
    ],
)
def test_control_characters_go(text, wanted):
    assert STEPS["control"](text)[0] == wanted


@pytest.mark.parametrize(
    "text", ["👩‍💻👨‍👩‍👧 ❤️‍🔥 🏳️‍🌈 1️⃣", "می\u200cخواهم", "क्\u200dष ක්\u200dෂ", "שלום \u200fabc", "葛\U000e0100", "a\u0301\u0358 ⿰好"]
)
def test_what_shapes_a_script_stays(text):
    assert STEPS["control"](text) == (text, 0)


# ---- urls ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("請看https://example.org/a?b=c#d。謝謝", "請看。謝謝"),
        ("見http://a.tw/臺灣的新聞", "見臺灣的新聞"),
        ("See (https://en.wikipedia.org/wiki/Taiwan_(island)), then www.x-y.com/z.", "See , then ."),
        ("全文（http://a.b/c）在此", "全文在此"),
        ("FTP://files.example.com/pub, HTTPS://A.B", ", "),
        ("https://de.wikipedia.org/wiki/Köln!", "!"),
        ("http(https://a.b)://c.d", "http ://c.d"),  # no new address is made
        ("me@example.com, example.com, http://, www. 好", "me@example.com, example.com, http://, www. 好"),
    ],
)
def test_urls(text, wanted):
    assert STEPS["urls"](text)[0] == wanted


# ---- page numbers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        "12",
        " 7 ",
        "- 12 -",
        "—３—",
        "第 3 頁",
        "第三頁，共十頁",
        "第3页/共10页",
        "12 頁",
        "Page 3 of 10",
        "page 3",
        "p. 12",
        "12 / 30",
        "[12]",
        "（三）",
        "(3)",
        "【4】",
        "三、",
        "3.",
    ],
)
def test_a_page_or_paragraph_number_goes(line):
    assert STEPS["page_numbers"](f"前一頁的字\n{line}\n後一頁的字") == ("前一頁的字\n後一頁的字", 1)
    assert STEPS["page_numbers"](f"前文\n\n{line}\n\n後文") == ("前文\n\n\n後文", 1)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "在 2008 年\n2008\n發生",
            "12",
            "頭一位 12 人",
            "- 12 個\n好",
            "(2008)\n好",
            "第三頁的字\n好",
            "Pages\n好",
            "#### 72\n好",
            "3.5\n好",
            "十二\n好",
        ),
        *("甲\n12\n13\n14\n乙", "數量\n1\n\n2\n\n3"),  # columns of tables
    ],
)
def test_other_numbers_stay(text):
    assert STEPS["page_numbers"](text) == (text, 0)


# ---- repeated lines --------------------------------------------------------------------------------------------------
def test_headers_and_direct_repeats_go():
    header = "民視新聞報導 第一版"
    text = f"{header}\n甲甲甲\n {header}\n乙乙乙\n{header}\n丙丙丙"
    assert STEPS["repeated_lines"](text) == (f"{header}\n甲甲甲\n乙乙乙\n丙丙丙", 2)
    line = "選舉人 票 kinn1 超越"
    assert STEPS["repeated_lines"](f"{line}\n\n{line}\n後來") == (f"{line}\n\n後來", 1)


@pytest.mark.parametrize("text", ["哈哈哈\n哈哈哈\n哈哈哈", "a line that comes twice\nb\na line that comes twice", "}\n}\n}\n\n\n\n\n"])
def test_other_repeats_stay(text):
    assert STEPS["repeated_lines"](text) == (text, 0)


# ---- white space -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  é \n b\t\n\n\n\nc ", "é\n b\n\nc"),
        ("\u3000好\u3000\n", "好"),
        ("\n \n", ""),
        ("def f():\n    x = 1    # one\n\tgo", "def f():\n    x = 1    # one\n\tgo"),
        ("Obama   大勝  美國\n    縮排  的字", "Obama 大勝 美國\n    縮排 的字"),
    ],
)
def test_whitespace(text, wanted):
    assert STEPS["whitespace"](text)[0] == wanted


def test_tai_lo_and_poj_pass_every_step():
    """Each vowel and syllabic consonant with each tone mark, in both cases: precomposed where Unicode has it, else as it was."""
    tones = ("", "\u0301", "\u0300", "\u0302", "\u0304", "\u030d", "\u030b", "\u0306", "\u030c")
    letters = ("a", "e", "i", "o", "u", "o\u0358", "oo", "m", "n", "ng")
    syllables = [unicodedata.normalize("NFC", x[0] + t + x[1:]) for x, t in itertools.product(letters, tones)]
    text = " ".join(f"{s}-{s.title()}--ah {s}\u207f" for s in syllables)
    for name, step in STEPS.items():
        assert step(text) == (text, 0), name
