"""benchmarks/train_gpu.py: its table over several calls, what it says of runs that fail or hang, and the peers' rows."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("train_gpu")


@pytest.fixture
def tables(bench: ModuleType) -> ModuleType:
    return import_module("train_gpu_table")


def run(row: str, of: str, tokens_per_s: float) -> dict[str, Any]:
    step_time_s = 16384 / tokens_per_s
    return {
        "row": row,
        "of": of,
        "tokens_per_s": tokens_per_s,
        "step_time_s": step_time_s,
        "peak_mem_gib": 80.0,
        "first_step_s": 9.0,
        "launch_s": 30.0,
    }


def test_row_is_medians_spread_and_ratio_to_the_best_peer(tables: ModuleType) -> None:
    runs = [run("bf16-whole", of, pace) for pace in (0, 1000, 200) for of, pace in (("graft", 16000 + pace), ("slow", 12000), ("fast", 15000 - pace))]
    head, graft, slow, fast = tables.table(runs)
    assert head[2:6] == ["tokens/s", "min–max", "runs", "to best peer"]
    assert graft[:7] == ["bf16-whole", "graft", "16,200", "16,000–17,000", "3", "1.09", "1011 ms"]
    assert slow[1:6] == ["slow", "12,000", "12,000–12,000", "3", "0.81"]
    assert fast[1:6] == ["fast", "14,800", "14,000–15,000", "3", "1.00"]


def test_fp8_stands_beside_the_bf16_runs_of_peers(tables: ModuleType) -> None:
    rows = tables.table([run("bf16-short", "graft", 17000), run("bf16-short", "peer", 16000), run("fp8-short", "graft", 24000)])[1:]
    assert [(r[0], r[1], r[5]) for r in rows] == [
        ("bf16-short", "graft", "1.06"),
        ("bf16-short", "peer", "1.00"),
        ("fp8-short", "graft", "1.50"),
        ("fp8-short", "peer", "1.00"),
    ]


def test_a_failure_stands_in_its_row_and_leaves_the_other_runs_their_median(tables: ModuleType) -> None:
    failed = {"row": "nf4-whole-ckpt", "of": "peer", "failed": "OutOfMemoryError: 3 | 4 GiB"}
    rows = tables.table([run("nf4-whole-ckpt", "graft", 100), failed, run("nf4-whole-ckpt", "graft", 300), run("nf4-whole-ckpt", "peer", 50)])
    assert len({len(row) for row in rows}) == 1
    assert rows[1][:6] == ["nf4-whole-ckpt", "graft", "200", "100–300", "2", "4.00"]
    assert rows[2][1:5] == ["peer", "50", "50–50", "1"]
    assert rows[3][:3] == ["nf4-whole-ckpt", "peer", "failed: OutOfMemoryError: 3 / 4 GiB"]
    assert tables.table([failed | {"of": "graft"}])[1][:3] == ["nf4-whole-ckpt", "graft", "failed: OutOfMemoryError: 3 / 4 GiB"]


def test_calls_on_one_kind_of_gpu_make_one_table(tables: ModuleType) -> None:
    about = {"driver": "580", "like": "8b", "versions": {"torch": "2"}, "command": "train_gpu.py"}
    paces = (("1 x H200", 100), ("1 x H200", 300), ("1 x H100", 80))
    calls = [{**about, "device": device, "commit": f"c{n}", "runs": [run("bf16-whole", "graft", pace)]} for n, (device, pace) in enumerate(paces)]
    tables.alike(calls[:2])
    lines = tables.report(calls[:2]).splitlines()
    assert lines[2].startswith("| bf16-whole | graft | 200 | 100–300 | 2 |")
    assert lines[-2] == "1 x H200, driver 580, torch 2, commit c0: train_gpu.py"
    with pytest.raises(ValueError, match="8b on 1 x H100 and 8b on 1 x H200"):
        tables.alike(calls)


@pytest.mark.parametrize("row", ["bf16", "int4-whole", "bf16-long", "bf16-whole-half", "bf16-whole-ckpt-ckpt"])
def test_what_is_no_row_is_refused(bench: ModuleType, row: str) -> None:
    with pytest.raises(ValueError, match="is no row"):
        bench.parsed(row)


def test_a_row_named_twice_is_refused(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be run once, in one folder, and counted twice."""
    monkeypatch.setattr("sys.argv", ["train_gpu.py", "--rows", "bf16-whole", "fp8-whole", "bf16-whole"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "a row is named once" in capsys.readouterr().err


def test_rows_name_precision_workload_and_checkpointing(bench: ModuleType) -> None:
    assert bench.parsed("fp8-short") == ("fp8", "short", "none")
    assert bench.parsed("full-whole-ckpt") == ("full", "whole", "full")


def test_launchers_share_the_gpus_and_meet(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.launchers(8, 1) == [{"GRAFT_PROCESSES": "8"}]
    monkeypatch.setattr(bench.Path, "glob", lambda *_: iter(["nvidia0"]))
    for given, wanted in ((None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False) if given is None else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        found = bench.launchers(4, 2)
        assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == wanted and [one["NODE_RANK"] for one in found] == ["0", "1"]
        assert all(one["GRAFT_PROCESSES"] == one["NUM_NODES"] == "2" and one["MASTER_ADDR"] == "127.0.0.1" for one in found)
        assert len({one["MASTER_PORT"] for one in found}) == 1


def test_a_run_that_fails_is_its_last_line(bench: ModuleType) -> None:
    command = [sys.executable, "-c", "print('before'); raise ValueError('no such kernel')"]
    assert bench.attempt(bench.finished, command, 60) == {"failed": "ValueError: no such kernel"}
    assert bench.finished([sys.executable, "-c", "import os; print(os.environ['A'])"], 60, {"A": "here"}) == "here\n"


def test_a_run_that_hangs_is_ended_with_its_children(bench: ModuleType, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import subprocess, sys, pathlib; p = subprocess.Popen(['sleep', '600']); pathlib.Path({str(child)!r}).write_text(str(p.pid)); p.wait()"
    assert bench.attempt(bench.finished, [sys.executable, "-c", code], 3) == {"failed": "not done after 3 s"}
    pid = int(child.read_text())
    until_s = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(("workload", "packed", "tokens"), [("whole", False, 4096), ("short", False, 1024), ("short", True, 4096)])
def test_peers_read_as_many_tokens_as_graft(bench: ModuleType, workload: str, packed: bool, tokens: int) -> None:
    rows = import_module("train_gpu_peers").dataset(workload, packed, 500, 3)
    assert [len(ids) for ids in rows["input_ids"]] == [tokens] * (3 * 4096 // tokens)
    assert all(np.array_equal(row["input_ids"], row["labels"]) and row["input_ids"].max() < 500 for row in rows)
    if packed:
        assert [list(lengths) for lengths in rows["seq_lengths"]] == bench.lengths_of("short", 3, np.random.default_rng(0))  # as graft's first bins
