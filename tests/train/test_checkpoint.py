"""Discovery takes the newest checkpoint whose files all hold, and says why it passed over the others."""

import json

import pytest

from graft.core.artifact import sha256_file
from graft.core.metrics import MetricsWriter, read_metrics
from graft.train.checkpoint import CURSOR, SUMS, fault, newest


def make(run, step):
    folder = run / f"step-{step:08d}"
    (folder / "payload").mkdir(parents=True)
    (folder / "payload" / "shard.pt").write_bytes(bytes(range(256)) * step)
    (folder / CURSOR).write_text(json.dumps({"step": step}))
    sums = {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
    (folder / SUMS).write_text(json.dumps(sums))
    return folder


def test_the_newest_whole_one_is_taken(tmp_path):
    assert newest(tmp_path) == (None, [])
    for step in (5, 10, 15):
        make(tmp_path, step)
    (tmp_path / ".step-00000020.writing").mkdir()
    assert newest(tmp_path) == (tmp_path / "step-00000015", [])


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "sums"])
def test_a_damaged_one_is_passed_over_by_name(tmp_path, damage):
    make(tmp_path, 5)
    shard = make(tmp_path, 10) / "payload" / "shard.pt"
    if damage == "bit":
        data = bytearray(shard.read_bytes())
        data[100] ^= 4
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "gone":
        shard.unlink()
    else:
        (shard.parents[1] / SUMS).unlink()
    folder, passed = newest(tmp_path)
    assert folder == tmp_path / "step-00000005" and fault(folder) is None
    assert len(passed) == 1 and "step-00000010" in passed[0] and (SUMS if damage == "sums" else "shard.pt") in passed[0]


def test_metrics_of_repeated_steps_are_dropped_and_a_cut_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(path)
    for step in range(5):
        first.write({"step": step, "run": 1})
    first.close()
    path.write_text(path.read_text() + '{"step": 5, "ru')
    second = MetricsWriter(path, resume_step=3)
    second.write({"step": 3, "run": 2})
    second.close()
    assert [(m["step"], m["run"]) for m in read_metrics(path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]
