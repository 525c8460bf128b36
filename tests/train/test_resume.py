"""Training goes on where a checkpoint left it: after a kill at any file operation, with a full disk, when it was asked to leave."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from graft.core.artifact import sha256_file
from graft.core.metrics import read_metrics
from graft.train.checkpoint import cursor_of, fault, newest, steps

from .small import curve, random_bins, run_program, small_plan, start, train

CAMPAIGN = pytest.mark.campaign
NEVER = 10**9


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("told", ["stop", "continue"])
def test_a_full_disk_costs_one_checkpoint_and_is_one_line(tmp_path, told):
    plan = small_plan(tmp_path, f"sft.on_save_failure={told}", "sft.save_every=1", "sft.lora={r=16}")  # 0.4 MB each
    run = plan.resolve("sft").run_directory
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(run)], check=True)
    try:
        process = start(plan, 2)
        said, _ = process.communicate(timeout=200)
        lines = {line for line in said.splitlines() if "was not written" in line}
        kept = [folder for folder in steps(run) if not fault(folder)]
        assert kept and all("No space left" in line and "the newest checkpoint in" in line for line in lines), said[-3000:]
        assert len(lines) >= 1 and "Traceback" not in said
        assert process.returncode == (2 if told == "stop" else 0), said[-3000:]
    finally:
        subprocess.run(["umount", str(run)], check=True)
    if told == "continue":
        assert len(curve(plan.artifact("sft").path)) == 7


def killed(plan, rank, at):
    """Run with two processes; SIGKILL to `rank` before its file operation number `at` in saves. Returns how many it came to, None if it ended."""
    counted = plan.root / "operations.json"
    counted.unlink(missing_ok=True)
    code, _ = run_program(plan, "killed.py", rank, at, counted)
    if code == 0:
        return json.loads(counted.read_text())
    return None


PARTS = 12  # of the campaign, so that a machine with many cores can share it out


@pytest.mark.parametrize("part", ["two", *(pytest.param(n, marks=CAMPAIGN) for n in range(PARTS))])
def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, part):
    """The saves of steps 2 and 4, each rank; what the killed run left is then finished, and ends as the undisturbed one."""
    monkeypatch.setenv("GRAFT_PROCESSES", "2")
    settings = ("sft.save_every=2", "sft.max_steps=5", "sft.validate_every=9")

    def plan_in(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return small_plan(tmp_path / name, *settings)

    totals = [killed(plan_in("whole"), 0, NEVER), 17 if part == "two" else killed(plan_in("again"), 1, NEVER)]
    wanted = sha256_file(plan_in("whole").artifact("sft").path / "adapter_model.safetensors")
    points = [(rank, at) for rank, total in enumerate(totals) for at in range(1, total + 1)]
    assert len(points) > 20
    points = [random.Random(0).choice(points), points[-8]] if part == "two" else points[part::PARTS]
    recovered = 0
    for rank, at in points:
        plan = plan_in(f"killed-{rank}-{at}")
        assert killed(plan, rank, at) is None
        run = plan.resolve("sft").run_directory
        left = steps(run)
        assert not left or newest(run)[0], "at every point a whole one exists, once there was one"
        again = train(plan)
        recovered += sha256_file(again.path / "adapter_model.safetensors") == wanted
        shutil.rmtree(plan.root)
    print(f"recovered bitwise {recovered} of {len(points)} kills, each at another of {totals} operations of two ranks")
    assert recovered == len(points)


def ranks_of(plan):
    """{rank: process id} of the ranks that run the plan."""
    found = {}
    for pid in subprocess.run(["pgrep", "-f", f"graft.train {plan.path}"], capture_output=True, text=True).stdout.split():
        with suppress(OSError):
            variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0") if "=" in v)
            if "LOCAL_RANK" in variables:
                found[int(variables["RANK"])] = int(pid)
    return found


@pytest.mark.parametrize("to", ["rank 1", "launcher"])
def test_who_is_asked_to_leave_saves_the_step_at_hand_and_exits_with_75(tmp_path, to):
    settings = ("sft.max_steps=400", "sft.epochs=99", "sft.save_every=1000", "sft.validate_every=1000")
    plan = small_plan(tmp_path, *settings)
    process, run = start(plan, 2), plan.resolve("sft").run_directory
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(list(read_metrics(run / "metrics.jsonl"))) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(ranks_of(plan)[1] if to == "rank 1" else process.pid, signal.SIGUSR2 if to == "rank 1" else signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and said.count("asked to leave") == 1 and "Traceback" not in said, said[-3000:]
    assert not ranks_of(plan), "no process is left"
    (kept,) = steps(run)
    done = cursor_of(kept)["step"]
    assert fault(kept) is None and done == len(list(read_metrics(run / "metrics.jsonl"))) < 400, "no step is lost"
    artifact = train(plan)
    print(f"asked {to}: left after step {done}, finished")
    assert [s[0] for s in curve(artifact.path)] == list(range(400))


def test_changed_data_is_refused_while_a_run_is_unfinished_and_goes_on_where_that_is_allowed(tmp_path):
    settings = ("sft.save_every=2", "sft.max_steps=9", "sft.epochs=99")
    plan = small_plan(tmp_path, *settings)
    first = train(plan)
    before = curve(first.path)
    run = plan.resolve("sft").run_directory
    shutil.rmtree(first.path)  # an unfinished run: what is left of one that was killed after step 6
    for folder in steps(run)[:-1] if cursor_of(steps(run)[-1])["step"] <= 6 else steps(run)[1:]:
        shutil.rmtree(folder)
    (left,) = steps(run)
    at = cursor_of(left)["step"]

    other = small_plan(tmp_path, *settings, "shard.bins_per_shard=7", bins=list(random_bins(20, 32, 5)))
    assert other.resolve("sft").run_directory != run
    process = start(other, 2)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    (line,) = {line for line in said.splitlines() if line.startswith("graft: ")}
    assert "the data changed" in line and str(left) in line and "--allow-data-change" in line
    assert fault(left) is None and not steps(other.resolve("sft").run_directory)

    artifact = train(other, 1, "--allow-data-change")  # with another number of processes, too
    (change,) = artifact.counts["data_changes"]
    assert change["step"] == at and {change["from"], change["to"]} == {p.artifact("shard-sft").digest for p in (plan, other)}
    now = curve(artifact.path)
    assert [s[0] for s in now] == list(range(9)) and now[:at] == before[:at] and now[at][1] != before[at][1]
    assert [s[3] for s in now] == [s[3] for s in before], "the learning rate goes by the global step"
    unrelated = small_plan(tmp_path, *settings, "shard.bins_per_shard=7", "sft.lr=1e-3")
    assert curve(train(unrelated).path)[0][0] == 0, "another recipe is another run"
