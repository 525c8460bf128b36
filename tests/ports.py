"""Ports that a test names some time before anything listens at them."""

import itertools
import os
import random
import socket
from contextlib import suppress

FIRST, EACH = 26_000, 1_000  # above graft's launcher (20,000 to 25,999), below what Linux gives to whoever does not ask; of a pytest worker
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 6
_tried = itertools.count(random.randrange(EACH))  # two runs of the tests on one machine begin at different ones


def free_port() -> int:
    """One that no other worker gives out, and this one not again before all of its own."""
    while True:
        port = FIRST + EACH * _worker + next(_tried) % EACH
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
