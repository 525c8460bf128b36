"""The table that folds text equals Python's normalization, code point by code point and in context."""

import re
import unicodedata
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data import normal as room
from graft.data.normal import normal, normalised

# combining marks, Hangul in parts, ligatures, width variants, invisible marks, surrogates, what composes and what does not
AWKWARD = "aA ß\u0301\u0323\u0358好ー\u3099か\u1100\u1161\u11a8각ﬁ㎡，…Ａ\u200b\ufe0f\0\ud800🙂é²½ก็İ_"
texts = st.lists(st.text(st.one_of(st.sampled_from(AWKWARD), st.characters()), max_size=8), max_size=6)


def all_of(found):
    return [found.text(d) for d in range(found.ends.size)]


def words_of(text):
    """The words of a text, slowly: runs of letters, digits and marks; lone letters and symbols."""
    out = []
    for c in unicodedata.normalize("NFKC", text.replace("\0", " ")).casefold():
        kind = room._kind(c) if not room._UNSPACED.match(c) or not c.isalnum() else room.LONE
        if kind in (room.LETTER, room.DIGIT, room.MARK):
            out.append(c)
        elif kind in (room.LONE, room.SYMBOL):
            out.append(f"\n{c}\n")
        elif kind != room.INVISIBLE:
            out.append(" ")
    joined = re.sub(r" *\n *", "\n", "".join(out)).strip(" ")
    return re.sub(" +", " ", joined).replace("\n", "")


def test_every_code_point_alone_and_before_a_letter():
    points = [chr(c) for c in chain(range(0x33480), range(0xE0000, 0xE0200), range(0xF0000, 0xF0010))]
    assert all_of(normalised(points, "letters")) == ["" if c == "\0" else normal(c) for c in points]
    some = [f"a{c}b" for c in points[:0x20000:7]]
    assert all_of(normalised(some, "letters")) == [normal(t) for t in some]


@settings(deadline=None)  # the first call compiles
@given(texts)
def test_any_texts(some):
    assert all_of(normalised(some, "letters")) == [normal(t) for t in some]
    with_borders = all_of(normalised(some, "letters with borders"))
    assert [t.replace(" ", "") for t in with_borders] == [normal(t) for t in some]
    for found, text in zip(all_of(normalised(some, "words")), some, strict=True):
        assert found == words_of(text) or not words_of(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("你好，世界！ Ｆｏｏ  bar,1.5 a+b", "你好世界foo bar 1 5 a+b"),
        ("a\u200bb\u00a0c\nd", "ab c d"),
        ("A\u030a o\u0358", "å o\u0358"),
        ("……！", "......!"),
        ("🙂", "🙂"),
        (" \n", ""),
        ("therapist", "therapist"),
        ("the rapist", "the rapist"),
    ],
)
def test_words(text, wanted):
    assert all_of(normalised([text], "words")) == [wanted]


def test_texts_go_by_groups_of_their_size():
    assert list(room.groups(["a" * 4, "b" * 4, "c" * 4, "d" * 30, "", "e"], 10)) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert list(room.groups([])) == [] and list(room.groups(["", ""])) == [(0, 2)]
    assert normalised([], "words").ends.size == 0
