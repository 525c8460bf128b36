"""Text that may stand on a page: no secret, nothing that UTF-8 or HTML cannot hold, never cut within a character."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

from graft.report.tree import Picture, Series

HIDDEN = "[hidden]"
LEAST = 6  # characters of a secret: a shorter value would be found in innocent words
_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWD|PASSWORD|CREDENTIAL)S?(_|$)", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^\s/?#@\"'<>]+@")
_KEYS = re.compile(r"\b(?:sk|hf|pk|ghp|gho|xox[bap]|glpat)[-_][A-Za-z0-9_-]{16,}|(?<=Bearer )[A-Za-z0-9._~+/-]{12,}=*")
_CONTROLS = {**{c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}, 0x7F: 0x2421, **{c: 0xFFFD for c in range(0x80, 0xA0)}}
_JOINERS = {0x200D, *range(0xFE00, 0xFE10), *range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080), *range(0xE0100, 0xE01F0)}

T = TypeVar("T")


def secrets_of(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the environment holds under a name of a key, token or password, and the userinfo of its URLs; the longest first."""
    found: set[str] = set()
    for name, value in environment.items():
        if _NAMES.search(name):
            found |= {value, *re.split(r"[,\s]+", value)}
        for userinfo in _USERINFO.findall(value):
            found |= {userinfo[:-1], userinfo[:-1].split(":", 1)[-1]}  # a user's name alone may be an innocent word
    return sorted((s for s in found if len(s) >= LEAST), key=len, reverse=True)


def clean(text: str, secrets: list[str]) -> str:
    """`text` with its secrets hidden, controls as pictures, and lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _KEYS.sub(HIDDEN, _USERINFO.sub(HIDDEN + "@", text))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\r\n", "\n").translate(_CONTROLS)


def scrubbed(tree: T, secrets: list[str]) -> T:
    """The same tree with every string clean(); curves and thumbnails pass as they are but for their names and texts."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return clean(value, secrets)
        if isinstance(value, Series):
            return dataclasses.replace(value, name=clean(value.name, secrets))
        if isinstance(value, Picture):  # base64 holds a short secret by chance, and is no image without it
            return dataclasses.replace(value, alt=clean(value.alt, secrets), wrong=clean(value.wrong, secrets))
        if isinstance(value, tuple):
            return tuple(map(walk, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **{f.name: walk(getattr(value, f.name)) for f in dataclasses.fields(value)})
        return value

    return walk(tree)


def cut(text: str, characters: int) -> str:
    """The first so many code points and …, fewer where the last would be parted from what is joined to it (an accent, an emoji's parts, a flag)."""
    if len(text) <= characters:
        return text
    end = characters
    while end > 0 and _joined(text, end):
        end -= 1
    return text[: end or characters] + "…"


def ends(text: str, characters: int) -> str:
    """As cut(), with as much of the end as of the beginning: a question often follows what it is about."""
    if len(text) <= characters:
        return text
    start = len(text) - characters // 2
    while start < len(text) and _joined(text, start):
        start += 1
    return cut(text, characters // 2) + text[start:]


def _joined(text: str, at: int) -> bool:
    """Whether text[at] belongs to the character that text[at - 1] is of (Unicode's UAX 29, but for Indic conjuncts)."""
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M") or ord(after) in _JOINERS or ord(before) == 0x200D:
        return True
    if 0x1100 <= ord(before) <= 0x11FF and 0x1160 <= ord(after) <= 0x11FF:  # a Hangul syllable in its letters
        return True
    flags = 0
    while flags < at and 0x1F1E6 <= ord(text[at - 1 - flags]) <= 0x1F1FF:
        flags += 1
    return flags % 2 == 1 and 0x1F1E6 <= ord(after) <= 0x1F1FF
