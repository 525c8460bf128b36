"""A replica that answers on the server's own port, in a thread of its process: where there is one, no proxy stands between it and its clients.

Ray Serve's proxy costs each message some 0.2 ms of the replica's and of its own processor time (benchmarks/RESULTS.md); several replicas need it.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from typing import Any

import uvicorn

from graft.core.errors import ServeError

BIND_S = 20.0  # that a replica which was killed may need to let go of the port
KEEP_ALIVE_S = 75  # longer than clients keep a connection that they may use again
BACKLOG = 2048


class Listener:
    """Listens from the start; `alive` until stop(), unless its thread broke."""

    def __init__(self, app: Any, host: str, port: int, drain_s: float):
        self._socket, self._drain_s = bound(host, port), drain_s
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(drain_s))
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no more connections, and return once the answers under way have ended, or after `drain_s`."""
        self._server.should_exit = True
        self._thread.join(self._drain_s)


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; ServeError where the port stays taken."""
    deadline = time.monotonic() + BIND_S
    while True:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family, backlog=BACKLOG)  # sets SO_REUSEADDR
        except OSError as e:
            if e.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ServeError(f"port {port} on {host} cannot be had: {e.strerror}") from None
            time.sleep(0.1)
