"""Text as it is compared: one width and case (NFKC, case folded), in compiled code where that equals Python's.

unicodedata.normalize takes 7 to 17 MB/s of Chinese text, for every "，" sends it down its slow path. Here a table maps each
code point that meets no neighbour in NFKC (no combining mark, no part of a composite) and a text of these alone is mapped
at 160 (English) to 400 MB/s (Chinese); any other text goes through unicodedata. The tables take 0.3 s once a process.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from graft.data.compiled import compiled

GROUP = 1 << 20  # characters that are worked on at once, about 15 MiB

# What a code point is: white space; other borders between words; nothing; a combining mark; a symbol, which is a word of its
# own; digit and letter; a letter of a script written without spaces, which is a word of its own; the end of a text.
SPACE, PUNCTUATION, INVISIBLE, MARK, SYMBOL, DIGIT, LETTER, LONE, END = range(9)

# Thai and Lao, Myanmar, Hangul, Khmer, then Han, kana and bopomofo
_UNSPACED = re.compile(
    r"[\u0E00-\u0EFF\u1000-\u109F\u1100-\u11FF\u1780-\u17FF\u2E80-\u2FDF\u3005-\u3007\u3021-\u3029\u3031-\u303C\u3040-\u31FF"
    r"\u3400-\u4DBF\u4E00-\u9FFF\uA960-\uA97F\uAC00-\uD7FF\uF900-\uFAFF\U0001AFF0-\U0001B16F\U00020000-\U0003FFFF]"
)
# Han and Hangul that no form changes, left out where code points are asked one by one; beyond _KNOWN: symbols
_SAME = (range(0x3400, 0x4DB6), range(0x4E00, 0x9FA6), range(0xAC00, 0xD7A4), range(0x20000, 0x2A6D7))
_KNOWN = (range(0x3400), range(0x4DB6, 0x4E00), range(0x9FA6, 0xAC00), range(0xD7A4, 0x20000), range(0x2A6D7, 0x32400), range(0xE0000, 0xE0200))
_COMPOSES = np.uint32(0xFFFFFFFF)
_MANY = np.uint32(0x80000000)

Form = Literal["words", "letters with borders", "letters"]


class Normalised(NamedTuple):
    """Text d is codes[ends[d - 1] : ends[d]]."""

    codes: np.ndarray  # [characters] uint32
    ends: np.ndarray  # [texts] int64

    def text(self, d: int) -> str:
        return self.codes[self.ends[d - 1] if d else 0 : self.ends[d]].tobytes().decode("utf-32-le", "surrogatepass")


def normal(text: str) -> str:
    """NFKC, case folded, letters and digits alone: what two spellings of one sentence share."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def normalised(texts: Sequence[str], form: Form) -> Normalised:
    """The texts, NFKC and case folded, each as the sequence of its words.

    form: "words" has one space between two words of letters, digits and marks, none beside a symbol or a letter of a script
    that is written without spaces; a text of punctuation alone keeps it. "letters with borders" has letters and digits
    alone, with one space between words; "letters" is without these, as `normal`.
    """
    fold, many = _folds()
    raw = _codes(texts)
    length, composes = _measure(raw, len(texts), fold, many)
    if composes.any():
        texts = [unicodedata.normalize("NFKC", t).casefold() if c else t for t, c in zip(texts, composes, strict=True)]
        raw = _codes(texts)
        length += sum(len(t) for t, c in zip(texts, composes, strict=True) if c)
    out, ends = np.empty(2 * length + 2 if form != "letters" else length, np.uint32), np.empty(len(texts), np.int64)
    size = _normalise(raw, composes, fold, many, kinds(form), out, ends)
    return Normalised(out[:size], ends)


