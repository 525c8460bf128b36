"""A run of the whole tiny recipe in small, a SIGKILL inside one of its stages, and what must hold once it ended after all."""

import os
import signal
import time

from graft.core.metrics import read_metrics
from graft.core.stages import Plan

from ..ports import free_port
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
# Ray's two agents first try for a minute to report their raylet's death to a server that is gone too (a constant of Ray's)
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def command(tree: Tree, overrides=SMALL) -> tuple[str, ...]:
    """`graft run` of the recipe, served at a free port."""
    port = free_port()
    return tree.graft("run", RECIPE, *(a for o in [*overrides, f"serve.port={port}"] for a in ("--set", o)))


def begun(tree: Tree, stage: str) -> bool:
    """Whether the stage has begun to write; for training: its first checkpoint."""
    training = stage in ("base", "cpt", "sft")
    return any(tree.path.glob(f"checkpoints/*/runs/{stage}-*/step-*" if training else f"*/image-intent-tiny/{stage}/.*.draft-*"))


def kill(tree: Tree, process, stage: str, overrides=SMALL) -> None:
    """SIGKILL the driver: nothing of it lives on, and the stage has no artifact."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    tree.none_alive(within_s=60, but=RAY_AGENTS)
    plan = Plan(tree.path / RECIPE, tuple(overrides), tree.path)
    assert not list(plan.home(plan.stages[stage].place).glob(f"{stage}/[0-9a-f]*")), "a stage that was killed has no artifact"


def kill_inside(tree: Tree, stage: str, overrides=SMALL) -> None:
    """Start the run, wait until the stage has begun, kill the driver."""
    process = tree.start(*command(tree, overrides))
    deadline = time.monotonic() + 240
    while not begun(tree, stage):
        assert process.poll() is None and time.monotonic() < deadline, f"{stage} was never seen: {tree.said()[-3000:]}"
        time.sleep(0.005)
    kill(tree, process, stage, overrides)


def assert_complete(tree: Tree, overrides=SMALL) -> Plan:
    """Every artifact is whole, every step was taken once, and no draft is left."""
    plan = Plan(tree.path / RECIPE, tuple(overrides), tree.path)
    for name in plan.stages:
        plan.latest(name).verify()
    for stage in ("base", "cpt", "sft"):
        artifact = plan.latest(stage)
        assert [m["step"] for m in read_metrics(artifact.path / "metrics.jsonl")] == list(range(artifact.counts["steps"]))
    assert not list(tree.path.glob("*/*/*/.*draft*"))
    return plan
