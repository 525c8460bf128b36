"""The lease on a workspace's ledger: one process holds it and writes, the others find its address here.

The kernel's lock on `ledger.lock` is the lease: it ends with its process. It holds across machines on NFSv4 and on Lustre
mounted with `flock`; with `localflock` (a lock a machine) the address that still answers keeps a second holder away.
`ledger.address` (mode 0600) says where the holder listens and carries the token that it asks for.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import socket
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

from graft.core.artifact import write_text_atomic
from graft.core.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """Where the ledger's writer listens."""

    host: str
    port: int
    token: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def answers(self) -> bool:
        """Whether the holder that wrote this is there; a stranger on its port does not know the token."""
        ask = urllib.request.Request(f"{self.url}/alive", headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ask, timeout=2) as reply:
                return reply.status == 200
        except (OSError, http.client.HTTPException):
            return False


class Lease:
    """The lease of the ledger at `ledger`, not yet held."""

    def __init__(self, ledger: Path):
        self.lock_path, self.address_path = ledger.with_suffix(".lock"), ledger.with_suffix(".address")
        self._lock: TextIO | None = None

    def acquire(self) -> bool:
        """Try once to become the holder; ConfigError where the file system has no locks."""
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.lock_path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        except OSError as e:
            lock.close()
            raise ConfigError(
                f"{self.lock_path}: this file system has no file locks ({e.strerror}): mount it with flock, or put the workspace elsewhere"
            ) from None
        if (known := self.address()) and known.answers():
            lock.close()
            return False
        self._lock = lock
        return True

    def publish(self, host: str, port: int) -> Address:
        """Say where the holder listens; makes the token."""
        address = Address(host, port, secrets.token_urlsafe(32))
        previous = os.umask(0o077)
        try:
            write_text_atomic(self.address_path, json.dumps(vars(address)))
        finally:
            os.umask(previous)
        return address

    def address(self) -> Address | None:
        """Where the holder listens, None where nobody has said yet."""
        try:
            return Address(**json.loads(self.address_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def release(self) -> None:
        """Stop being the holder; the address goes first, so that nobody is sent to a closed door."""
        if self._lock:
            self.address_path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


@cache
def this_process() -> str:
    """host:pid:start, which names a process for as long as the machine is up."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def surely_dead(owner: str) -> bool:
    """Whether `owner`, as this_process() named it (what follows a "#" tells its clients apart), is a process of this machine that has ended."""
    host, pid, started = owner.partition("#")[0].rsplit(":", 2)
    return host == socket.gethostname() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; "gone" where it has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "gone" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    try:  # no /proc: alive is all that can be said
        os.kill(pid, 0)
        return "0"
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        return "0"
