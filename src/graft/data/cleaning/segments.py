"""Long articles cut where a reader would pause: paragraphs, sentences, clauses, words. See document.py for what it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from unicodedata import combining

_CLOSING = "」』”’）)\\]】》〉\"'"
_SENTENCE = re.compile(rf"(?:[。！？…]|[.!?](?=[{_CLOSING}.!?]*(?:\s|$)))+[{_CLOSING}]*")
_CLAUSE = re.compile(r"[，、；：][」』”’）]*|[,;:](?=\s)")
_SPACE = re.compile(r"(?<=\S)(?=\s)")
_BLANKS = re.compile(r"\s*")
_ABBREVIATION = re.compile(r"\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Fig|Vol|al|cf|ca|approx|Inc|Co|Ltd)\.$")
_BEYOND = 8  # characters behind the last possible cut that a pattern may look at

Span = tuple[int, int]


def segment(text: str, min_chars: int, max_chars: int | None) -> list[str]:
    """Pieces of at most `max_chars` characters, in order; all of the text but white space at the cuts is in them.

    A piece ends at the last blank line that leaves it and the rest at least `min_chars` long, or else at such a line end,
    sentence end (behind closing quotes, not behind an abbreviation), clause end or space, or else anywhere but before a
    combining mark. Neighbours of which one is under `min_chars` are joined where both fit; where max_chars is twice
    min_chars or more, none stays under it unless white space fills the place.
    """
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if max_chars is None or end - begin <= max_chars:
        return [text[begin:end]] if begin < end else []
    spans: list[Span] = []
    while end - begin > max_chars:
        last = begin + max_chars
        if end - min_chars >= begin + min_chars:  # the rest will be long enough
            last = min(last, end - min_chars)
        cut = _cut(text, min(begin + max(min_chars, 1), last), last)
        spans.append((begin, cut))
        begin = _BLANKS.match(text, cut).end()  # type: ignore[union-attr]  # it matches nothing too
    spans.append((begin, end))
    return [text[a:b] for a, b in _joined(spans, min_chars, max_chars)]


def _cut(text: str, first: int, last: int) -> int:
    """The best place to cut in first..last, with no white space before it."""
    for mark in ("\n\n", "\n"):
        at = text.rfind(mark, first, last + len(mark))
        if at >= 0 and (at := _without_blanks(text, at)) >= first:
            return at
    for ends in (_sentence_ends, _clause_ends, _spaces):
        if at := max((e for e in ends(text, max(first - _BEYOND, 0), min(last + _BEYOND, len(text))) if first <= e <= last), default=0):
            return at
    at = last
    while at > first and (combining(text[at]) or text[at] in "\u200c\u200d\ufe0e\ufe0f" or text[at - 1] == "\u200d"):
        at -= 1
    return _without_blanks(text, at)


def _without_blanks(text: str, at: int) -> int:
    while text[at - 1].isspace():
        at -= 1
    return at


def _sentence_ends(text: str, begin: int, end: int) -> Iterator[int]:
    for m in _SENTENCE.finditer(text, begin, end):
        if m[0] != "." or not _ABBREVIATION.search(text, begin, m.end()):
            yield m.end()


def _clause_ends(text: str, begin: int, end: int) -> Iterator[int]:
    return (m.end() for m in _CLAUSE.finditer(text, begin, end))


def _spaces(text: str, begin: int, end: int) -> Iterator[int]:
    return (m.end() for m in _SPACE.finditer(text, begin, end))


def _joined(spans: list[Span], min_chars: int, max_chars: int) -> list[Span]:
    joined = spans[:1]
    for begin, end in spans[1:]:
        above, below = joined[-1]
        if min(below - above, end - begin) < min_chars and end - above <= max_chars:
            joined[-1] = (above, end)
        else:
            joined.append((begin, end))
    return joined