def groups(texts: Sequence[str], characters: int = GROUP) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive texts that hold about so many characters, or one larger text."""
    start = size = 0
    for at, text in enumerate(texts):
        if size and size + len(text) > characters:
            yield start, at
            start, size = at, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)


def _codes(texts: Sequence[str]) -> np.ndarray:
    """[characters] uint32, a 0 behind each text."""
    joined = "\0".join([*texts, ""])
    if joined.count("\0") != len(texts):
        joined = "\0".join([*(t.replace("\0", " ") for t in texts), ""])
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)


# ---- tables -----------------------------------------------------------------------------------------------------------
@cache
def kinds(form: Form) -> np.ndarray:
    """[0x110000] uint8: what each code point is, as `form` sees it."""
    if form == "words":
        table = np.full(0x110000, SYMBOL, np.uint8)
        for code in chain(*_KNOWN):
            table[code] = _kind(chr(code))
        for same in _SAME:
            table[same.start : same.stop] = LONE
        table[0] = END
        return table
    table = kinds("words").copy()
    table[(table == PUNCTUATION) | (table == SYMBOL) | (table == SPACE)] = INVISIBLE if form == "letters" else SPACE
    table[table == MARK] = INVISIBLE
    return table


def _kind(c: str) -> int:
    if c.isalnum():
        return LONE if _UNSPACED.match(c) else LETTER if c.isalpha() else DIGIT
    if c.isspace():
        return SPACE
    category = unicodedata.category(c)
    if category == "Cf" or "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef":  # the latter choose a glyph
        return INVISIBLE
    return MARK if category[0] == "M" else PUNCTUATION if category[0] in "PZ" or category == "Cc" else SYMBOL


@cache
def _folds() -> tuple[np.ndarray, np.ndarray]:
    """([0x110000] uint32: what each code point becomes, or _MANY | where in the second, or _COMPOSES; lengths and code points)."""
    fold, many = np.arange(0x110000, dtype=np.uint32), [0]
    composes = {0x1161 + i for i in range(21)} | {0x11A8 + i for i in range(27)}  # Hangul vowels and finals
    for code in chain(*_KNOWN):
        parts = unicodedata.decomposition(chr(code))
        if parts and parts[0] != "<":
            composes.update(int(p, 16) for p in parts.split()[1:])
    for code in chain(*_KNOWN):
        c = chr(code)
        if c < "\x80":
            fold[code] = ord(c.lower())
            continue
        mapped = unicodedata.normalize("NFKC", c)
        if any(unicodedata.combining(m) or ord(m) in composes for m in c + mapped):
            fold[code] = _COMPOSES
        elif (folded := mapped.casefold()) != c:
            if len(folded) == 1:
                fold[code] = ord(folded)
            else:
                fold[code] = _MANY | np.uint32(len(many))
                many += [len(folded), *map(ord, folded)]
    return fold, np.array(many, np.uint32)


# ---- compiled ---------------------------------------------------------------------------------------------------------
@compiled
def _measure(raw, texts, fold, many):
    """(characters when folded, of the texts that can be folded by table; [texts] bool: which cannot)."""
    composes = np.zeros(texts, np.bool_)
    text = total = here = 0
    for code in raw:
        to = fold[code]
        if code == 0:
            total += 0 if composes[text] else here
            text, here = text + 1, 0
        elif to < _MANY:
            here += 1
        elif to == _COMPOSES:
            composes[text] = True
        else:
            here += many[to ^ _MANY]
    return total, composes


@compiled
def _normalise(raw, folded, fold, many, kinds, out, ends):
    """Fill `out` and `ends`; returns the length of `out`. folded [texts]: which texts are folded already."""
    n = start = begin = text = 0
    in_word = border = False
    for at in range(raw.size):
        code = raw[at]
        if code == 0:
            if n == start:  # no word: its punctuation is all that it has
                for j in range(begin, at):
                    n = _emit_punctuation(raw[j], folded[text], fold, many, kinds, out, n)
            ends[text] = n
            start, begin, text = n, at + 1, text + 1
            in_word = border = False
            continue
        to = code if folded[text] else fold[code]
        if to < _MANY:
            n, in_word, border = _emit(to, kinds, out, n, in_word, border)
        else:
            first = (to ^ _MANY) + 1
            for i in range(first, first + many[first - 1]):
                n, in_word, border = _emit(many[i], kinds, out, n, in_word, border)
    return n


@compiled
def _emit(code, kinds, out, n, in_word, border):
    kind = kinds[code]
    if kind in (LETTER, DIGIT, MARK):
        if border and in_word:
            out[n] = 32
            n += 1
        out[n] = code
        return n + 1, True, False
    if kind in (LONE, SYMBOL):
        out[n] = code
        return n + 1, False, False
    return n, in_word, border or kind != INVISIBLE


@compiled
def _emit_punctuation(code, folded, fold, many, kinds, out, n):
    to = code if folded else fold[code]
    if to < _MANY:
        if kinds[to] == PUNCTUATION:
            out[n] = to
            n += 1
        return n
    first = (to ^ _MANY) + 1
    for i in range(first, first + many[first - 1]):
        if kinds[many[i]] == PUNCTUATION:
            out[n] = many[i]
            n += 1
    return n
