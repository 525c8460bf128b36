"""`graft sweep` of two arms and two seeds on a tiny base, killed in the middle and gone on: each run once, and the table is the arms' own figures."""

import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest

from graft.core.artifact import MANIFEST
from graft.core.recipe import EmbeddedBase, Train

from ..train.small import tokenizer
from .kills import RAY_AGENTS
from .tree import Tree

RECIPE = """
name = "echo"
deepspeed = "{deepspeed}"
[corpora.first]
path = "first.jsonl"
[shard]
seq_len = 64
[model]
base = "base"
precision = "fp32"
chat_template = "chatml"
[sft]
corpora = ["first"]
lora = {{ r = 4, alpha = 8 }}
lr = 1e-2
global_batch = 2
save_every = 1
[evaluate]
max_new_tokens = 4
[evaluate.tasks.echo]
kind = "generation"
path = "echo.jsonl"
[evaluate.tasks.texts]
kind = "perplexity"
path = "texts.txt"
"""
SWEEP = """
name = "more"
recipe = "echo.toml"
seeds = [1, 2]
[[arms]]
name = "both"
[arms.set]
sft.corpora = ["first", "second"]
corpora.second.path = "second.jsonl"
[[arms]]
name = "first-again"
match_tokens = "both"
"""


def write(folder: Path, tree: Path) -> None:
    from graft.model.base import random_llama

    def chats(name, numbers):
        (folder / name).write_text("\n".join(json.dumps({"question": f"say {n}", "answer": f"{n} {n}"}) for n in numbers))

    chats("first.jsonl", range(100, 112))
    chats("second.jsonl", range(200, 224))
    chats("echo.jsonl", range(300, 305))
    (folder / "texts.txt").write_text("\n\n".join("a text of some words " * n for n in (2, 4)))
    train = Train(corpora=("a",), lora=None)
    shape = EmbeddedBase(vocab_size=300, hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1, train=train)
    random_llama(shape, 264, 128, 0).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "echo.toml").write_text(RECIPE.format(deepspeed=tree / "configs/deepspeed/zero2.json"))
    (folder / "more.toml").write_text(SWEEP)


@pytest.fixture(scope="module")
def swept():
    root = Path(tempfile.mkdtemp(prefix="graft-"))  # short: Ray's socket paths have a limit of 107 bytes
    tree = Tree(root, {"GRAFT_PROCESSES": "1", "OMP_NUM_THREADS": "1"})
    write(root, tree.path)
    command = tree.graft("sweep", str(root / "more.toml"), "--workspace", str(root))
    process, deadline = tree.start(*command), time.monotonic() + 400
    try:
        while not list(root.glob(f"checkpoints/more/evaluate/[0-9a-f]*/{MANIFEST}")):  # the first run is complete
            assert process.poll() is None and time.monotonic() < deadline, tree.said()[-4000:]
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    tree.none_alive(within_s=60, but=RAY_AGENTS)
    tree.kept, tree.workspace, tree.command = manifests(root), root, command
    assert not (root / "checkpoints/more/sweep").exists()
    tree.run(*command, "--dry-run")
    tree.after_kill = tree.said().splitlines()[-5:]
    tree.run(*command)
    yield tree
    shutil.rmtree(root, ignore_errors=True)


def manifests(root):
    """When each artifact was made."""
    return {path: path.stat().st_mtime_ns for path in root.glob(f"*/more/*/*/{MANIFEST}") if path.parent.name != "current"}


def evaluations(root):
    """(results.json, {(arm, seed): the tasks of its evaluation})."""
    results = json.loads((root / "checkpoints/more/sweep/results.json").read_text())
    return results, {
        (arm["name"], run["seed"]): json.loads((root / run["evaluation"] / "metrics.json").read_text())["tasks"]
        for arm in results["arms"]
        for run in arm["runs"]
    }


def test_it_goes_on_where_it_was_killed(swept):
    complete, half, *rest, count = swept.after_kill
    assert complete.split()[:4] == ["both", "seed", "1", "complete"] and half.split()[:6] == ["both", "seed", "2", "missing", "sft,", "evaluate"]
    assert [line.split()[:4] for line in rest] == [["first-again", "seed", seed, "missing"] for seed in "12"] and count == "1 of 4 runs are complete"
    assert swept.kept.items() <= manifests(swept.workspace).items(), "what was complete was not made again"


def test_what_runs_have_in_common_is_made_once(swept):
    made = Counter(path.parents[1].name for path in manifests(swept.workspace))
    assert made == {"prepare": 2, "questions": 1, "shard-sft": 2, "sft": 4, "evaluate": 4}


def test_the_control_sees_the_tokens_of_what_it_matches(swept):
    results, _ = evaluations(swept.workspace)
    both, again = results["arms"]
    for a, b in zip(both["runs"], again["runs"], strict=True):
        assert b["rows"] < a["rows"] and b["epochs"] > 1.5
        assert abs(a["tokens_seen"] - b["tokens_seen"]) <= 2 * 64, "of bins of 64, two a step"


def test_the_table_is_the_runs_own_figures(swept):
    results, metrics = evaluations(swept.workspace)
    assert set(metrics) == {(arm, seed) for arm in ("both", "first-again") for seed in (1, 2)}
    table = (swept.workspace / "checkpoints/more/sweep/table.md").read_text()
    for arm in ("both", "first-again"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {arm} "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for cell, task, metric in ((cells[-2], "echo", "rougeL"), (cells[-1], "texts", "perplexity")):
            each = [metrics[arm, seed][task]["systems"]["adapter"][metric]["mean"] for seed in (1, 2)]
            digits = 4 if mean(each) < 10 else 2
            assert cell == f"{mean(each):.{digits}f} ± {stdev(each):.{digits}f}"
    assert table in swept.said(), "and is what was said"
    (apart,) = [d for d in results["differences"] if d["metric"] == "nats_per_token"]
    means = {
        arm: mean(metrics[arm, seed]["texts"]["systems"]["adapter"]["nats_per_token"]["mean"] for seed in (1, 2)) for arm in ("both", "first-again")
    }
    assert (apart["of"], apart["less"], apart["seeds"], apart["rows"]) == ("first-again", "both", 2, 2)
    assert apart["difference"] == pytest.approx(means["first-again"] - means["both"], abs=2e-4)
    plot = ElementTree.parse(swept.workspace / "checkpoints/more/sweep/plot.svg").getroot()
    assert len([c for c in plot.iter("{http://www.w3.org/2000/svg}circle") if c.get("class") == "mean"]) == 4


def test_a_complete_sweep_makes_nothing(swept):
    made = manifests(swept.workspace)
    swept.run(*swept.command)
    swept.run(*swept.command, "--slurm")
    assert swept.said().splitlines()[-1].startswith("# one after another"), "nothing is left to submit"
    assert manifests(swept.workspace) == made


def test_an_arm_that_is_not_made_does_not_hold_up_the_report(swept):
    (swept.workspace / "more.toml").write_text(SWEEP + '[[arms]]\nname = "short"\nset = { shard.seq_len = 32 }\n')
    made = manifests(swept.workspace)
    swept.run(*swept.command, "--report-only")
    results, metrics = evaluations(swept.workspace)
    assert len(metrics) == 4 and [arm["name"] for arm in results["arms"]] == ["both", "first-again"]
    assert "4 of 6 runs are complete" in (swept.workspace / "checkpoints/more/sweep/table.md").read_text() and manifests(swept.workspace) == made
