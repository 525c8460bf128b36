"""Every tiny twin of a recipe in `configs/recipes`, end to end with its sizes cut: what its full recipe does to real weights.

A training stage of each is asked to leave after 2 steps and goes on to 4 by `graft run`, which then evaluates, serves a request and ends complete;
the report is drawn from it. `image-intent-tiny` is the quickstart's (test_quickstart.py), killed and gone on in test_pipeline.py.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from graft.core.metrics import read_metrics
from graft.core.stages import Plan
from graft.core.store import AdapterStore
from graft.train.checkpoint import cursor_of, steps

from ..ports import free_port
from ..train.small import run_program
from .tree import Tree

TWINS = {"interviewer-tiny": "sft", "finetome-tiny": "sft", "taigi-tiny": "cpt", "ui-vqa-tiny": "sft"}  # and the stage that is asked to leave


@pytest.fixture(scope="module")
def tree():
    root = Path(tempfile.mkdtemp(prefix="graft-"))  # short: Ray's socket paths have a limit of 107 bytes
    (root / "tmp").mkdir()
    yield Tree(root, {"TMPDIR": str(root / "tmp"), "RAY_TMPDIR": str(root / "tmp"), "GRAFT_PROCESSES": "1"})
    shutil.rmtree(root, ignore_errors=True)


def cut(name: str) -> tuple[str, ...]:
    """Overrides: a few steps of the base, 4 of what the recipe is about."""
    made = {"finetome-tiny": "prose", "ui-vqa-tiny": "drawn-base"}.get(name, "zh-base")
    trained = ("cpt", "sft") if TWINS[name] == "cpt" else ("sft",)
    sizes = [f"corpora.{made}.documents=100", "base.train.epochs=1", "evaluate.max_new_tokens=8", f"serve.port={free_port()}"]
    if name == "ui-vqa-tiny":
        sizes += ["base.train.max_steps=6", "corpora.drawn.documents=48", "evaluate.tasks.drawn.drawings=12", "evaluate.tasks.described.drawings=12"]
    return (*sizes, *(f"{stage}.max_steps=4" for stage in trained))


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_goes_on_from_where_it_was_stopped_and_ends_complete(tree, monkeypatch, name):
    recipe, stage, overrides = f"configs/recipes/{name}.toml", TWINS[name], cut(name)
    plan = Plan(tree.path / recipe, overrides, tree.path)
    again = tree.graft("run", recipe, *(word for o in overrides for word in ("--set", o)))
    tree.run(*again, "--until", list(plan.stages)[list(plan.stages).index(stage) - 1])

    with monkeypatch.context() as patch:
        for key, value in tree.environment().items():
            patch.setenv(key, value)
        code, said = run_program(plan, "leaving.py", stage, processes=1)
    (left,) = steps(plan.resolve(stage).run_directory)
    assert code and "saved after 2 of 4 steps: the same command goes on" in said and cursor_of(left)["step"] == 2, said[-3000:]
    before = tree.said()
    tree.run(*again)
    assert f"train {stage}: 4 steps, resumed at step 2" in tree.said().removeprefix(before)

    trained = plan.artifact(stage)
    assert [m["step"] for m in read_metrics(trained.path / "metrics.jsonl")] == [0, 1, 2, 3] and trained.counts["steps"] == 4
    for other in plan.stages:
        plan.artifact(other).verify()
    tasks = json.loads((plan.artifact("evaluate").path / "metrics.json").read_text())["tasks"]
    assert tasks.keys() == plan.recipe.evaluate.tasks.keys() and all({"adapter", "base"} == told["systems"].keys() for told in tasks.values())
    reply = json.loads((plan.artifact("serve").path / "reply.json").read_text())
    assert reply["model"] == AdapterStore(plan.served).names()[name] and reply["prompt"] == plan.recipe.serve.prompt
    if plan.recipe.tracking.wandb == "offline":
        assert all(list(plan.resolve(s).run_directory.rglob("*.wandb")) for s in plan.recipe.train_stages())

    if name == "taigi-tiny":
        tree.run(*tree.graft("predict", *again[4:], "--file", "configs/recipes/taigi/exam.jsonl", "--out", "answers.csv"))
        head, *answers = (tree.path / "answers.csv").read_text().splitlines()
        assert head == "ID,Answer" and len(answers) == tasks["reading"]["systems"]["base"]["correct"]["rows"]
    tree.run(*tree.graft("report", *again[4:]))
    page = (plan.home("checkpoints") / "report.html").read_text(encoding="utf-8")
    assert f"{len(plan.stages)} of {len(plan.stages)} stages are complete" in page and f"<h3>{stage}</h3>" in page
    tree.none_alive(within_s=60)
