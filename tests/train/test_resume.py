"""Training goes on where a checkpoint left it: after a kill at any file operation, with a full disk, when it was asked to leave."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from graft.core.artifact import sha256_file
from graft.core.metrics import read_metrics
from graft.train.checkpoint import cursor_of, fault, newest, steps

from .forked import Host
from .small import curve, random_bins, small_plan, start, train

CAMPAIGN = pytest.mark.campaign
NEVER = 10**9
MOUNTS = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")


@contextmanager
def run_on_a_small_disk(plan, ranks, folder, size):
    """(exit code, output) of a run, while `folder`, which it fills, is still a disk of that size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        process = start(plan, ranks)
        said, _ = process.communicate(timeout=200)
        yield process.returncode, said
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@MOUNTS
@pytest.mark.parametrize("told", ["stop", "continue"])
def test_a_full_disk_costs_one_checkpoint_and_is_one_line(tmp_path, told):
    plan = small_plan(tmp_path, f"sft.on_save_failure={told}", "sft.save_every=1", "sft.lora={r=16}")  # 0.4 MB each
    run = plan.resolve("sft").run_directory
    with run_on_a_small_disk(plan, 2, run, "1M") as (code, said):
        lines = {line for line in said.splitlines() if "was not written" in line}
        kept = [folder for folder in steps(run) if not fault(folder)]
        assert kept and all("No space left" in line and "the newest checkpoint in" in line for line in lines), said[-3000:]
        assert len(lines) >= 1 and "Traceback" not in said
        assert code == (2 if told == "stop" else 0), said[-3000:]
    if told == "continue":
        assert len(curve(plan.artifact("sft").path)) == 7


@MOUNTS
@pytest.mark.parametrize("told", ["stop", "continue"])
def test_a_disk_too_full_for_the_best_weights_is_one_line_and_no_traceback(tmp_path, told):
    """With room for the metrics and nothing else; the checkpoint of the end does not fit either."""
    plan = small_plan(tmp_path, f"sft.on_save_failure={told}", "sft.save_every=99", "sft.validate_every=2", "sft.keep=best", "sft.lora={r=16}")
    run = plan.resolve("sft").run_directory
    with run_on_a_small_disk(plan, 2, run, "64k") as (code, said):
        assert "Traceback" not in said and code == (2 if told == "stop" else 0), said[-3000:]
        lines = [line for line in said.splitlines() if "the best weights so far, of step" in line]
        assert all("No space left" in line and "holds no checkpoint yet" in line for line in lines)
        assert len(lines) == (1 if told == "stop" else 4), said[-3000:]
    if told == "continue":
        assert "kept_step" not in plan.artifact("sft").counts and len(curve(plan.artifact("sft").path)) == 7


@MOUNTS
def test_a_disk_too_full_for_the_metrics_is_one_line(tmp_path):
    plan = small_plan(tmp_path, "sft.max_steps=300", "sft.epochs=999", "sft.save_every=999", "sft.validate_every=999")
    run = plan.resolve("sft").run_directory
    with run_on_a_small_disk(plan, 2, run, "64k") as (code, said):
        (line,) = {line for line in said.splitlines() if line.startswith("graft: ")}
        assert code == 2 and "Traceback" not in said, said[-3000:]
        assert "metrics.jsonl was not written: No space left on device" in line and "on_save_failure = 'continue'" in line


@MOUNTS
def test_an_artifact_that_the_disk_does_not_take_is_one_line(tmp_path):
    plan = small_plan(tmp_path, "sft.lora={r=16}")
    folder = plan.resolve("sft").directory.parent
    with run_on_a_small_disk(plan, 1, folder, "64k") as (code, said):
        (line,) = {line for line in said.splitlines() if line.startswith("graft: ")}
        assert code == 2 and "Traceback" not in said and "the disk is full" in line and "No space left" in line, said[-3000:]


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=CAMPAIGN)])
def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, all_of_them):
    """The saves of steps 2 and 4, each rank; what the killed run left is then finished, and ends as the undisturbed one."""
    settings = ("sft.save_every=2", "sft.max_steps=5", "sft.validate_every=9")

    def plan_in(name):
        (tmp_path / name).mkdir()
        return small_plan(tmp_path / name, *settings)

    host = Host()
    whole = plan_in("whole")
    totals = [host.kill(whole, 2, 0, NEVER), host.kill(plan_in("again"), 2, 1, NEVER)]
    wanted = sha256_file(whole.artifact("sft").path / "adapter_model.safetensors")
    points = [(rank, at) for rank, total in enumerate(totals) for at in range(1, total + 1)]
    assert len(points) > 60
    if not all_of_them:
        points = random.Random(0).sample(points, 8)
    recovered = missed = 0
    for rank, at in points:
        plan = plan_in(f"killed-{rank}-{at}")
        if host.kill(plan, 2, rank, at) is not None:  # how many borders a save takes differs a little from run to run
            missed += 1
            continue
        left = steps(plan.resolve("sft").run_directory)
        assert not left or newest(plan.resolve("sft").run_directory)[0], "at every point a whole one exists, once there was one"
        if plan.resolve("sft").artifact is None:  # the last of the operations lies behind the artifact's rename: it is complete
            host.train(plan, 2)
        recovered += sha256_file(plan.artifact("sft").path / "adapter_model.safetensors") == wanted
        shutil.rmtree(plan.root)
    host.close()
    print(f"recovered bitwise {recovered} of {len(points) - missed} kills, each at another of {totals} file operations of two ranks")
    assert recovered == len(points) - missed and missed <= 3


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
    settings = ("sft.max_steps=200", "sft.epochs=999", "sft.save_every=1000", "sft.validate_every=1000")
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
    assert fault(kept) is None and done == len(list(read_metrics(run / "metrics.jsonl"))) < 200, "no step is lost"
    artifact = train(plan)
    print(f"asked {to}: left after step {done}, finished")
    assert [s[0] for s in curve(artifact.path)] == list(range(200))


def test_changed_data_is_refused_while_a_run_is_unfinished_and_goes_on_where_that_is_allowed(tmp_path):
    settings = ("sft.save_every=2", "sft.max_steps=9", "sft.epochs=3")
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

    fewer = small_plan(tmp_path, *settings, "shard.bins_per_shard=5", bins=list(random_bins(2, 32, 5)))
    process = start(fewer, 1, "--allow-data-change")
    said, _ = process.communicate(timeout=200)
    (line,) = {line for line in said.splitlines() if line.startswith("graft: ")}
    assert process.returncode == 2 and f"{at} steps are taken in {run}, the new data make 1: nothing to train; delete it or raise sft.epochs" in line
    assert not (fewer.resolve("sft").run_directory / "metrics.jsonl").exists(), "nothing was brought over"

    artifact = train(other, 1, "--allow-data-change")  # with another number of processes, too
    (change,) = artifact.counts["data_changes"]
    assert change["step"] == at and {change["from"], change["to"]} == {p.artifact("shard-sft").digest for p in (plan, other)}
    now = curve(artifact.path)
    assert [s[0] for s in now] == list(range(9)) and now[:at] == before[:at] and now[at][1] != before[at][1]
    assert [s[3] for s in now] == [s[3] for s in before], "the learning rate goes by the global step"
    unrelated = small_plan(tmp_path, *settings, "shard.bins_per_shard=7", "sft.lr=1e-3")
    assert curve(train(unrelated).path)[0][0] == 0, "another recipe is another run"
