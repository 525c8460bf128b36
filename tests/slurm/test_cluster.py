"""The test bed itself: its nodes are apart, and its faults are what they say."""

import time

import pytest

from .cluster import Cluster, missing, until

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_nodes_have_names_addresses_and_processes_of_their_own(cluster):
    said = cluster.run("srun", "-N2", "bash", "-c", "echo $SLURM_NODEID $(hostname) $(hostname -I) $(ls /proc | grep -c '^[0-9]')")
    found = {line.split()[0]: line.split()[1:3] for line in said.splitlines()}
    assert found == {"0": ["n1", cluster.address("n1")], "1": ["n2", cluster.address("n2")]}
    assert all(int(line.split()[3]) < 20 for line in said.splitlines())


def test_a_node_without_power_is_down_and_comes_back(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun sleep 300\n")
    job = cluster.sbatch("-N2", "--no-requeue", "-o", tmp_path / "log", script)
    cluster.wait(job, states={"RUNNING"})
    began = time.monotonic()
    cluster.power_off("n2")
    assert cluster.wait(job, 60)["JobState"] in ("NODE_FAIL", "FAILED")
    print(f"the job of a lost node ended after {time.monotonic() - began:.1f} s")
    cluster.boot("n2")
    cluster.wait_idle()


def test_a_cut_node_runs_on_and_is_found_again(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nwhile :; do date +%s%N >>{tmp_path}/beats; sleep 0.1; done\n")
    job = cluster.sbatch("-w", "n2", "--requeue", "-o", tmp_path / "log", script)
    until((tmp_path / "beats").exists, 30)
    cluster.cut("n2")
    until(lambda: "n2" in cluster.states() and cluster.states()["n2"].startswith("down"), 60)
    beats = (tmp_path / "beats").read_text()
    time.sleep(0.5)
    assert (tmp_path / "beats").read_text() != beats, "what runs on a cut node runs on"
    cluster.heal("n2")
    cluster.run("scancel", job)
    cluster.wait_idle()


def test_gpus_are_counted_and_shown_to_the_job(short_root):
    with Cluster(short_root / "gpus", nodes=1, gpus=4) as cluster:
        assert cluster.run("srun", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE") == "0,1 2"
