"""Single characters: text that was decoded wrongly, one Unicode form, no control characters. See document.py for what they cost.

Every step takes a text and returns it with how many things it changed; twice is as once.
"""

from __future__ import annotations

import re
from unicodedata import is_normalized, normalize

# ---- mojibake --------------------------------------------------------------------------------------------------------
# Bytes 80 to 9F as CP1252 shows them; the five that it leaves open stay C1 controls.
_CP1252_C1 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ\x80-\x9f"
_AS_LATIN = re.compile(rf"[\u00C2-\u00F4][\u00A0-\u00BF{_CP1252_C1}]")  # a lead byte of UTF-8 and a continuation


def _gbk(leads: range | list[int], trails: range | list[int]) -> str:
    return re.escape("".join(bytes((a, b)).decode("gbk", "ignore") for a in leads for b in trails if b != 0x7F))


_HEADS, _TAILS = [*range(0xE3, 0xEA), 0xEF], range(0x80, 0xC0)  # bytes of a Han character or full-width mark in UTF-8
_THREE = f"[{_gbk(_HEADS, _TAILS)}][{_gbk(_TAILS, _HEADS)}][{_gbk(_TAILS, _TAILS)}]"  # they stand for two
_AS_GBK = re.compile(f"{_THREE}{_THREE}(?:{_THREE})*")
_LOST = re.compile("\ufffd+|(?:锟斤拷)+")  # U+FFFD, and its UTF-8 bytes in pairs as GBK shows them


def mojibake(text: str) -> tuple[str, int]:
    """UTF-8 that was read as Latin-1 or CP1252 (line by line, by ftfy) or as GBK (four characters or more) is read right.

    What was lost (runs of U+FFFD, 锟斤拷) is removed. HTML entities stay: they are no wrong decoding. UTF-8 read as Big5
    has lost its bytes and stays too, as does a last odd character of UTF-8 read as GBK.
    Counts lines and runs. https://ftfy.readthedocs.io/en/latest/heuristic.html
    """
    if text.isascii():
        return text, 0
    changes = 0
    while True:  # what one layer hid is another; each turn leaves fewer characters or fewer controls
        repaired, n = _decoded(text)
        lost = 0
        if "\ufffd" in repaired or "锟斤拷" in repaired:
            repaired, lost = _LOST.subn("", repaired)
        if repaired == text:
            return text, changes
        text, changes = repaired, changes + n + lost


def _decoded(text: str) -> tuple[str, int]:
    changes = 0
    if _AS_LATIN.search(text):
        from ftfy import fix_encoding

        lines = text.split("\n")
        fixed = [fix_encoding(line) if _AS_LATIN.search(line) else line for line in lines]
        changes = sum(a != b for a, b in zip(lines, fixed, strict=True))
        text = "\n".join(fixed)
    runs = 0

    def from_gbk(m: re.Match[str]) -> str:
        nonlocal runs
        try:
            right = m[0].encode("gbk").decode("utf-8")
        except UnicodeError:
            return m[0]
        runs += 1
        return right

    return _AS_GBK.sub(from_gbk, text), changes + runs


# ---- one form --------------------------------------------------------------------------------------------------------
_LINE_ENDS = ("\r\n", "\r", "\u2028", "\u2029")


def nfc(text: str) -> tuple[str, int]:
    """Unicode NFC and Unix line ends (CR LF, CR, U+2028 and U+2029 are one); counts words and line ends.

    Never NFKC: full-width forms, the superscript n of POJ, and the marks that no precomposed letter has (U+030D, U+0358)
    are the text's own.
    """
    changes = 0
    if not is_normalized("NFC", text):
        changes = sum(not is_normalized("NFC", word) for word in text.split())
        text = normalize("NFC", text)
    for end in _LINE_ENDS:
        if end in text:
            changes += text.count(end)
            text = text.replace(end, "\n")
    return text, changes


# ---- control characters ----------------------------------------------------------------------------------------------
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad"  # C0 but tab and newline, DEL, C1, soft hyphen
    "\u200b\u2060\ufeff\u202a-\u202e\u2066-\u206f\ufff9-\ufffb"  # zero width, directions, annotations
    "\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]+"  # private use, no characters
)
# After scripts that join or stack (Hebrew to Mongolian, Brahmic, Arabic forms), symbols, emoji and U+FE0F they shape the text.
_JOINER = re.compile(
    "(?<![\u0590-\u1cff\u200c\u200d\u2190-\u2bff\ua800-\uabff\ufb1d-\ufdcf\ufdf0-\ufdff\ufe0f\ufe70-\ufefc"
    "\U00010a00-\U00011fff\U0001f000-\U0001faff])[\u200c\u200d]+"
)


def control(text: str) -> tuple[str, int]:
    """Control, invisible, private-use and direction characters are removed; counts runs of them.

    Tab and newline stay, U+200C and U+200D where they shape scripts and emoji, U+200E and U+200F, and variation selectors.
    """
    text, changes = _CONTROL.subn("", text)
    if "\u200c" in text or "\u200d" in text:
        text, joiners = _JOINER.subn("", text)
        changes += joiners
    return text, changes
