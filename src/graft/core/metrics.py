"""metrics.jsonl: one JSON object a line, flushed as it is written, so that a kill loses at most the last line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends to `path`; a resumed run first drops the lines at and after the step it repeats."""

    def __init__(self, path: Path, resume_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [m for m in read_metrics(path) if m["step"] < resume_step] if path.exists() else []
        self._file = path.open("w", encoding="utf-8")
        for m in kept:
            self.write(m)

    def write(self, metrics: dict[str, Any]) -> None:
        """A number that is not finite becomes null, which JSON has."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; a line cut by a kill is passed over."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
