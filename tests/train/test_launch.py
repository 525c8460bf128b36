"""What the launcher reads of its environment, and what it says of ranks that could not save in time."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from graft.train import launch
from graft.train.checkpoint import steps

from .small import small_plan, start
from .test_resume import ranks_of

SBATCH = Path(__file__).resolve().parents[2] / "slurm/train.sbatch"


def test_a_save_has_all_the_time_that_a_job_is_warned_ahead_but_what_leaving_takes():
    (ahead_s,) = re.findall(r"^#SBATCH --signal=B:USR2@(\d+)$", SBATCH.read_text(), re.MULTILINE)
    assert int(ahead_s) - 10 == launch.SAVING_S
    assert launch.command([])[1]["PET_SHUTDOWN_TIMEOUT"] == str(launch.SAVING_S)


@pytest.mark.parametrize(
    ("when", "code", "line"),
    [
        ("it trains", 69, r"asked to leave \(SIGTERM\), and killed before its checkpoint was whole; the newest checkpoint in {run} is {kept}: .*"),
        ("it starts", 75, r"asked to leave \(SIGTERM\) before the first step: the same command starts again"),
    ],
)
def test_ranks_that_are_killed_as_they_save_are_no_ranks_that_never_began(tmp_path, when, code, line):
    plan = small_plan(tmp_path, "sft.max_steps=9999", "sft.epochs=9999", "sft.save_every=3", "sft.validate_every=9999")
    run = plan.resolve("sft").run_directory
    process = start(plan, 2, PET_SHUTDOWN_TIMEOUT="2")
    deadline = time.monotonic() + 120
    while not (steps(run) if when == "it trains" else len(ranks_of(plan)) == 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    for rank in ranks_of(plan).values():
        os.kill(rank, signal.SIGSTOP)  # a disk that takes for ever
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    kept = steps(run)[-1].name if steps(run) else ""
    assert process.returncode == code and re.search(f"^graft: {line.format(run=run, kept=kept)}$", said, re.MULTILINE), said[-3000:]


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("NoDevFiles", 0), ("0", 1), ("0,1", 2), ("0,-1,1", 1), ("GPU-1a, GPU-2b,", 2), ("3,,2", 1)]
)
def test_gpus_are_counted_as_cuda_counts_them(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("GRAFT_PROCESSES", raising=False)
    assert launch.processes_per_node() == (count or launch.CPU_PROCESSES)
    assert launch.command([])[1][launch.GPUS] == str(count)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"GRAFT_PROCESSES": "two"}, "GRAFT_PROCESSES = 'two': give a whole number from 1 on"),
        ({"NUM_NODES": "two"}, "NUM_NODES = 'two': give a whole number from 1 on"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http': give a whole number from 1 on"),
        ({"NUM_NODES": "2"}, "NUM_NODES = 2, but no NODE_RANK, MASTER_ADDR, MASTER_PORT: set them on each node, as slurm/job.sh does"),
        (
            {"NUM_NODES": "2", "NODE_RANK": "0", "MASTER_PORT": "29500"},
            "NUM_NODES = 2, but no MASTER_ADDR: set them on each node, as slurm/job.sh does",
        ),
        ({"NODE_RANK": "1"}, "NODE_RANK = 1, but NUM_NODES = 1: nodes are counted from 0"),
    ],
)
def test_a_wrong_environment_is_one_line(monkeypatch, capsys, variables, line):
    for name in ("GRAFT_PROCESSES", "NUM_NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch", "recipe.toml"])
    assert launch.main() == 2
    assert capsys.readouterr().err == f"graft: {line}\n"
