"""SIGKILL of `graft run` in a stage: nothing half-made is ever taken for whole, no process is left, the next run ends complete."""

import pytest

from graft.core.stages import Plan

from .kills import SMALL, assert_complete, command, kill_inside
from .tree import RECIPE, Tree

STAGES = ["augment", "prepare", "init", "shard-base", "shard-cpt", "shard-sft", "base", "cpt", "merge", "sft", "evaluate", "serve"]


@pytest.mark.campaign
def test_killed_in_every_stage_the_adapter_is_the_undisturbed_one(tmp_path):
    tree = Tree(tmp_path / "killed")
    for stage in STAGES:
        kill_inside(tree, stage)
    tree.run(*command(tree))
    tree.none_alive(within_s=180)  # Ray's agents too
    plan = assert_complete(tree)
    calm = Tree(tmp_path / "calm")
    calm.run(*command(calm))
    undisturbed = Plan(calm.path / RECIPE, tuple(SMALL), calm.path)
    for stage in ("augment", "prepare", "shard-sft", "base", "merge", "sft"):
        pattern = "adapter_model.safetensors" if stage == "sft" else "model*.safetensors" if stage in ("base", "merge") else "*.[aj]*"
        assert plan.latest(stage).digest_of_files(pattern) == undisturbed.latest(stage).digest_of_files(pattern), stage
    print(f"kills: {len(STAGES)}, lost: 0")
