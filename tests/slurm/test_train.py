"""slurm/train.sbatch on a cluster of two nodes with two ranks each: what may befall them, and that the adapter stays the same to the last bit."""

import os
import signal
import time

import pytest

from graft.train.checkpoint import cursor_of, steps

from ..train.small import start
from .cluster import Cluster, missing, until
from .training import SAVE_EVERY, STEPS, attempts, complete, plan_in, result, run_of, said, steps_done, submit, wait_for_step

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CAMPAIGN = pytest.mark.campaign
AT = 15  # the step at which something befalls


def of_four_local_ranks(root, *overrides):
    """The result without SLURM."""
    plan = plan_in(root, *overrides)
    process = start(plan, 4)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return result(plan.resolve("sft").artifact)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return of_four_local_ranks(tmp_path_factory.mktemp("local"))


def test_two_nodes_train_what_four_local_ranks_do(cluster, project, undisturbed, tmp_path):
    plan = plan_in(tmp_path / "ws")
    job = submit(cluster, project, plan, "--nodes=2")
    assert result(complete(cluster, project, plan, job)) == undisturbed
    logs = next((project.path / "slurm/logs").glob(f"*-{job}"))
    assert (logs / "latest").resolve().name == "attempt-0" and "0: train sft" in (logs / "latest/nodes.log").read_text()


def cut(cluster, job):
    cluster.cut("n2")
    until(lambda: cluster.states()["n2"].startswith("down"), 60)
    cluster.heal("n2")


def lose_head(cluster, job):
    cluster.power_off("n1")
    until(lambda: cluster.states()["n1"].startswith("down"), 60)
    cluster.boot("n1")


def kill_rank(cluster, job):
    os.kill(cluster.pids("n2", r"-m graft\.train .*--workspace")[-1], signal.SIGKILL)


def kill_slurmd(cluster, job):
    cluster.kill_slurmd("n2")
    until(lambda: cluster.states()["n2"].startswith("down"), 60)
    cluster.start_slurmd("n2")


def restart_slurmctld(cluster, job):
    cluster.restart_slurmctld()


def preempt(cluster, job):
    other = cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    cluster.wait(other)


def requeue(cluster, job):
    cluster.run("scontrol", "requeue", job)


def warn(cluster, job):
    """As the time limit does, SLURM's own clock aside."""
    cluster.run("scancel", "--batch", "--signal=USR2", job)


FAULTS = {
    "link cut": cut,
    "head without power": lose_head,
    "rank killed": kill_rank,
    "slurmd killed": kill_slurmd,
    "slurmctld restarted": restart_slurmctld,
    "warned": warn,
    "preempted": preempt,
    "requeued": requeue,
}
IN_THE_SUITE = {"link cut"}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in IN_THE_SUITE else CAMPAIGN) for f in FAULTS])
def test_what_befalls_a_job_costs_at_most_a_save_interval(cluster, project, undisturbed, tmp_path, fault):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws")
    (project.path / "slurm/site.env").write_text("BACKOFF_S=1\nLINGER_S=10\n")
    job = submit(cluster, project, plan, "--nodes=2")
    wait_for_step(cluster, plan, job, AT)
    began, before = time.monotonic(), steps_done(plan)
    FAULTS[fault](cluster, job)
    until(lambda: steps_done(plan) >= STEPS or attempts(project, job) > 1, 200)
    kept = max((cursor_of(folder)["step"] for folder in steps(run_of(plan))), default=0)
    artifact = complete(cluster, project, plan, job)
    print(
        f"{fault}: {attempts(project, job)} attempts, complete {time.monotonic() - began:.1f} s after it, at most {max(0, before - kept)} steps lost"
    )
    assert result(artifact) == undisturbed, said(project, job)
    assert before - kept <= SAVE_EVERY
    cluster.wait_idle()


@CAMPAIGN
@pytest.mark.parametrize("lost_for_good", [False, True], ids=["found again", "lost for good"])
def test_a_node_without_slurmd_is_left_when_slurm_gives_it_up(short_root, project, tmp_path, lost_for_good):
    """Its ranks run on unseen, longer than SLURM waits for the node; the next attempt must not meet them."""
    settings = ("sft.max_steps=400",)
    undisturbed = of_four_local_ranks(tmp_path / "local", *settings)
    plan = plan_in(tmp_path / "ws", *settings)
    (project.path / "slurm/site.env").write_text("BACKOFF_S=1\nLINGER_S=10\n")
    with Cluster(short_root / f"unseen{lost_for_good:d}", nodes=3 if lost_for_good else 2) as cluster:
        job = submit(cluster, project, plan, "--nodes=2")
        wait_for_step(cluster, plan, job, AT)
        began = time.monotonic()
        cluster.kill_slurmd("n2")
        until(lambda: cluster.states()["n2"].startswith("down"), 60)
        assert steps_done(plan) < 400, "it was over before SLURM gave the node up"
        before = steps_done(plan)
        until(lambda: cluster.job(job)["JobState"] != "RUNNING", 60)
        kept = max(cursor_of(folder)["step"] for folder in steps(run_of(plan)))
        if not lost_for_good:
            cluster.start_slurmd("n2")
        artifact = complete(cluster, project, plan, job)
        nodes = cluster.job(job)["NodeList"]
    print(
        f"slurmd gone: {attempts(project, job)} attempts, complete on {nodes} {time.monotonic() - began:.1f} s after it, {max(0, before - kept)} steps lost"
    )
    assert result(artifact) == undisturbed and attempts(project, job) == 2, said(project, job)
    assert before - kept <= SAVE_EVERY


