"""`graft run --slurm`: one command submits the chain of the quickstart's recipe, which ends as a local run does."""

import subprocess
import sys
import time

import pytest

from graft.core.stages import Plan

from ..e2e.kills import SMALL
from ..e2e.tree import RECIPE, Tree
from ..ports import free_port
from .cluster import missing, until
from .training import attempts, said

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
DATA = ["augment", "prepare", "init", "shard-base", "shard-cpt", "shard-sft"]


def overrides():
    return [word for o in [*SMALL, f"serve.port={free_port()}"] for word in ("--set", o)]


def graft(cluster, project, *words):
    environment = project.environment() | {"PATH": cluster.environment["PATH"]}
    return cluster.run(*project.graft(*words), cwd=project.path, environment=environment)


@pytest.mark.parametrize("last", ["base", pytest.param("serve", marks=pytest.mark.campaign)])
def test_one_command_makes_what_a_local_run_makes(cluster, project, tmp_path_factory, last):
    """Two data nodes, two training nodes of two ranks; here four ranks."""
    local = Tree(tmp_path_factory.mktemp("local"), project.extra | {"GRAFT_PROCESSES": "4"})
    if last == "serve":
        local.run(*local.graft("run", RECIPE, *overrides()))
    else:
        local.run(*local.graft("run", RECIPE, *overrides(), "--data"))
        local.run(*local.graft("run", RECIPE, *overrides(), "--only", last))

    cluster.wait_idle()
    told = graft(cluster, project, "run", RECIPE, *overrides(), "--slurm", "--nodes", "2", "--data-nodes", "2", "--until", last)
    jobs = {line.split()[0]: line.split()[1] for line in told.splitlines() if line.split()[0].isdigit()}
    assert list(jobs.values()) == (["data", "train"] if last == "base" else ["data", "train", "train", "merge", "train", "evaluate", "serve"]), told
    seen = graft(cluster, project, "status", RECIPE, *overrides())
    assert "pending (Dependency)" in seen and max(jobs, key=int) in seen, seen
    for job in jobs:
        found = cluster.wait(job, 300)
        assert found["JobState"] == "COMPLETED", f"{graft(cluster, project, 'status', RECIPE, *overrides())}\n{said(project, job)}"
        print(f"job {job} {found['JobName']} on {found['NodeList']}: {found['RunTime']}")
    same_artifacts(project, local, [*DATA, "base"] if last == "base" else None)
    assert "complete" in graft(cluster, project, "status", RECIPE, *overrides())
    if last == "serve":
        serve_over_two_nodes(cluster, project)
    project.none_alive()
    assert not list((project.path / "slurm/logs").glob("*/*/ray-token"))


def same_artifacts(project, local, stages=None):
    """By SHA-256. stages: all but serving."""
    ours, theirs = (Plan(tree.path / RECIPE, tuple(SMALL), tree.path) for tree in (project, local))
    patterns = {"augment": "rows.jsonl", "base": "model*", "cpt": "adapter_model*", "sft": "adapter_model*", "evaluate": "predictions*"}
    for stage in stages or [stage for stage in ours.stages if stage != "serve"]:
        pattern = patterns.get(stage, "*")
        assert ours.artifact(stage).digest_of_files(pattern) == theirs.artifact(stage).digest_of_files(pattern), stage


@pytest.mark.campaign
@pytest.mark.parametrize("fault", ["requeued", "a machine lost", "the head lost"])
def test_a_data_job_goes_on_where_it_was(cluster, project, tmp_path_factory, fault):
    local = Tree(tmp_path_factory.mktemp("local"), project.extra)
    local.run(*local.graft("run", RECIPE, *overrides(), "--data"))
    cluster.wait_idle()
    (project.path / "slurm/site.env").write_text("BACKOFF_S=1\nLINGER_S=10\n")
    told = graft(cluster, project, "run", RECIPE, *overrides(), "--slurm", "--data-nodes", "2", "--until", "shard-sft")
    (job,) = (line.split()[0] for line in told.splitlines() if line.split()[0].isdigit())
    plan = Plan(project.path / RECIPE, tuple(SMALL), project.path)
    until_true(lambda: plan.resolve("augment").artifact)
    began = time.monotonic()
    if fault == "requeued":
        cluster.run("scontrol", "requeue", job)
    else:
        node = "n2" if fault == "a machine lost" else "n1"
        cluster.power_off(node)
        until(lambda: cluster.states()[node].startswith("down"), 60)
        cluster.boot(node)
    found = cluster.wait(job, 300)
    assert found["JobState"] == "COMPLETED" and attempts(project, job) == 2, said(project, job)
    print(f"data job, {fault}: complete {time.monotonic() - began:.1f} s after it")
    same_artifacts(project, local, DATA)
    cluster.wait_idle()
    project.none_alive()


ASK = """
import json, sys, urllib.request
body = json.dumps({"model": "image-intent-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions", body, {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=60))["object"])
"""


def serve_over_two_nodes(cluster, project):
    """A job that stays until it is ended, with a replica on each node."""
    words = overrides()
    port = words[-1].partition("=")[2]
    environment = project.environment() | {"PATH": cluster.environment["PATH"]}
    job = cluster.sbatch("--nodes=2", "slurm/serve.sbatch", RECIPE, *words, cwd=project.path, environment=environment)
    log = next(iter(until_true(lambda: list((project.path / "slurm/logs").glob(f"*-{job}/attempt-0/nodes.log")))))
    until_true(lambda: f":{port}" in log.read_text())
    (slurmd,) = cluster.pids("n1", r"^slurmd -D")
    asked = subprocess.run(["nsenter", "-t", str(slurmd), "-a", sys.executable, "-c", ASK, port], capture_output=True, text=True)
    assert asked.stdout == "chat.completion\n", asked.stderr + said(project, job)
    replicas = [cluster.pids(node, r"ServeReplica:graft") for node in ("n1", "n2")]
    assert all(replicas), replicas
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def until_true(what):
    return until(what, 120, 0.5)
