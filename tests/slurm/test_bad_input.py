"""What is wrong with a site, a submission or a node is one line, before anything is loaded, and is not tried again."""

import subprocess
import sys

import pytest

from ..e2e.tree import RECIPE
from .cluster import Cluster, missing, until
from .training import attempts, plan_in, said, submit

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def refused(cluster, project, *words):
    """The one line with which `graft run --slurm` refuses; nothing is submitted."""
    environment = cluster.environment | project.environment() | {"PATH": cluster.environment["PATH"]}
    done = subprocess.run(project.graft("run", RECIPE, "--slurm", *words), cwd=project.path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not cluster.run("squeue", "-h")
    return done.stderr


@pytest.mark.parametrize(
    "site, line",
    [
        ("PARTITON=gpu\n", "slurm/site.env, line 1: 'PARTITON' is no key of it: known are PARTITION"),
        ("# a comment\n\nmodule load cuda\n", "slurm/site.env, line 3: 'module load cuda' is no key of it"),
        ("NODES=two\n", "slurm/site.env: NODES=two: give a whole number, or a range such as 1-2"),
        ("PARTITION=nowhere\n", "sbatch refuses the train job (--nodes=1 --partition=nowhere"),
    ],
)
def test_the_site_file(cluster, project, site, line):
    (project.path / "slurm/site.env").write_text(site)
    assert line in refused(cluster, project)


def test_too_few_gpus(cluster, project):
    (project.path / "slurm/site.env").write_text("GPUS_PER_NODE=8\nGPU=H100\n")
    huge = ("base.hidden_size=16384", "base.intermediate_size=65536", "base.layers=120", "base.heads=128", "base.kv_heads=128", "cpt.global_batch=16")
    line = refused(
        cluster, project, *(word for o in (*huge, "base.train.global_batch=16", "sft.global_batch=16") for word in ("--set", o)), "--nodes=2"
    )
    assert "2 nodes of 8 H100 are too few: " in line and "does not fit" in line
    assert "cannot be split over 24 processes" in refused(cluster, project, "--nodes=3")


def test_the_key_of_the_site_is_asked_in_a_plain_job_too(cluster, project, tmp_path):
    plan = plan_in(tmp_path / "ws")
    (project.path / "slurm/site.env").write_text("SRATCH=/local\n")
    job = submit(cluster, project, plan, "--nodes=1")
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "'SRATCH' is no key of it" in said(project, job) and attempts(project, job) == 0


def test_a_chain_is_submitted_once_and_cancelled_as_a_whole(cluster, project):
    environment = cluster.environment | project.environment() | {"PATH": cluster.environment["PATH"]}

    def graft(*words):
        return subprocess.run(project.graft(*words), cwd=project.path, env=environment, capture_output=True, text=True)

    submitted = graft("run", RECIPE, "--slurm")
    jobs = [line.split()[0] for line in submitted.stdout.splitlines() if line.split()[0].isdigit()]
    assert len(jobs) == 7, submitted.stderr
    second = graft("run", RECIPE, "--slurm")
    assert second.returncode == 2 and f"are under way: {jobs[0]} (data), {jobs[1]} (train)" in second.stderr
    assert graft("cancel", RECIPE).stdout == f"ended {', '.join(jobs)}\n"
    assert all(cluster.wait(job)["JobState"] == "CANCELLED" for job in jobs)
    assert graft("cancel", RECIPE).stdout == "none of its jobs is under way\n"
    assert "cancelled" in graft("status", RECIPE).stdout
    cluster.wait_idle()
    project.none_alive()


def inside(cluster, node, *command):
    """A command in a node's namespaces."""
    (slurmd,) = cluster.pids(node, r"^slurmd -D")
    subprocess.run(["nsenter", "-t", str(slurmd), "-a", *map(str, command)], check=True)


def test_nodes_without_a_shared_file_system(cluster, project, tmp_path):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws")
    inside(cluster, "n2", "mount", "-t", "tmpfs", "tmpfs", project.path)
    job = submit(cluster, project, plan, "--nodes=2")
    try:
        assert cluster.wait(job, 200)["JobState"] == "FAILED"
        assert "graft: n2 does not see" in said(project, job) and attempts(project, job) == 1, said(project, job)
    finally:
        inside(cluster, "n2", "umount", project.path)
    cluster.wait_idle()


def test_other_versions_on_two_nodes(cluster, project, tmp_path):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws")
    package = project.path / "src/graft/__init__.py"
    (tmp_path / "other.py").write_text(package.read_text() + '__version__ = "9.9.9"\n')
    inside(cluster, "n2", "mount", "--bind", tmp_path / "other.py", package)
    job = submit(cluster, project, plan, "--nodes=2")
    try:
        assert cluster.wait(job, 200)["JobState"] == "FAILED"
        assert "9.9.9 on ranks 2, 3 on n2" in said(project, job) and attempts(project, job) == 1, said(project, job)
    finally:
        inside(cluster, "n2", "umount", package)
    cluster.wait_idle()


def test_gpus_that_torch_does_not_see(short_root, project, tmp_path):
    plan = plan_in(tmp_path / "ws")
    with Cluster(short_root / "gpus", nodes=1, gpus=2) as cluster:
        job = submit(cluster, project, plan, "--nodes=1", "--gpus-per-node=2")
        assert cluster.wait(job, 200)["JobState"] == "FAILED"
    assert "preflight: n1 has 2 GPUs for this run, of which torch sees 0" in said(project, job) and attempts(project, job) == 1, said(project, job)


def test_a_port_that_is_taken(cluster, project, tmp_path):
    cluster.wait_idle()
    plan = plan_in(tmp_path / "ws")
    listen = "import socket, time; s = socket.socket(); s.bind(('', 21212)); s.listen(); time.sleep(300)"
    (slurmd,) = cluster.pids("n1", r"^slurmd -D")
    listener = subprocess.Popen(["nsenter", "-t", str(slurmd), "-a", sys.executable, "-c", listen])
    try:
        until(lambda: cluster.pids("n1", "21212"), 10)
        (project.path / "slurm/site.env").write_text("ENVIRONMENT=MASTER_PORT=21212\nLINGER_S=5\n")
        job = submit(cluster, project, plan, "--nodes=2")
        assert cluster.wait(job, 200)["JobState"] == "FAILED"
        assert "graft: MASTER_PORT = 21212 on n1 cannot be listened at" in said(project, job) and attempts(project, job) == 1, said(project, job)
    finally:
        listener.kill()
        listener.wait()
    cluster.wait_idle()
