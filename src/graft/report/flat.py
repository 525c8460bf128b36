"""Manifests' nested values as names and text for people."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from graft.report.tree import Pair


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[Pair]:
    """(dotted name, text) of every leaf; what is None or empty is left out."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            yield f"{prefix}{key}", number(value)


def number(value: Any) -> str:
    """12,345 or 0.40512 or the value's own text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(number, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def duration(seconds: float) -> str:
    """0.3 s, 12 s, 0:02:38, 3 days, 4:05:06."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds)))


def dollars(usd: float) -> str:
    """$ 1.25, and of less than a dollar what there is: $ 0.004."""
    return f"$ {usd:,.2f}" if usd >= 1 or usd < 5e-8 else f"$ {usd:.7f}".rstrip("0")
