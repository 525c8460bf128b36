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
from graft.train.launch import command

from .small import curve, small_plan, start, train

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
        assert kept and all("No space left" in line and "the newest in" in line for line in lines), said[-3000:]
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
    argv, environment = command([str(plan.path), str(plan.root), str(rank), str(at), str(counted), *plan.overrides])
    module = argv.index("graft.train") - 1
    script = [str(Path(__file__).with_name("killed.py"))]
    wanted = environment | {"OMP_NUM_THREADS": "1", "GRAFT_PROCESSES": "2"}
    done = subprocess.run([*argv[:module], *script, *argv[module + 2 :]], env=wanted, capture_output=True, text=True, timeout=200)
    if done.returncode == 0:
        return json.loads(counted.read_text())
    return None


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=CAMPAIGN)])
def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, all_of_them):
    """The saves of steps 2 and 4, each rank; what the killed run left is then finished, and ends as the undisturbed one."""
    monkeypatch.setenv("GRAFT_PROCESSES", "2")
    settings = ("sft.save_every=2", "sft.max_steps=5", "sft.validate_every=9")

    def plan_in(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return small_plan(tmp_path / name, *settings)

    totals = [killed(plan_in("whole"), 0, NEVER), killed(plan_in("again"), 1, NEVER) if all_of_them else 17]
    wanted = sha256_file(plan_in("whole").artifact("sft").path / "adapter_model.safetensors")
    points = [(rank, at) for rank, total in enumerate(totals) for at in range(1, total + 1)]
    assert len(points) > 20
    if not all_of_them:
        points = [random.Random(0).choice(points), points[-8]]
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
    print(f"recovered bitwise {recovered} of {len(points)} kills, at one of {totals} operations of two ranks")
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
    settings = ("sft.max_steps=60", "sft.epochs=99", "sft.save_every=1000", "sft.validate_every=1000")
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
    assert fault(kept) is None and done == len(list(read_metrics(run / "metrics.jsonl"))) < 60, "no step is lost"
    artifact = train(plan)
    print(f"asked {to}: left after step {done}, finished")
    assert [s[0] for s in curve(artifact.path)] == list(range(60))
