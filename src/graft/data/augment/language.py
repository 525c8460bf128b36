"""Is a text in the language that the recipe asks for? By its script (see script.py)."""

from __future__ import annotations

from itertools import islice

from graft.data.script import simplified_only, units

__all__ = ["simplified_only", "wrong_language"]


def wrong_language(text: str, language: str) -> str | None:
    """Why `text` is not in `language` ("any", "zh", "zh-Hant" or "en"), None where it is.

    "zh" wants half of its units Han and "en" half of them Latin. "zh-Hant" allows no Simplified character at all. A text
    without letters is of every language.
    """
    if language == "any":
        return None
    found = units(text)
    total = sum(found)
    if language == "en":
        return None if 2 * found.latin >= total else f"not mostly Latin: {found.latin} of {total} words and characters"
    if 2 * found.han < total:
        return f"not mostly Han: {found.han} of {total} words and characters"
    if language == "zh-Hant" and (simplified := list(islice((c for c in text if c in simplified_only()), 3))):
        return f"Simplified characters: {''.join(simplified)}"
    return None
