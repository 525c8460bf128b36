"""What was measured once on this machine and is read from then on: $XDG_CACHE_HOME/graft, or ~/.cache/graft."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from graft.core.artifact import write_text_atomic


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "graft"


def recalled(name: str) -> dict[str, str | None]:
    """What NAME.json holds; nothing where there is none, or it is damaged."""
    with suppress(OSError, ValueError):
        known = json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))
        if isinstance(known, dict) and all(value is None or isinstance(value, str) for value in known.values()):
            return known
    return {}


def remember(name: str, known: dict[str, str | None]) -> None:
    """Write it whole; where that cannot be, it is measured again next time."""
    with suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder() / f"{name}.json", json.dumps(known, indent=1) + "\n")
