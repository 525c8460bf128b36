"""Punctuation by its company: full-width beside Han characters, half-width between Latin letters and digits.

What a mark becomes is decided by the nearest characters to its left and right on its line that are neither blank nor
punctuation. These are never changed, so that twice is as once. See document.py for what it costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from graft.data.augment.novelty import HAN

_HAN = re.compile(rf"{HAN.pattern[:-1]}\u2FF0-\u2FFF\u3041-\u3096\u30A1-\u30FA\u3105-\u312F\u31A0-\u31BF]")  # and kana, bopomofo, ⿰
_LATIN = r"A-Za-z0-9\u00C0-\u024F\u0300-\u036F\u1E00-\u1EFF\u207F"
_ENCLOSING = """()"'（）“”‘’「」『』《》〈〉【】"""
_MARKS = f",.!?:;，．。！？：；、…—{_ENCLOSING}"
_HALF = re.compile(r"""[,.!?:;()"']""")
_CLUSTER = re.compile(rf"[\s{re.escape(_MARKS)}]+")
_TO_FULL = dict(zip(",.!?:;", "，。！？：；", strict=True))
_CURLED = {'"': "“”", "'": "‘’"}  # a quote's kind is kept: which of 「」 and “” a text wants, it does not say
_CODE = re.compile(r"""[{}<>=\\|`]|[\[(]["']""")  # a line with one of these is code, markup or JSON
_BETWEEN_HAN = re.compile(f"{_HAN.pattern}(?={_HAN.pattern})")
LONG_LINE = 100_000  # characters; what is known of the marks of a longer line would take many times its size
_HEADING = re.compile(r"\s*[〇零一二三四五六七八九十百甲乙丙丁戊己庚辛壬癸]{1,4}")

_WIDE = re.compile("[Ａ-Ｚａ-ｚ０-９]+")
_NARROW = str.maketrans({chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)})
# What stands before is looked at last: a pattern that begins with a set of characters is searched several times as fast.
_NO_LIST = r"(?!(?<=[0-9]，)(?:[ \t]+[0-9]|(?![0-9]{3}(?![0-9]))[0-9]))"  # 1，000 is a number, 75，88 are two
_WIDE_MARK = re.compile(rf"([，．！？：；])(?<=[{_LATIN}].){_NO_LIST}([ \t]*)(?=([{_LATIN}]))")
_WIDE_PAIR = re.compile(rf"（(?:(?<=[{_LATIN}].)|(?<=[{_LATIN}][ \t].))(?=[{_LATIN}])([^（）()\n]*)(?<=[{_LATIN}])）(?=[ \t]?[{_LATIN}])")
_WIDE_BLANK = re.compile(r"(?<=\S)[ \t]*\u3000[ \t\u3000]*")
_ANY_WIDE = re.compile("[\u3000\uff01-\uff5e]")


def punctuation(text: str) -> tuple[str, int]:
    """Marks of the width that their company has; counts marks, runs of full-width letters and digits, and U+3000.

    To full width: , . ! ? : ; between two Han characters, behind one at the line's end, and directly behind one with a
    space, bracket or quote after; ( ), and " ' as “ ” ‘ ’, in pairs that hold Han text at one inner end (and at the other
    Han text or a digit) and have no Latin letter or digit directly outside. One space directly behind a mark that becomes
    full-width goes with it, others stay: words may be separated by spaces.
    To half width: ， ． ！ ？ ： ； （ ） between Latin letters or digits (between digits ， only as in 1，000), and all
    full-width letters and digits. U+3000 becomes a plain space but in indentation.
    Not touched: marks between Han text and a Latin word; ellipses; a period directly between two Han characters (a foreign
    name) or behind a Han number that begins the line (a heading); apostrophes and hyphens beside Latin letters; faces; lines
    that look like code, markup or JSON. Decimals, times, file names and addresses have no Han characters on both sides.
    """
    if text.isascii():
        return text, 0
    changes = 0
    if _ANY_WIDE.search(text):
        text, letters = _WIDE.subn(lambda m: m[0].translate(_NARROW), text)
        text, blanks = _WIDE_BLANK.subn(" ", text) if "\u3000" in text else (text, 0)
        text, pairs = _WIDE_PAIR.subn(r"(\1)", text)
        text, marks = _WIDE_MARK.subn(_narrow_mark, text)
        changes = letters + blanks + 2 * pairs + marks
    if _HALF.search(text) and _HAN.search(text):
        lines = text.split("\n")
        for i, line in enumerate(lines):
            if _HALF.search(line) and _HAN.search(line) and not _CODE.search(line):
                done = [_widened(stretch) for stretch in _stretches(line)]
                lines[i] = "".join(stretch for stretch, _ in done)
                changes += sum(marks for _, marks in done)
        text = "\n".join(lines)
    return text, changes


