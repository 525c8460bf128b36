"""metrics.jsonl holds every step once, whatever is killed and however full the disk is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from graft.core.metrics import MetricsWriter, read_metrics

LINE = {"loss": 1.5, "said": "y" * 500}


def steps(path):
    return [m["step"] for m in read_metrics(path)]


def test_a_run_that_is_killed_as_it_opens_the_file_keeps_its_curve(tmp_path):
    path, count = tmp_path / "metrics.jsonl", 20_000
    path.write_text("".join(json.dumps({"step": step, **LINE}) + "\n" for step in range(count)))
    opening = "import sys; from pathlib import Path; from graft.core.metrics import MetricsWriter; print(flush=True)\n"
    opening += f"while True: MetricsWriter(Path(sys.argv[1]), {count - 1})"
    child = subprocess.Popen([sys.executable, "-c", opening, str(path)], stdout=subprocess.PIPE)
    child.stdout.readline()
    size, until = path.stat().st_size, time.monotonic() + 60
    while path.stat().st_size == size:  # until it is told to drop the last line
        assert time.monotonic() < until
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert steps(path) == list(range(count - 1))


def test_a_line_that_was_cut_is_dropped_before_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"step": 2, "said": "\xe6')
    assert steps(path) == [0, 1]
    writer = MetricsWriter(path, 9)
    assert writer.write({"step": 2, "loss": float("nan")}) is None and writer.close() is None
    assert writer.kept == [{"step": 0}, {"step": 1}] and list(read_metrics(path)) == [*writer.kept, {"step": 2, "loss": None}]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_what_a_full_disk_does_not_take_is_written_once_there_is_room(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        path, ballast = tmp_path / "metrics.jsonl", tmp_path / "ballast"
        writer = MetricsWriter(path)
        ballast.write_bytes(bytes(48 << 10))
        told = [writer.write({"step": step, **LINE}) for step in range(60)]
        (why,) = filter(None, told)
        assert why == "metrics.jsonl was not written: No space left on device" and len(steps(path)) < 40
        ballast.unlink()
        assert writer.write({"step": 60, **LINE}) is None and writer.close() is None
        assert steps(path) == list(range(61)) and all(m["said"] == LINE["said"] for m in read_metrics(path))
        again = MetricsWriter(path, 60)
        again.write({"step": 60, "said": "z" * 60_000})
        assert "No space left" in again.close(), "what is lost at the end is said"
        resumed = MetricsWriter(path, 30)
        assert resumed.close() is None and steps(path) == list(range(30)), "a full disk has room for fewer lines"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)  # lazily, for a writer of a test that failed has it open
