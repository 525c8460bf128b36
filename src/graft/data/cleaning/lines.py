"""Lines and what stands on them: URLs, page numbers, repeated lines, white space. See document.py for what they cost.

Every step takes a text and returns it with how many things it changed; twice is as once.
"""

from __future__ import annotations

import re
from collections import Counter

from graft.data.augment.novelty import HAN

# ---- URLs ------------------------------------------------------------------------------------------------------------
_IN_URL = r"[A-Za-z0-9\u00C0-\u024F\-._~:/?#\[\]@!$&'*+,;=%]"
_URL_END = r"[A-Za-z0-9\u00C0-\u024F/_~=&%#$+@\-]"
_ROUND = rf"\({_IN_URL}*\)"  # https://en.wikipedia.org/wiki/Taiwan_(disambiguation)
_BARE = rf"(?<![A-Za-z0-9])(?:(?i:https?|ftp)://|(?:www|WWW)\.(?=[A-Za-z0-9]))(?:{_IN_URL}|{_ROUND})*(?:{_URL_END}|{_ROUND})"
_URL = re.compile(rf"[(（<〈《\[【][ \t]*{_BARE}[ \t]*[)）>〉》\]】]|{_BARE}")


def urls(text: str) -> tuple[str, int]:
    """http, https, ftp and www addresses are removed, with brackets that hold nothing else; counts them.

    Marks behind an address (also full-width ones) and Han text directly behind it stay, and so do e-mail addresses.
    """
    if "://" not in text and "www." not in text and "WWW." not in text:
        return text, 0

    def gap(m: re.Match[str]) -> str:  # what stood apart stays apart, and never makes a new address
        before, after = text[m.start() - 1 : m.start()], text[m.end() : m.end() + 1]
        joined = before.isascii() and (before.isalnum() or before in ":/.") and after.isascii() and not after.isspace()
        return " " if before and after and joined else ""

    return _URL.subn(gap, text)


# ---- page and paragraph numbers --------------------------------------------------------------------------------------
_NUMBER = r"(?:[0-9０-９]{1,4}|[〇零一二三四五六七八九十百]{1,5})"
_DIGITS = r"[0-9０-９]{1,4}"
_ITEM = r"(?:[0-9０-９]{1,3}|[〇零一二三四五六七八九十百]{1,3})"  # too short for a year
_PAGE_NUMBER = re.compile(
    rf"""[ \t\u3000]*(?:
      [-–—─－~～·•][ ]?{_DIGITS}[ ]?[-–—─－~～·•]                                          # - 12 -
    | 第?[ ]?{_NUMBER}[ ]?[頁页](?:[ ]?[，,、/／]?[ ]?[共全][ ]?{_NUMBER}[ ]?[頁页])?         # 第 3 頁，共 10 頁
    | (?:[Pp]age|PAGE|[Pp]g?\.)[ ]?{_DIGITS}(?:[ ]?(?:of|OF|/)[ ]?{_DIGITS})?            # Page 3 of 10, p. 3
    | {_DIGITS}[ ]?[/／][ ]?{_DIGITS}                                                     # 12 / 30
    | [\[(（【〔]{_ITEM}[\])）】〕]                                                         # [12], （三）
    | {_ITEM}[、.．]                                                                      # 三、
    | (?P<bare>[0-9０-９]{{1,3}})
    )[ \t\u3000]*""",
    re.VERBOSE,
)
_MAY_BE_NUMBER = re.compile(r"^[ \t\u3000]*[-–—─－~～·•\[(（【〔Pp第0-9０-９〇零一二三四五六七八九十百].{0,24}$", re.MULTILINE)


def page_numbers(text: str) -> tuple[str, int]:
    """Lines that hold a page or paragraph number and nothing else are removed; counts them.

    These are "- 12 -", "第 3 頁" with or without its total, "Page 3 of 10", "12 / 30", "[12]", "（三）", "三、", and one to
    three bare digits between lines of text. Bare digits stay where the next line above or below that is not blank is bare
    digits too (a column of a table) or where there is no other line; so do bare years and bare page numbers from 1000 on.
    Lost: a fraction, a date without its year, a verse or a list number that has a line of its own.
    """
    if not _MAY_BE_NUMBER.search(text):
        return text, 0
    lines = text.split("\n")
    found = {i: m for i, line in enumerate(lines) if len(line) <= 40 and (m := _PAGE_NUMBER.fullmatch(line))}
    if not found:
        return text, 0
    filled = [i for i, line in enumerate(lines) if line.strip()]
    bare = {i for i, m in found.items() if m["bare"]}
    for before, at, after in zip([-1, *filled], filled, [*filled[1:], -1], strict=False):
        if at in bare and (before in bare or after in bare or len(filled) == 1):
            del found[at]
    return "\n".join(line for i, line in enumerate(lines) if i not in found), len(found)


# ---- repeated lines --------------------------------------------------------------------------------------------------
REPEATED_CHARS = 8  # shorter lines repeat for good reasons: lyrics, brackets of code, cells of a table


def repeated_lines(text: str) -> tuple[str, int]:
    """Of a line of eight characters or more that stands three times in the text (a header, a footer) only the first is
    kept, and of one that repeats the line above (blank lines between or not) too; counts what is removed.
    """
    lines = text.split("\n")
    keys = [line.strip() for line in lines]
    long = [key for key in keys if len(key) >= REPEATED_CHARS]
    if len(set(long)) == len(long):
        return text, 0
    times = Counter(long)
    kept: list[str] = []
    seen: set[str] = set()
    above = ""
    for line, key in zip(lines, keys, strict=True):
        if len(key) >= REPEATED_CHARS:
            if key == above or (times[key] > 2 and key in seen):
                continue
            seen.add(key)
        above = key or above
        kept.append(line)
    return "\n".join(kept), len(lines) - len(kept)


# ---- white space -----------------------------------------------------------------------------------------------------
_GAP = re.compile(r"(?<=\S)  +(?=\S)")


def whitespace(text: str) -> tuple[str, int]:
    """No blanks at line ends, no more than one blank line in a row, none at the ends of the text; counts lines
    changed or removed.

    Runs of spaces inside a line become one where the line holds Han characters: there nothing is aligned by them, as
    code and tables of Latin text are. Indentation and tabs stay.
    """
    lines = text.split("\n")
    kept: list[str] = []
    changes = 0
    for line in lines:
        short = line.rstrip()
        if "  " in short and HAN.search(short):
            short = _GAP.sub(" ", short)
        changes += short != line
        if short or (kept and kept[-1]):
            kept.append(short)
    while kept and not kept[-1]:
        kept.pop()
    joined = "\n".join(kept)
    result = joined.strip()
    return (result, changes + len(lines) - len(kept) + (result != joined)) if result != text else (text, 0)
