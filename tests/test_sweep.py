"""A sweep over a workspace, before anything runs: what is wrong is one line that names the arm, and runs that have something in common share it."""

import re
import shlex

import pytest

from graft.cli import main
from graft.core.stages import Plan
from graft.sweep import SHARDS, Sweep
from graft.train.split import total_steps

from .train.small import small_plan

ASKED = """
[evaluate.tasks.chat]
kind = "generation"
path = "chat.jsonl"
"""
SWEEP = """
name = "study"
recipe = "small.toml"
seeds = [1, 2]
[[arms]]
name = "long"
[arms.set]
sft.epochs = 3
[[arms]]
name = "wide"
[arms.set]
sft.lora.r = 8
corpora.other.path = "chat.jsonl"
sft.corpora = ["other"]
[[arms]]
name = "wide-again"
match_tokens = "long"
[arms.set]
sft.global_batch = 2
corpora.other.path = "chat.jsonl"
sft.corpora = ["other"]
"""
ROWS = '{"question": "a", "answer": "b"}\n'


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A recipe of chats from a file, and a sweep of it."""
    monkeypatch.chdir(tmp_path)
    small_plan(tmp_path)
    recipe = tmp_path / "small.toml"
    text = recipe.read_text().split("[augment]")
    corpus = '[corpora.chats]\npath = "chats.jsonl"\n' + "[shard]" + text[1].split("[shard]")[1].replace("[sft]", '[sft]\ncorpora = ["chats"]')
    recipe.write_text(text[0] + corpus + ASKED)
    for name in ("chats.jsonl", "chat.jsonl"):
        (tmp_path / name).write_text(ROWS)
    (tmp_path / "study.toml").write_text(SWEEP)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sft.epochs = 3", "sft.epoch = 3", "arm 'long': .*unknown key 'sft.epoch': did you mean 'sft.epochs'"),
        ("sft.epochs = 3", "evaluate.max_new_tokens = 3", r"arm 'long': it changes \[evaluate\]"),
        ("sft.lora.r = 8", "sft.lora.r = 128", "arm 'wide': .*sft.lora.r = 128 and serve.max_rank"),
        ('path = "chat.jsonl"', 'path = "gone.jsonl"', "arm 'wide': corpora.other.path names .*gone.jsonl"),
        ('"small.toml"', '"smal.toml"', "no recipe at .*smal.toml: that folder has small.toml, study.toml"),
        ('"study"', '"base"', "study.toml: arm 'long': .*name = 'base' is what servers call the untrained model"),
        ("match_tokens", "match_token", "did you mean 'arms.match_tokens'"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(work, capsys, old, new, said):
    refused(work, capsys, said, SWEEP.replace(old, new, 1))


def test_a_recipe_without_evaluation_has_nothing_to_compare(work, capsys):
    recipe = work / "small.toml"
    recipe.write_text(recipe.read_text().replace(ASKED, ""))
    refused(work, capsys, r"nothing to compare: add \[evaluate.tasks.NAME\]", SWEEP)


def test_nothing_complete_is_nothing_to_report(work, capsys):
    refused(work, capsys, "no run of 'study' is complete: `graft sweep study.toml` makes them", SWEEP, "--report-only")


def refused(work, capsys, said, sweep, *options):
    (work / "study.toml").write_text(sweep)
    assert main(["sweep", "study.toml", *options]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.startswith("graft: ") and err.count("\n") == 1
    assert not list(work.glob("*/study/*/*/manifest.json"))


def make_data(sweep):
    """The data stages of every run, by hand: 14 bins of the recipe's own corpus, 5 of the other."""
    for run in sweep.runs:
        for stage in ("prepare", "questions", SHARDS):
            job = run.plan.resolve(stage)
            if job.artifact is None:
                with job.writing() as draft:
                    bins = 14 if run.arm.name == "long" else 5
                    (draft.path / "made.txt").write_text(f"{stage} {bins}")
                    draft.counts["train"] = {"bins": bins, "tokens": bins * (20 if bins == 14 else 30)}


def test_what_is_missing_is_told_and_what_runs_share_is_one(work, capsys):
    assert main(["sweep", "study.toml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    waits = " (steps: once long has its shards)"
    missing = "missing   prepare, questions, shard-sft, sft, evaluate"
    told = [f"{arm:<10}  seed {seed:<6} {missing}{waits * (arm == 'wide-again')}" for arm in ("long", "wide", "wide-again") for seed in (1, 2)]
    assert lines == [*told, "0 of 6 runs are complete"] and not list(work.glob("*/study/*/*"))
    make_data(Sweep("study.toml"))
    found = {(run.arm.name, run.seed): run.artifacts() for run in Sweep("study.toml").runs}
    for stage, count in (("prepare", 2), (SHARDS, 2)):
        assert len({artifacts[stage].path for artifacts in found.values()}) == count, "of all seeds, and of arms that differ in training alone"
    fingerprints = {run.plan.resolve("sft").fingerprint for run in Sweep("study.toml").runs}
    assert len(fingerprints) == 6


def test_equal_tokens_to_the_nearest_step(work):
    waiting = Sweep("study.toml")
    assert [run.settled for run in waiting.runs] == [True] * 4 + [False] * 2
    make_data(waiting)
    waiting.settle()
    # long: 14 bins, 3 epochs, 4 a step: 10 steps of 4 x 20 tokens; wide-again: 2 x 30 tokens a step
    for run in waiting.runs[4:]:
        sft = run.plan.recipe.sft
        assert run.settled and sft.max_steps == round(10 * 4 * 20 / 60) == 13
        assert total_steps(5, sft.epochs, sft.global_batch, sft.max_steps) == 13
    sweep = SWEEP.replace("sft.epochs = 3", "sft.max_steps = 2")
    (work / "study.toml").write_text(sweep)
    assert Sweep("study.toml").runs[-1].plan.recipe.sft.max_steps == 3, "a maximum counts: 2 x 4 x 20 tokens"


def test_the_printed_commands_are_the_runs(work, capsys):
    make_data(Sweep("study.toml"))
    sweep = Sweep("study.toml")
    assert main(["sweep", "study.toml", "--slurm"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("# one after another") and len(lines) == 6
    for line, run in zip(lines, sweep.runs, strict=True):
        words = shlex.split(line)
        assert words[:6] == ["graft", "run", "small.toml", "--slurm", "--until", "evaluate"]
        sets = tuple(words[n + 1] for n, word in enumerate(words) if word == "--set")
        assert Plan(words[2], sets).resolve("sft").fingerprint == run.plan.resolve("sft").fingerprint


def test_a_run_that_fails_ends_it_in_one_line_that_names_it(work, capsys):
    make_data(sweep := Sweep("study.toml"))
    with sweep.runs[0].plan.lock():
        assert main(["sweep", "study.toml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("graft: arm 'long', seed 1: another `graft run` works on 'study'") and err.count("\n") == 1
