"""Parts are made once, whole or not at all, whatever is killed."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from graft.core.errors import DataError
from graft.data import parts


def double(spec, folder):
    with Path(spec["log"]).open("a") as log:
        log.write(f"{spec['n']}\n")
    if spec.get("wrong"):
        raise DataError(f"{spec['n']} is wrong: give another number")
    if spec.get("kill_once") and not Path(spec["kill_once"]).exists():
        Path(spec["kill_once"]).touch()
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "twice").write_bytes(b"x" * (spec["n"] * 2))
    return {"twice": spec["n"] * 2}


def made(log):
    return sorted(map(int, log.read_text().split())) if log.exists() else []


def test_only_what_is_missing_is_made_and_results_come_in_order(tmp_path, ray_local):
    store, log = tmp_path / "store", tmp_path / "log"
    specs = [{"n": n, "log": str(log)} for n in (3, 1, 2)]
    first = parts.make(double, 1, specs, store)
    assert [p.report for p in first] == [{"twice": 6}, {"twice": 2}, {"twice": 4}] and made(log) == [1, 2, 3]
    assert [(p.path / "twice").stat().st_size for p in first] == [6, 2, 4]
    assert parts.make(double, 1, [*specs[1:], {"n": 9, "log": str(log)}], store)[:2] == first[1:]
    assert made(log) == [1, 2, 3, 9]
    assert parts.make(double, 2, specs[:1], store)[0].path != first[0].path, "another version is another part"
    assert made(log) == [1, 2, 3, 3, 9]


def test_a_killed_worker_costs_its_own_part_alone(tmp_path, ray_local):
    store, log = tmp_path / "store", tmp_path / "log"
    specs = [{"n": n, "log": str(log), **({"kill_once": str(tmp_path / "killed")} if n == 2 else {})} for n in range(1, 5)]
    found = parts.make(double, 1, specs, store)
    assert [p.report["twice"] for p in found] == [2, 4, 6, 8] and (tmp_path / "killed").exists()
    assert not any((p.path / "half").exists() for p in found)
    assert made(log).count(2) == 2
    parts.sweep(store, found)
    assert {p.name for p in store.iterdir()} == {p.path.name for p in found}, "the draft of the killed worker is gone"
    parts.sweep(store, found[:1])
    assert [p.name for p in store.iterdir()] == [found[0].path.name]


def test_a_part_that_cannot_be_made_is_one_line_and_the_others_stay(tmp_path, ray_local):
    store, log = tmp_path / "store", tmp_path / "log"
    good = [{"n": n, "log": str(log)} for n in (1, 2)]
    parts.make(double, 1, good, store)
    with pytest.raises(DataError, match=r"^7 is wrong: give another number$"):
        parts.make(double, 1, [*good, {"n": 7, "log": str(log), "wrong": True}], store)
    assert len(list(store.iterdir())) == 2 and made(log) == [1, 2, 7]


def test_a_full_disk_is_one_line_and_no_part(tmp_path, ray_local):
    store = tmp_path / "store"
    store.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", store], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        with pytest.raises(DataError, match=r"^no space left on the disk of .*store: free some"):
            parts.make(double, 1, [{"n": 1 << 20, "log": str(tmp_path / "log")}], store)
        assert list(store.iterdir()) == []
    finally:
        subprocess.run(["umount", store], check=True)


def test_a_report_is_plain_json(tmp_path, ray_local):
    part = parts.make(double, 1, [{"n": 1, "log": str(tmp_path / "log")}], tmp_path / "store")[0]
    assert json.loads((part.path / parts.REPORT).read_text()) == part.report
