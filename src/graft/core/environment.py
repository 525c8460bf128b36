"""Numbers that the environment gives, such as NUM_NODES."""

from __future__ import annotations

import math
import os
from typing import TypeVar

from graft.core.errors import ConfigError

N = TypeVar("N", int, float)


def number(name: str, default: N, least: N) -> N:
    """Of the variable, of `default`'s type; `default` where it is unset or empty. ConfigError where it is no finite number from `least` on."""
    if not (text := os.environ.get(name, "")):
        return default
    kind = type(default)
    try:
        value = kind(text)
    except ValueError:
        value = kind(least - 1)
    if not math.isfinite(value) or value < least:
        raise ConfigError(f"{name} = {text!r}: give a {'whole ' * (kind is int)}number from {least:g} on")
    return value
