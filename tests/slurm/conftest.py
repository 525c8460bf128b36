"""A cluster for the tests of a file, and a copy of the project on its shared file system."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from ..e2e.tree import Tree
from .cluster import Cluster, missing


@pytest.fixture(scope="module")
def short_root():
    """A folder whose path is short: sockets' paths have a limit of 107 bytes."""
    root = Path(tempfile.mkdtemp(prefix="g-"))
    root.chmod(0o755)  # munge wants a socket that all can reach
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(short_root):
    """Two nodes."""
    if reason := missing():
        pytest.skip(reason)
    with Cluster(short_root / "slurm") as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path):
    """The source tree as a user has it on the shared file system, with its own HOME."""
    return Tree(tmp_path, {"GRAFT_PYTHON": sys.executable, "GRAFT_PROCESSES": "2", "OMP_NUM_THREADS": "1"})
