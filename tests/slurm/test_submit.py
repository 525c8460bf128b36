"""What a submission refuses before SLURM is asked; no cluster is needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..e2e.tree import RECIPE

BINS = ("base.train.global_batch=16", "cpt.global_batch=16", "sft.global_batch=16")


@pytest.fixture
def refused(tmp_path, project):
    """The one line with which `graft run --slurm` refuses, on a machine whose sbatch submits nothing."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexit 1\n")
    sbatch.chmod(0o755)

    def run(*words, **variables):
        sets = [word for o in BINS for word in ("--set", o)]
        command = [sys.executable, "-m", "graft.cli", "run", RECIPE, "--slurm", "--workspace", str(tmp_path), *sets, *words]
        environment = project.environment() | {"PATH": f"{sbatch.parent}:{project.environment()['PATH']}"} | variables
        done = subprocess.run(command, cwd=project.path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr, Path(tmp_path / "asked").exists()

    return run


@pytest.mark.parametrize("option", ["--nodes", "--data-nodes"])
def test_what_is_no_number_of_nodes(refused, option):
    for nodes in ("0", "abc", "4-1", "1-2-3"):
        assert refused(f"{option}={nodes}") == (f"graft: {nodes!r} nodes: give a number from 1 on, or a range such as 1-2\n", False)


def test_every_number_of_a_range_shares_the_batch_out(refused):
    line, asked = refused("--nodes=1-4", "--gpus-per-node=2")
    assert re.search(r"of 1-4 nodes base may get 3, and .* over 6 processes: 2 a node can use \[1, 2, 4, 8\] nodes", line) and not asked
    assert "cannot be split over 6 processes: use [1, 2, 4, 8, 16] processes" in refused("--nodes=3", "--gpus-per-node=2")[0]
    line, asked = refused("--nodes=1-2", "--gpus-per-node=2")
    assert "sbatch refuses the data job" in line and asked, "that range is right"


def test_processes_that_are_no_number(refused):
    assert refused(GRAFT_PROCESSES="two") == ("graft: GRAFT_PROCESSES = 'two': give a whole number from 1 on\n", False)
