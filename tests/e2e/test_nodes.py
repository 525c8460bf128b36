"""`graft augment` on a Ray cluster of two machines with one workspace: callers on both, one ledger; one of them may crash."""

import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.core.rows import read_jsonl
from graft.core.stages import Plan

from ..data.api.faulty import FaultyEndpoint
from .machines import two_machines
from .test_augment import BIG, arguments, attempts, write_seeds
from .tree import RECIPE, Tree

SEEDS, ROWS = 600, 5  # enough requests at once for both machines: Ray prefers callers beside the driver
OVERRIDES = [*BIG, f"augment.rows_per_seed={ROWS}", "api.actors=4", "api.in_flight=64"]
# Ray takes a machine for dead after five times ten seconds; here sooner
SOON = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3"}
KNOCK = """
import os, time, ray
ray.init(log_to_driver=False)
while sum(n["Alive"] for n in ray.nodes()) < 2:
    time.sleep(0.2)
"""


@pytest.fixture
def cluster():
    """(tree, machines, endpoint) with a Ray node on each machine."""
    root = Path(tempfile.mkdtemp(prefix="graft-"))  # short: Ray's socket paths have a limit of 107 bytes
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        try:
            machines = stack.enter_context(two_machines())
        except PermissionError as e:
            pytest.skip(str(e))
        with socket.socket() as s:
            s.bind((machines.here, 0))
            address = f"{machines.here}:{s.getsockname()[1]}"
        server = stack.enter_context(FaultyEndpoint(host=machines.here, latency_s=0.15, jitter_s=0.1, log=root / "log.jsonl"))
        keys = {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "planted"}
        tree = Tree(root, {**keys, **SOON, "GRAFT_PYTHON": sys.executable, "RAY_TMPDIR": str(root)})
        head = tree.start("env", f"NODE_IP={machines.here}", f"RAY_PORT={address.split(':')[1]}", "RAY_CPUS=1", "bash", "launch/ray.sh", "head")
        stack.callback(stop, head)
        wait_for(lambda: (tree.home / ".ray/auth_token").is_file() and listens(address))
        tree.start(*machines.over_there("env", f"NODE_IP={machines.there}", "RAY_CPUS=2", "bash", "launch/ray.sh", "join", address))
        tree.extra |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
        tree.run(sys.executable, "-c", KNOCK, timeout_s=60)
        yield tree, machines, server


def stop(process):
    process.send_signal(signal.SIGINT)
    process.wait(60)


def wait_for(what, within_s=60):
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def listens(address):
    host, port = address.split(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) == 0


@pytest.mark.campaign
def test_callers_on_two_machines_share_a_ledger_and_one_may_crash(cluster):
    tree, machines, server = cluster
    write_seeds(tree, SEEDS)
    process = tree.start(*tree.graft("augment", RECIPE, *arguments(OVERRIDES)))
    seen = lambda: Counter(r["peer"] for r in server.requests())  # noqa: E731
    wait_for(lambda: process.poll() is not None or min(seen()[machines.here], seen()[machines.there]) >= 100, 120)
    assert process.poll() is None, f"{seen()} {tree.said()[-3000:]}"
    machines.crash()
    lost = attempts(tree, "open")
    assert process.wait(300) == 0, tree.said()[-3000:]
    artifact = Plan(tree.path / RECIPE, tuple(OVERRIDES), tree.path).latest("augment")
    truth = server.report()
    assert truth["unique"] <= truth["requests"] <= truth["unique"] + lost and lost
    assert artifact.counts["stopped"] == {"call": "target", "text": "target"}
    ids = [r["id"] for r in read_jsonl(artifact.path / "rows.jsonl")]
    assert len(ids) == len(set(ids)) == sum(artifact.counts["rows"].values())
    peers = seen()
    print(f"two machines, {dict(peers)} requests by address; one crashed: {truth['requests']} <= unique {truth['unique']} + in flight {lost}")
