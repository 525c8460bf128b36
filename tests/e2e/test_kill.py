"""SIGKILL of `graft run` in a stage: nothing half-made is ever taken for whole, no process is left, the next run ends complete."""

import os
import signal
import socket
import time

import pytest

from graft.core.metrics import read_metrics
from graft.core.stages import Plan

from .tree import RECIPE, Tree

SMALL = [
    "augment.rows_per_class=60",
    "corpora.zh-base.documents=60",
    "corpora.talk-base.documents=400",
    "corpora.zh.documents=200",
    "corpora.prose.documents=10",
    "base.train.max_steps=30",
    "base.train.save_every=5",
    "cpt.max_steps=10",
    "cpt.save_every=5",
    "sft.max_steps=30",
    "sft.save_every=5",
]
STAGES = ["augment", "prepare", "init", "shard-base", "shard-cpt", "shard-sft", "base", "cpt", "merge", "sft", "evaluate", "serve"]
# Ray's two agents first try to report their raylet's death to a server that is gone too, and leave after one or two minutes
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
IN_SUITE = ["base"]  # the campaign kills in every stage; augment has kills of its own in test_augment.py


def arguments(tree):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return tree.graft("run", RECIPE, *(a for o in [*SMALL, f"serve.port={port}"] for a in ("--set", o)))


def kill_inside(tree, stage):
    """Start the run, wait until the stage has begun to write (for training: its first checkpoint), kill the driver."""
    training = stage in ("base", "cpt", "sft")
    pattern = f"checkpoints/*/runs/{stage}-*/step-*" if training else f"*/image-intent-tiny/{stage}/.*.draft-*"
    process = tree.start(*arguments(tree))
    deadline = time.monotonic() + 240
    while not list(tree.path.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, (
            f"{stage} was never seen: {(tree.path.parent / 'output.log').read_text()[-3000:]}"
        )
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    tree.none_alive(within_s=60, but=RAY_AGENTS)
    plan = Plan(tree.path / RECIPE, tuple(SMALL), tree.path)
    assert not list(plan.home(plan.stages[stage].place).glob(f"{stage}/[0-9a-f]*")), "a stage that was killed has no artifact"


def kill_in_each_and_finish(tmp_path, stages):
    tree = Tree(tmp_path)
    for stage in stages:
        kill_inside(tree, stage)
    tree.run(*arguments(tree))
    tree.none_alive(within_s=180)
    plan = Plan(tree.path / RECIPE, tuple(SMALL), tree.path)
    for name in plan.stages:
        plan.artifact(name).verify()
    for stage in ("base", "cpt", "sft"):
        steps = plan.artifact(stage).counts["steps"]
        assert [m["step"] for m in read_metrics(plan.artifact(stage).path / "metrics.jsonl")] == list(range(steps)), "every step once"
    assert not list(tree.path.glob("*/*/*/.*draft*"))
    return plan


def test_killed_in_stages_the_next_run_ends_complete(tmp_path):
    kill_in_each_and_finish(tmp_path, IN_SUITE)


@pytest.mark.campaign
def test_killed_in_every_stage_the_adapter_is_the_undisturbed_one(tmp_path):
    plan = kill_in_each_and_finish(tmp_path / "killed", STAGES)
    calm = Tree(tmp_path / "calm")
    calm.run(*arguments(calm))
    undisturbed = Plan(calm.path / RECIPE, tuple(SMALL), calm.path)
    for stage in ("augment", "prepare", "shard-sft", "base", "merge", "sft"):
        pattern = "adapter_model.safetensors" if stage == "sft" else "model*.safetensors" if stage in ("base", "merge") else "*.[aj]*"
        assert plan.artifact(stage).digest_of_files(pattern) == undisturbed.artifact(stage).digest_of_files(pattern), stage
    print(f"kills: {len(STAGES)}, lost: 0")
