"""metrics.jsonl: one JSON object a line, written at once, so that a kill loses at most the last line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends to `path`; a resumed run first drops the lines at and after the step it repeats. `kept`: those that stay."""

    def __init__(self, path: Path, resume_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # what a full disk took of a line is known, so that no part is written twice
        self.kept: list[dict[str, Any]] = []
        at = end = 0
        for line in path.read_bytes().splitlines(keepends=True):
            at += len(line)
            if line.endswith(b"\n") and (m := _read(line)) and m["step"] < resume_step:
                self.kept.append(m)
                end = at
        self._file.truncate(end)  # in place, for no kill comes between, and a full disk has room for it
        self._unwritten, self._failed = b"", False

    def write(self, metrics: dict[str, Any]) -> str | None:
        """Add a line; a number that is not finite becomes null, which JSON has.

        What the disk does not take is tried again with the next line. Returns why, once until the disk takes lines again.
        """
        self._unwritten += _line(metrics).encode()
        return self._attempt()

    def close(self) -> str | None:
        """Returns why lines are missing."""
        self._failed = False
        why = self._attempt()
        self._file.close()
        return why

    def _attempt(self) -> str | None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as e:
            again, self._failed = self._failed, True
            return None if again else f"metrics.jsonl was not written: {e.strerror or e}"
        self._failed = False
        return None


def _line(metrics: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; a line cut by a kill is passed over."""
    yield from filter(None, map(_read, path.read_bytes().splitlines()))


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found