def _narrow_mark(m: re.Match[str]) -> str:
    mark = m[1].translate(_NARROW)
    before = m.string[m.start() - 1]
    within_number = before.isdigit() and m[3].isdigit()
    return mark if not m[2] and (mark == "." or within_number) else f"{mark} "


# ---- to full width -------------------------------------------------------------------------------------------------------
class _Mark(NamedTuple):
    at: int
    left: str  # the nearest character that is neither blank nor mark; "" at the line's border
    right: str
    end: int  # of the run of marks and blanks that it is in


def _stretches(line: str) -> Iterator[str]:
    """A line in parts of bounded size, cut between two Han characters: no mark is there, only a pair may lie across."""
    begin = 0
    while cut := _BETWEEN_HAN.search(line, begin + LONG_LINE):
        yield line[begin : cut.start() + 1]
        begin = cut.start() + 1
    yield line[begin:]


def _widened(line: str) -> tuple[str, int]:
    marks = list(_half_marks(line))
    new: dict[int, str] = {}
    for opening, closing, forms in _pairs(line, marks):
        outside = _alnum(line, opening.at - 1) or _alnum(line, closing.at + 1)
        if opening.end != closing.end and _holds_han(opening.right, closing.left) and not outside:
            new |= {opening.at: forms[0], closing.at: forms[1]}
    for m in marks:
        face = line[m.at : m.at + 2] in (":)", ";)") and m.at + 1 not in new
        if line[m.at] in _TO_FULL and not face and _belongs_to_han(line, m):
            new[m.at] = _TO_FULL[line[m.at]]
    if not new:
        return line, 0
    out: list[str] = []
    begin = 0
    for at in sorted(new):
        out += line[begin:at], new[at]
        begin = at + 1
        if line[at] in _TO_FULL and line[begin : begin + 1] == " " and not line[at - 1 : at].isspace():
            begin += 1  # the space gave the half-width mark its room
    out.append(line[begin:])
    return "".join(out), len(new)


def _half_marks(line: str) -> Iterator[_Mark]:
    left = right = ""
    end = 0  # of the marks and blanks around the last one
    for m in _HALF.finditer(line):
        at = m.start()
        if at >= end:
            while at > end and (line[at - 1] in _MARKS or line[at - 1].isspace()):
                at -= 1
            left = line[at - 1 : at]
            end = _CLUSTER.match(line, at).end()  # type: ignore[union-attr]  # the mark itself is there
            right = line[end : end + 1]
        yield _Mark(m.start(), left, right, end)


def _belongs_to_han(line: str, mark: _Mark) -> bool:
    at, character = mark.at, line[mark.at]
    before, after = line[at - 1 : at], line[at + 1 : at + 2]
    if not _HAN.match(mark.left):
        return False
    if character == "." and ("." in (before, after) or _HAN.match(after) or _HEADING.fullmatch(line, 0, at)):
        return False
    if _HAN.match(mark.right) or not mark.right:
        return True
    return before == mark.left and (after.isspace() or after in _ENCLOSING)


def _pairs(line: str, marks: list[_Mark]) -> list[tuple[_Mark, _Mark, str]]:
    """(opening, closing, their full-width forms) of brackets as they nest, and of quotes as they come."""
    found = []
    open_brackets: list[_Mark] = []
    open_quote: dict[str, _Mark] = {}
    for mark in marks:
        character = line[mark.at]
        if character == "(":
            open_brackets.append(mark)
        elif character == ")" and open_brackets:
            found.append((open_brackets.pop(), mark, "（）"))
        elif character == '"' or (character == "'" and not (_alnum(line, mark.at - 1) or _alnum(line, mark.at + 1))):
            if character in open_quote:
                found.append((open_quote.pop(character), mark, _CURLED[character]))
            else:
                open_quote[character] = mark
    return found


def _holds_han(first: str, last: str) -> bool:
    """Whether a pair with these characters at its inner ends holds Han text, which a number may begin or end."""
    kinds = ["han" if _HAN.match(c) else "digit" if c.isdigit() else "" for c in (first, last)]
    return "han" in kinds and all(kinds)


def _alnum(line: str, at: int) -> bool:
    return 0 <= at < len(line) and line[at].isalnum() and not _HAN.match(line[at])
