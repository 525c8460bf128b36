"""benchmarks/checkpoint.py: what it counts as the cost of a save, its table, and a call of it with a tiny shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("checkpoint_table")


def ends(*lasts_s: float) -> list[float]:
    """When steps ended that lasted so long."""
    return list(accumulate(lasts_s, initial=1000.0))[1:]


def test_a_save_costs_what_its_step_and_those_it_is_written_beside_take_longer(tables: ModuleType) -> None:
    #            1    2    3    4    5    6    7 held after     10   11   12 held after after 16   17   18
    found = ends(9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 1.1, 1.0, 1.0, 1.0, 1.2, 1.1, 1.3, 1.0, 1.0, 1.0)
    saves = [tables.Saved(7, found[6] + 0.2, found[7]), tables.Saved(12, found[12] + 0.1, found[13] + 0.5), tables.Saved(18, found[17], found[17])]
    got = tables.figures(found, saves)
    assert got["step_time_s"] == pytest.approx(1) and got["quiet_steps"] == 13 - tables.SETTLE
    assert got["first_stall_s"] == pytest.approx(0.5) and got["stalls_s"] == pytest.approx([0.2]), "no step follows the last"
    assert got["steps_after"] == 3 and got["slower_after"] == pytest.approx(0.1) and got["slower_after_max"] == pytest.approx(0.3)
    assert got["written_s"] == pytest.approx(0.2) and got["whole_s"] == pytest.approx(1.5)


def test_steps_that_are_never_free_of_saves_give_no_figure(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="a larger --every"):
        tables.figures(ends(*[1.0] * 9), [tables.Saved(3, 2000, 2000)])
    with pytest.raises(ValueError, match="no save was seen"):
        tables.figures(ends(*[1.0] * 9), [])


def test_an_entry_stands_before_the_older_ones_and_names_what_failed(tables: ModuleType) -> None:
    found = ends(*[1.0] * 20)
    run = {
        "of": "save_state",
        "bytes": 2_500_000,
        **tables.figures(found, [tables.Saved(8, found[8], found[8]), tables.Saved(12, found[12], found[12])]),
    }
    runs = [run, {**run, "of": "graft", "bytes": 100_000}, {"of": "trainer", "failed": "OutOfMemoryError: 3 | 4 GiB"}]
    call = {"what": "tiny", "device": "no GPU", "driver": "none", "processes": 2, "versions": {"torch": "2"}, "commit": "c0", "command": "python"}
    text = tables.appended("# Results\n\nNewest first.\n\n## Older\n\nrow\n", tables.report([{**call, "date": "2026-01-01", "runs": runs}]))
    lines = text.splitlines()
    assert lines[0] == "# Results" and lines.index("## Checkpoints: tiny (2026-01-01)") < lines.index("## Older")
    graft, trainer = (next(line for line in lines if line.startswith(f"| {of} |")) for of in ("graft", "trainer"))
    assert graft.startswith("| graft | 0.1 | 1/25.0 | 1,000 ± 0 ms | 0 ms |") and "3 / 4 GiB" in trainer
    assert "no GPU (driver none), 2 processes, torch 2; the tree of commit `c0`." in lines


@pytest.mark.parametrize("peers", [["save_state"], pytest.param(["save_state", "save_state-trained", "trainer"], marks=pytest.mark.campaign)])
def test_it_runs_with_a_tiny_shape(tmp_path: Path, peers: list[str]) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\n## Older\n")
    options = [
        "--tiny",
        "--saves",
        "2",
        "--every",
        "6",
        "--append",
        "--results",
        str(results),
        "--folder",
        str(tmp_path),
        "--out",
        str(tmp_path / "o.json"),
    ]
    command = [sys.executable, str(FOLDER / "checkpoint.py"), *options, "--contestants", "graft", *peers]
    done = subprocess.run(command, env={**os.environ, "GRAFT_PROCESSES": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (call,) = json.loads((tmp_path / "o.json").read_text())
    runs = {run["of"]: run for run in call["runs"]}
    assert list(runs) == ["graft", *peers] and not any("failed" in run for run in runs.values()), runs
    for run in runs.values():
        assert [save[0] for save in run["saves"]] == ([6, 12] if run["of"] == "graft" else [4, 8]) and len(run["stalls_s"]) == 1
    by_size = [of for of in ("graft", "save_state-trained", "save_state") if of in runs]
    assert sorted(by_size, key=lambda of: runs[of]["bytes"]) == by_size
    assert results.read_text().index("## Checkpoints: tiny, LoRA on bf16") < results.read_text().index("## Older")
    assert not [folder for folder in tmp_path.iterdir() if folder.is_dir() and folder.name != "bases"], "nothing is left but the base"
