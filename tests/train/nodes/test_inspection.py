"""What is wrong with a node is named before training, by its rank and host and in one line; what is well passes, in a second."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graft.core.errors import ConfigError
from graft.train.launch import _reason
from graft.train.nodes import probes
from graft.train.nodes.faults import Measured, faults, places, summary
from graft.train.nodes.inspection import STEPS, inspected

from ..small import environment, small_plan, start

VERSIONS = {"python": "3.11", "python's patch": "7", "torch": "2.13.0", "GPU": "H200"}


# ---- judging ------------------------------------------------------------------------------------------------------------
def eight(**of_rank_5):
    """Healthy measurements of eight nodes, spread by 10 % to both sides, with one that is not."""
    spread = [1.1, 0.9, 1.0, 0.95, 1.05, 0.92, 1.08, 0.9]
    found = [
        Measured(
            rank=rank,
            host=f"node-{rank}",
            versions=VERSIONS,
            matmul_tflop_per_s=600 * s,
            disk_mb_per_s=900 * s,
            skew_s=0.1 * (s - 1),
            skew_error_s=1e-3,
            all_reduce_gb_per_s=40 * s,
            link_gb_per_s={str(rank ^ 1): 20 * s, str(rank ^ 2): 45 * s},
        )
        for rank, s in enumerate(spread)
    ]
    found[5] = replace(found[5], **of_rank_5)
    return found


def test_healthy_nodes_are_let_through():
    assert faults(eight()) == ([], [])
    assert summary(eight(), 0.61) == (
        "8 processes on 8 hosts, 540 TFLOP/s, 40.5 GB/s between them, all-reduce 36 GB/s, disk 810 MB/s, clocks within 11 ms, 0.6 s"
    )


REFUSED = [
    ({"versions": VERSIONS | {"torch": "2.11.0"}}, r"torch is 2\.11\.0 on rank 5 on node-5, 2\.13\.0 on rank 0 on node-0 and .*: install the same"),
    ({"versions": {k: v for k, v in VERSIONS.items() if k != "torch"}}, r"torch is absent on rank 5 on node-5"),
    ({"versions": VERSIONS | {"python": "3.12"}}, r"python is 3\.12 on rank 5 on node-5"),
    ({"matmul_fault": "a matmul in bfloat16 gives a wrong result", "versions": {}}, r"a matmul in bfloat16 gives a wrong result on rank 5 on node-5"),
    ({"disk_fault": "runs cannot be written (Input/output error)"}, r"\(Input/output error\) on rank 5 on node-5: make room there"),
    ({"skew_s": -61.0}, r"the clock is -61\.0 s off on rank 5 on node-5, more than 60 s: set it"),
    ({"sum_wrong": 3}, r"the all-reduce gives a wrong sum on rank 5 on node-5, of up to 3 elements"),
    ({"altered_from": [4]}, r"what rank 4 on node-4 sent came altered to rank 5 on node-5: take one of these nodes out"),
]
TOLD = [
    ({"versions": VERSIONS | {"GPU": "H100"}}, r"GPU is H100 on rank 5 on node-5, H200 on rank 0 on node-0"),
    ({"versions": VERSIONS | {"python's patch": "9"}}, r"python's patch is 9 on rank 5 on node-5"),
    ({"skew_s": 2.5}, r"the clock is \+2\.5 s off on rank 5 on node-5"),
    ({"matmul_tflop_per_s": 390}, r"rank 5 on node-5: matmul 390 TFLOP/s, the median of the others 600"),
    ({"link_gb_per_s": {"4": 20.0, "7": 21.0}}, r"rank 5 on node-5: link 21 GB/s, the median of the others 45"),
    ({"disk_mb_per_s": 200}, r"rank 5 on node-5: disk 200 MB/s, the median of the others 900"),
]


@pytest.mark.parametrize(("fault", "line"), REFUSED)
def test_what_is_broken_is_refused_by_name(fault, line):
    refused, told = faults(eight(**fault))
    assert len(refused) == 1 and told == [] and re.search(line, refused[0]), (refused, told)
    assert "--exclude=" in refused[0] and "node-5" in refused[0].split("--exclude=")[1]


@pytest.mark.parametrize(("fault", "line"), TOLD)
def test_what_is_slow_or_odd_is_told_by_name(fault, line):
    refused, told = faults(eight(**fault))
    assert refused == [] and len(told) == 1 and re.search(line, told[0]), (refused, told)


def test_a_wrong_clock_of_rank_0_is_its_own():
    found = eight()
    for m in found[1:]:
        m.skew_s += 300
    refused, _ = faults(found)
    assert len(refused) == 1 and "-300.0 s off on rank 0 on node-0" in refused[0]


def test_of_two_the_slower_is_named_from_half_the_share_on():
    def two(slower):
        return [replace(m, matmul_tflop_per_s=rate) for m, rate in zip(eight()[:2], (100, slower), strict=True)]

    assert faults(two(36)) == ([], [])
    assert faults(two(34))[1] == ["rank 1 on node-1: matmul 34 TFLOP/s, the median of the others 100"]
    assert faults(eight()[:1]) == ([], []), "one alone is not slow"
    assert faults(two(None))[1] == ["the matmul was not tried on rank 1 on node-1: another process holds the GPU"]


def test_ranks_of_a_node_share_a_line():
    found = [replace(m, rank=8 * n + m.rank, host=f"node-{n}") for n in range(4) for m in eight()]
    for m in found[8:16]:
        m.link_gb_per_s = {"0": 9.0}
    assert faults(found)[1] == ["ranks 8-15 on node-1: link 9 GB/s, the median of the others 41.4"]
    assert places([(0, "a"), (1, "a"), (4, "b")]) == "ranks 0, 1 on a and rank 4 on b"


@pytest.mark.parametrize("units", [2, 3, 4, 5, 8, 9, 128])
def test_in_every_round_all_but_an_odd_one_meet_in_pairs_and_each_time_another(units):
    met = set()
    for turn in range(units - 1 + units % 2):
        pairs = {u: probes.partner(u, units, turn) for u in range(units)}
        assert all(pairs[v] == u for u, v in pairs.items() if v is not None)
        assert sum(v is None for v in pairs.values()) == units % 2 and all(u != v for u, v in pairs.items())
        met |= {(u, v) for u, v in pairs.items() if v is not None}
    assert len(met) == units * (units - 1)


@pytest.mark.parametrize("size", sorted(probes.SUMS))
def test_the_stored_sums_are_those_of_exact_arithmetic(size):
    a, b = (probes._whole_numbers(size, salt, torch.device("cpu")).float() for salt in (1, 2))
    assert a.abs().max() == b.abs().max() == 8 and size * 8 * 8 < 2**24, "every partial sum is exact in fp32"
    exact = a @ b
    assert probes.SUMS[size] == {"float32": probes._checksum(exact), "bfloat16": probes._checksum(exact.bfloat16())}


def test_a_deadline_that_is_no_number_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_PREFLIGHT_S", "2m")
    with pytest.raises(ConfigError, match=r"^GRAFT_PREFLIGHT_S = '2m': give a number from 1 on$"), inspected(tmp_path):
        pass


# ---- two ranks ----------------------------------------------------------------------------------------------------------
def ranks(folder, *wrong):
    """(what each rank of unfit.py left by fault, the line that the launcher would say, exit code, seconds)."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(Path(__file__).with_name("unfit.py")), str(folder), *wrong]
    started = time.monotonic()
    done = subprocess.run(argv, env=environment(2), capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - started
    log = folder / "log"
    log.write_text(done.stderr)
    left = {fault: [json.loads(file.read_text()) for file in sorted(folder.glob(f"{fault}.[01]"))] for fault in wrong}
    return left, _reason(log), done, seconds


LINES = {
    "version": "torch is 2.0.1 on rank 1 on node-b",
    "matmul-fp32": "a matmul in float32 gives a wrong result on rank 1 on node-b",
    "matmul-bf16": "a matmul in bfloat16 gives a wrong result on rank 1 on node-b",
    "clock": "the clock is -90.0 s off on rank 1 on node-b",
    "sum": "the all-reduce gives a wrong sum on rank 1 on node-b, of up to 1 elements",
    "message": "what rank 1 on node-b sent came altered to rank 0 on node-a",
    "disk": "(No space left on device) on rank 0 on node-a",
}
PASS = {"healthy": None, "slow": "rank 1 on node-b: matmul", "late-clock": "the clock is +5.0 s off on rank 1 on node-b"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_faults_of_two_ranks_are_named_and_then_who_never_comes(tmp_path):
    small = tmp_path / "disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], check=True)
    (small / "full").write_bytes(bytes(1 << 20))
    try:
        left, line, done, seconds = ranks(tmp_path, *PASS, *LINES, "absent")
        assert [path.name for path in small.iterdir()] == ["full"], "what was written to try is gone"
    finally:
        subprocess.run(["umount", str(small)], check=True)
    print(", ".join(f"{fault} {max(r['seconds'] for r in found):.2f} s" for fault, found in left.items() if found), f"absent {seconds:.1f} s in all")
    for fault, told in PASS.items():
        record = json.loads((tmp_path / fault / "nodes.json").read_text())
        assert [r["line"] for r in left[fault]] == [None, None] and [m["host"] for m in record["ranks"]] == ["node-a", "node-b"]
        assert not told or (any(told in said for said in record["told"]) and told in done.stdout), record["told"]
        assert record["preflight_s"] < 5
    for fault, words in LINES.items():
        found = {r["line"] for r in left[fault]}
        assert len(found) == 1 and words in found.copy().pop() and "--exclude=" in found.pop(), (fault, left[fault])
        assert max(r["seconds"] for r in left[fault]) < 10
    assert "rank 1 on node 1 of the launch did not start within 4 s" in line, done.stderr[-3000:]


def test_who_hangs_between_the_others_is_named(tmp_path):
    _, line, done, seconds = ranks(tmp_path, "healthy", "hang")
    print(f"{seconds:.1f} s: {line}")
    assert done.returncode and "rank 1 on node-b did not come past the exchange in pairs" in line and line.endswith("--exclude=node-b"), done.stderr[
        -3000:
    ]


def test_a_training_run_passes_and_leaves_a_record(tmp_path):
    plan = small_plan(tmp_path, "sft.max_steps=2")
    said, _ = (process := start(plan, 2)).communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    line = next(line for line in said.splitlines() if line.startswith("nodes: 2 processes"))
    record = json.loads((plan.resolve("sft").run_directory / "nodes.json").read_text())
    print(line)
    assert list(record["steps_s"]) == list(STEPS[:-1]) and all(seconds > 0 for seconds in record["steps_s"].values())
    assert len(record["ranks"]) == 2 and record["preflight_s"] < 5, "0.4 s where nothing else runs"
    assert list(plan.resolve("sft").run_directory.glob(".probe*")) == []
