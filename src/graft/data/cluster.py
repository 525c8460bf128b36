"""A Ray cluster for the length of a `with` block: the one this process has, the one RAY_ADDRESS names, or a local one.

A local cluster starts in about 5 s, stops in 1.5 s and listens on the loopback alone.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError

OBJECT_STORE = 256 << 20  # bytes; what does not fit spills to temp_dir


@contextmanager
def ray_cluster(temp_dir: Path | str | None = None, include_dashboard: bool = True) -> Iterator[None]:
    """Connect to Ray, or start it; only what was started here is shut down again.

    temp_dir: where a local cluster keeps sockets, logs and spilled objects (Ray's own default: the system's /tmp).
    Raises ConfigError where RAY_ADDRESS names a cluster that does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone; read when ray is imported
    import ray

    if ray.is_initialized():
        _quiet()
        yield
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        _knock(address)
        try:
            ray.init(**common)
        except ConnectionError:
            raise _nobody(address) from None
    else:
        ray.init(
            "local",  # without it Ray joins whatever cluster somebody started on this machine
            **common,
            num_cpus=_cpus(),
            object_store_memory=OBJECT_STORE,
            include_dashboard=include_dashboard,
            dashboard_host="127.0.0.1",
            _temp_dir=str(temp_dir) if temp_dir else None,
        )
    try:
        _protect_token()
        _quiet()
        yield
    finally:
        ray.shutdown()


def reachable_address() -> str:
    """This machine's address for all that run on the cluster: the loopback, unless RAY_ADDRESS names a cluster that may span machines."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address.split(":")[0] in ("local", "localhost", "127.0.0.1"):
        return "127.0.0.1"
    import ray.util

    return ray.util.get_node_ip_address()


def _cpus() -> int:
    """GRAFT_CPUS, or the machine's; of one logical CPU a shuffle would starve."""
    wanted = os.environ.get("GRAFT_CPUS", "")
    if wanted and not (wanted.isascii() and wanted.isdigit() and int(wanted) > 1):
        raise ConfigError(f"GRAFT_CPUS = {wanted!r}: give the number of CPUs that a local Ray cluster may use, 2 or more")
    return int(wanted) if wanted else max(2, os.cpu_count() or 1)


def _knock(address: str) -> None:
    """Ray itself tries for minutes; a port that is closed is known at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError:
            raise _nobody(address) from None


def _nobody(address: str) -> ConfigError:
    return ConfigError(f"RAY_ADDRESS = {address!r}: no Ray cluster answers there; start it (launch/ray.sh), or unset RAY_ADDRESS for a local one")


def _protect_token() -> None:
    """Ray writes the token of its local clusters readable by all; only the owner needs it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file():
        token.chmod(0o600)


def _quiet() -> None:
    """No progress bars or execution notes of Ray Data, and its sort-based shuffle: 0.5 s where hash aggregators take 5."""
    from ray.data import DataContext
    from ray.data.context import ShuffleStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
