"""The request ledger: every answer of the API, durable before it is parsed, so that a rerun asks only what is missing.

SQLite with synchronous=FULL; one writer, the driver of `graft augment`, which holds the recipe's lock.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from graft.core.artifact import digest_of


def request_key(body: dict[str, Any]) -> str:
    """Hash of the whole request: model, parameters, rendered messages, sample index (as `seed`)."""
    return digest_of(body)


class Ledger:
    """Raw responses by request key."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body TEXT NOT NULL, response TEXT NOT NULL, unix_s REAL NOT NULL)")

    def get(self, key: str) -> dict[str, Any] | None:
        row = self.db.execute("SELECT response FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, body: str, response: str) -> None:
        with self.db:
            self.db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", (key, body, response, time.time()))

    def __len__(self) -> int:
        return self.db.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        self.db.close()