@CAMPAIGN
def test_a_time_limit_costs_no_step(cluster, project, tmp_path):
    """A minute an attempt, SLURM's shortest; SLURM warns 30 to 60 s earlier than it is asked to, so at about half-way."""
    steps = ("sft.max_steps=400", "sft.save_every=5000")
    undisturbed, plan = of_four_local_ranks(tmp_path / "local", *steps), plan_in(tmp_path / "ws", *steps)
    cluster.wait_idle()
    job = submit(cluster, project, plan, "--nodes=2", "--time=1", "--signal=B:USR2@5")
    artifact = complete(cluster, project, plan, job, 600)
    assert result(artifact) == undisturbed and attempts(project, job) > 1, said(project, job)
    assert "saved after" in said(project, job)
    print(f"time limit: {attempts(project, job)} attempts of a minute each")


def test_with_a_node_fewer_it_goes_on_with_the_same_bins(cluster, project, undisturbed, tmp_path):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws")
    (project.path / "slurm/site.env").write_text("BACKOFF_S=1\nLINGER_S=10\n")
    job = submit(cluster, project, plan, "--nodes=1-2")
    assert cluster.wait(job, states={"RUNNING"})["NodeList"] == "n[1-2]"
    wait_for_step(cluster, plan, job, AT)
    began = time.monotonic()
    cluster.power_off("n2")
    artifact = complete(cluster, project, plan, job)
    print(f"n2 without power: complete on {cluster.job(job)['NodeList']} {time.monotonic() - began:.1f} s after it")
    assert cluster.job(job)["NodeList"] == "n1" and artifact.counts["processes"] == 2
    (_, curve), (_, wanted) = result(artifact), undisturbed
    assert [(s[0], s[3], s[4]) for s in curve] == [(s[0], s[3], s[4]) for s in wanted], "steps, learning rates, targets"
    assert max(abs(a[1] / b[1] - 1) for a, b in zip(curve, wanted, strict=True)) < 1e-5
    cluster.boot("n2")
    cluster.wait_idle()


def test_of_two_jobs_of_one_recipe_one_trains_and_the_other_finds_it_complete(cluster, project, tmp_path):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws")
    jobs = [submit(cluster, project, plan, "--nodes=1", f"--nodelist={node}") for node in ("n1", "n2")]
    for job in jobs:
        complete(cluster, project, plan, job)
    trained, waited = sorted((said(project, job) for job in jobs), key=lambda text: "waiting for it to leave" in text or "complete at" in text)
    assert "train sft: 60 steps" in trained and "complete at" not in trained
    assert "train sft: complete at" in waited and "train sft: 60 steps" not in waited


@CAMPAIGN
def test_of_two_jobs_of_one_recipe_the_second_leaves_when_the_first_takes_long(cluster, project, tmp_path):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws", "sft.max_steps=100000", "sft.epochs=999999", "sft.hang_timeout_s=60")
    first = submit(cluster, project, plan, "--nodes=1", "--nodelist=n1")
    wait_for_step(cluster, plan, first, 2)
    second = submit(cluster, project, plan, "--nodes=1", "--nodelist=n2")
    assert cluster.wait(second)["JobState"] == "FAILED" and attempts(project, second) == 1
    assert f"job {first} (attempt 0) is training here already: follow it by `graft status`" in said(project, second)
    cluster.run("scancel", first)
    assert cluster.wait(first)["JobState"] == "CANCELLED" and attempts(project, first) == 1
    cluster.wait_idle()


@CAMPAIGN
def test_a_head_that_is_cut_off_and_runs_on_publishes_nothing(short_root, project, undisturbed, tmp_path):
    """Of three nodes the first, with rank 0, is cut off for good; the job goes on without it, on the same files."""
    plan = plan_in(tmp_path / "ws", "sft.hang_timeout_s=300")  # by itself the old rank 0 would stay
    (project.path / "slurm/site.env").write_text("BACKOFF_S=1\nLINGER_S=10\n")
    with Cluster(short_root / "three", nodes=3) as cluster:
        job = submit(cluster, project, plan, "--nodes=2")
        wait_for_step(cluster, plan, job, AT)
        old = cluster.pids("n1", r"-m graft\.train .*--workspace")
        cluster.cut("n1")
        until(lambda: attempts(project, job) > 1, 120)
        assert any(os.path.exists(f"/proc/{pid}") for pid in old), "what is cut off runs on"
        artifact = complete(cluster, project, plan, job)
        assert cluster.job(job)["NodeList"] == "n[2-3]" and attempts(project, job) == 2
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in old), 60)
    assert result(artifact) == undisturbed, said(project, job)
