"""The request ledger: every answer of the API durable before it is parsed, and every attempt that may have cost money.

One SQLite file a workspace, written by one process, the holder of the lease (`lease.py`). An attempt is recorded with its
worst-case cost before its request leaves, so a killed run leaves no request uncounted. Changes are committed in groups:
a commit costs one fsync (1 to 10 ms), whatever number of answers it holds; 2,000 answers a second and more.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.core.errors import ArtifactError

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY,       -- SHA-256 of the request
  request TEXT NOT NULL,      -- its JSON, images as their SHA-256
  response TEXT NOT NULL,     -- the body as it came, parsed or not
  unix_s REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  key TEXT NOT NULL,
  account TEXT NOT NULL,      -- the recipe whose budget it falls under
  owner TEXT NOT NULL,        -- the process that sends it: host:pid:start
  state TEXT NOT NULL,        -- open | paid | free | lost (may have been billed: counts at its worst case)
  usd REAL NOT NULL,          -- worst case while open or lost, the answer's cost when paid
  tokens INTEGER NOT NULL,
  unix_s REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS open_attempts ON attempts (state) WHERE state = 'open';
CREATE TABLE IF NOT EXISTS holder (id INTEGER PRIMARY KEY CHECK (id = 0), epoch INTEGER NOT NULL);
INSERT OR IGNORE INTO holder VALUES (0, 0);
"""
# WAL keeps its index in shared memory, which machines do not share
NETWORK = {"nfs", "nfs4", "lustre", "cifs", "smb3", "beegfs", "gpfs", "ceph", "9p", "afs", "glusterfs", "orangefs", "panfs"}


@dataclass(slots=True)
class Attempt:
    """A request about to leave: its worst case in dollars and tokens."""

    id: int
    key: str
    account: str
    owner: str
    usd: float
    tokens: int


@dataclass(slots=True)
class Settled:
    """What became of an attempt; `response` is the raw body where the server answered 200."""

    id: int
    key: str
    state: str  # paid | free | lost
    usd: float
    tokens: int
    request: str | None = None
    response: str | None = None


@dataclass
class Spend:
    """What an account has cost so far; `lost_*` is the part that is presumed, at its worst case."""

    usd: float = 0.0
    tokens: int = 0
    lost_usd: float = 0.0
    lost: int = 0
    paid: int = 0


class LeaseLost(ArtifactError):
    """Another process has become the ledger's writer."""


class Ledger:
    """The open file; a new epoch is entered on opening, and every commit of an older epoch's writer fails."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self.db.execute(f"PRAGMA journal_mode={'TRUNCATE' if on_network(path) else 'WAL'}")
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.execute("PRAGMA wal_autocheckpoint=8000")  # pages; a checkpoint holds up the commit that triggers it
            self.db.executescript(SCHEMA)
            self.epoch: int = self.db.execute("UPDATE holder SET epoch = epoch + 1 RETURNING epoch").fetchone()[0]
        except sqlite3.DatabaseError as e:
            raise ArtifactError(f"the request ledger {path} cannot be opened ({e}): move it aside, or name another --workspace") from None
        self._next = (self.db.execute("SELECT max(id) FROM attempts").fetchone()[0] or 0) + 1

    def next_id(self) -> int:
        self._next += 1
        return self._next - 1

    def commit(self, opened: Iterable[Attempt], settled: Iterable[Settled]) -> None:
        """Make both durable, all or nothing; LeaseLost where this is no longer the writer."""
        now = time.time()
        self.db.execute("BEGIN IMMEDIATE")
        try:
            if not self.db.execute("UPDATE holder SET epoch = epoch WHERE epoch = ?", (self.epoch,)).rowcount:
                raise LeaseLost(f"another process writes {self.path} now")
            self.db.executemany(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, 'open', ?, ?, ?)", ((a.id, a.key, a.account, a.owner, a.usd, a.tokens, now) for a in opened)
            )
            settled = list(settled)
            self.db.executemany(
                "UPDATE attempts SET state = ?, usd = ?, tokens = ? WHERE id = ?", ((s.state, s.usd, s.tokens, s.id) for s in settled)
            )
            self.db.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", ((s.key, s.request, s.response, now) for s in settled if s.response is not None)
            )
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def open_attempts(self) -> list[Attempt]:
        rows = self.db.execute("SELECT id, key, account, owner, usd, tokens FROM attempts WHERE state = 'open' ORDER BY id")
        return [Attempt(*row) for row in rows]

    def spend(self) -> dict[str, Spend]:
        """What every account has cost, open attempts not included."""
        found: dict[str, Spend] = {}
        for account, state, n, usd, tokens in self.db.execute(
            "SELECT account, state, count(*), sum(usd), sum(tokens) FROM attempts WHERE state IN ('paid', 'lost') GROUP BY account, state"
        ):
            spend = found.setdefault(account, Spend())
            spend.usd += usd
            spend.tokens += tokens
            if state == "lost":
                spend.lost_usd, spend.lost = usd, n
            else:
                spend.paid = n
        return found

    def known(self, keys: list[str]) -> set[str]:
        """Those of `keys` that have an answer."""
        return {k for part in _parts(keys) for (k,) in self.db.execute(f"SELECT key FROM answers WHERE key IN ({_marks(part)})", part)}

    def answers(self, keys: list[str]) -> dict[str, str]:
        """Raw response by key, of those that have one."""
        return dict(row for part in _parts(keys) for row in self.db.execute(f"SELECT key, response FROM answers WHERE key IN ({_marks(part)})", part))

    def usage(self, account: str) -> list[tuple[str, str]]:
        """(request, response) of the last 200 answers that the account paid for, newest first: what estimates are made from."""
        return self.db.execute(
            "SELECT request, response FROM answers JOIN attempts USING (key) WHERE account = ? AND state = 'paid' ORDER BY id DESC LIMIT 200",
            (account,),
        ).fetchall()

    def __len__(self) -> int:
        return self.db.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        self.db.close()


def on_network(path: Path) -> bool:
    """Whether the file lies on a file system that several machines mount (by /proc/mounts)."""
    here = os.path.realpath(path)
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:  # no Linux: a laptop
        return False
    for line in mounts:
        point, fstype = line.split()[1:3]
        point = point.replace("\\040", " ")
        if (here == point or here.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fstype
    return kind in NETWORK or kind.startswith("fuse.")


def _parts(keys: list[Any], size: int = 500) -> Iterable[list[Any]]:
    return (keys[i : i + size] for i in range(0, len(keys), size))


def _marks(part: list[Any]) -> str:
    return ",".join("?" * len(part))
