import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graft.core.artifact import sha256_file
from graft.core.metrics import read_metrics
from graft.core.recipe import Train
from graft.train.checkpoint import cursor_of, steps
from graft.train.guard import SETTLED, WINDOW, Guard
from graft.train.order import BinOrder

from .small import curve, run_program, small_plan, train

BITWISE = ("step", "loss", "grad_norm", "lr", "targets", "skipped", "bins")


class FakeZero:
    """What Guard uses of DeepSpeed's optimizer: one partition, and the norm that stands before AdamW's step."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, fused=True)
        self.single_partition_of_fp32_groups, self._global_grad_norm = [self.weight], 1.0


def stepping(guard, loss, norm=1.0):
    """Whether the step was taken: (verdict, whether the weights moved)."""
    zero, before = guard.zero, guard.zero.weight.detach().clone()
    guard.judge(torch.tensor([loss, 7.0], dtype=torch.float64), 1)
    zero.weight.grad, zero._global_grad_norm = torch.ones(4), norm
    zero.optimizer.step()
    return guard.verdict(), not torch.equal(before, zero.weight)


def guarded(**settings):
    return Guard(Train(**settings), SimpleNamespace(optimizer=FakeZero()), None)


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, -1.0), (2.0, math.inf)])
def test_what_is_not_finite_leaves_weights_and_moments_as_they_were(loss, norm):
    guard = guarded()
    assert stepping(guard, 2.0) == (None, True)
    moments = {k: v.clone() for k, v in guard.zero.optimizer.state[guard.zero.weight].items()}
    verdict, moved = stepping(guard, loss, norm)
    assert verdict and not moved and guard.state["skipped"] == guard.state["in_a_row"] == 1
    assert all(torch.equal(v, guard.zero.optimizer.state[guard.zero.weight][k]) for k, v in moments.items())
    assert stepping(guard, 2.0) == (None, True) and guard.state["in_a_row"] == 0


def test_the_ripples_of_what_is_learned_by_heart_are_no_spikes():
    guard, noise = guarded(spike_deviations=8), np.random.default_rng(0)
    for _ in range(WINDOW):
        stepping(guard, 0.005 + 0.0002 * noise.random())
    assert stepping(guard, 0.025) == (None, True) and stepping(guard, 0.5)[0]


def test_a_spike_is_what_stands_out_of_the_last_losses():
    guard, noise = guarded(spike_deviations=8), np.random.default_rng(0)
    for step in range(SETTLED):
        assert guard.limit == math.inf, "while nothing is known, nothing is a spike"
        assert stepping(guard, 6 - 0.2 * step) == (None, True)
    for _ in range(WINDOW):  # a curve that has come down forgets where it began
        assert stepping(guard, 1 + 0.1 * noise.standard_normal()) == (None, True)
    limit = guard.limit
    assert 1.5 < limit < 2.2
    assert stepping(guard, limit + 0.01)[0].startswith("the loss is") and guard.limit == limit, "a spike does not count among the losses"
    assert stepping(guard, limit - 0.01) == (None, True)
    off = guarded(spike_deviations=False)
    assert all(stepping(off, loss) == (None, True) for loss in [*[1.0] * 30, 1e6])


def test_noise_and_falling_curves_are_no_spikes():
    """2,000 curves of 300 steps: heavy-tailed noise about a falling mean, none of whose losses lies 8 deviations out but by chance."""
    noise, skipped = np.random.default_rng(1), 0
    for _ in range(200):
        guard = guarded()
        for step in range(300):
            guard.judge(torch.tensor([1 + 5 * math.exp(-step / 40) + 0.2 * abs(noise.standard_t(8))], dtype=torch.float64), 1)
            skipped += guard.verdict() is not None
    print(f"{skipped} of 60,000 steps left out")
    assert skipped <= 6


def replayed(plan, at, *arguments):
    """The artifact of the same run gone on from step `at`."""
    artifact = plan.artifact("sft")
    run = plan.resolve("sft").run_directory
    for folder in steps(run):
        if cursor_of(folder)["step"] > at:
            shutil.rmtree(folder)
    shutil.rmtree(artifact.path)
    code, said = run_program(plan, "poisoned.py", *arguments)
    assert code == 0 and f"resumed at step {at}" in said, said[-3000:]
    return plan.artifact("sft")


def test_steps_left_out_are_recorded_and_the_same_on_replay(tmp_path):
    settings = ("sft.max_steps=30", "sft.epochs=99", "sft.save_every=10", "sft.keep_checkpoints=9", "sft.validate_every=99", "sft.lora=false")
    plan = small_plan(tmp_path, *settings)
    wrong = json.dumps({0: "gradient", 7: "nan", 23: 30.0, 24: "gradient"})
    code, said = run_program(plan, "poisoned.py", wrong)
    assert code == 0 and said.count("is left out") == 4, said[-3000:]
    artifact = plan.artifact("sft")
    lines = list(read_metrics(artifact.path / "metrics.jsonl"))
    skipped = {m["step"]: m for m in lines if "skipped" in m}
    assert [s for s in skipped] == [0, 7, 23, 24] and artifact.counts["skipped_steps"] == 4 and all(len(m["bins"]) == 4 for m in skipped.values())
    assert "nan" in skipped[7]["skipped"] and skipped[7]["loss"] is None and "deviations" in skipped[23]["skipped"]
    last = cursor_of(steps(plan.resolve("sft").run_directory)[-1])
    assert last["optimizer_step"] == 26 and math.isfinite(artifact.counts["loss"])
    weights = sha256_file(artifact.path / "model.safetensors")
    for at in (20, 10):  # between the two kinds, and before
        again = replayed(plan, at, wrong)
        assert sha256_file(again.path / "model.safetensors") == weights
        assert [{k: m.get(k) for k in BITWISE} for m in read_metrics(again.path / "metrics.jsonl")] == [{k: m.get(k) for k in BITWISE} for m in lines]
        assert again.counts["skipped_steps"] == 4
    print("4 of 4 steps left out, 2 of 2 replays bitwise")


def test_too_many_in_a_row_end_the_run_with_one_line_that_says_how_to_go_on(tmp_path):
    settings = ("sft.max_skipped=3", "sft.save_every=2", "sft.max_steps=26", "sft.epochs=99", "sft.validate_every=99")
    plan = small_plan(tmp_path, *settings)
    wrong = json.dumps({2: "nan", 22: 30.0, 23: 30.0, 24: 30.0})
    code, said = run_program(plan, "poisoned.py", wrong)
    (line,) = {line for line in said.splitlines() if line.startswith("graft: ")}
    assert code != 0 and "3 steps in a row" in line and "the last of them 24" in line and "bins [" in line, line
    assert "step-00000024" in line and "sft.spike_deviations = false" in line and "sft.lr" in line, line
    assert cursor_of(steps(plan.resolve("sft").run_directory)[-1])["guard"]["in_a_row"] == 2
    plan = small_plan(tmp_path, *settings, "sft.spike_deviations=false")
    code, said = run_program(plan, "poisoned.py", wrong)
    assert code == 0 and "resumed at step 24" in said, said[-3000:]
    artifact = plan.artifact("sft")
    assert artifact.counts["skipped_steps"] == 3 and [s[0] for s in curve(artifact.path)] == list(range(26))


def test_a_bin_of_noise_among_text_is_found_by_its_loss(tmp_path):
    """Nothing injected: a model that has learnt its text meets the shards' one bin of noise."""
    steps, late = 240, 225
    noise = BinOrder(steps, 3).take(late, 1)[0]
    rng, lens = np.random.default_rng(7), np.array([16, 16], np.int32)
    text = [(np.arange(32) * (number % 3 + 1) + number) % 26 + 60 for number in range(steps)]
    bins = [(rng.integers(4, 260, 32) if n == noise else ids, np.ones(32, np.uint8), lens) for n, ids in enumerate(text)]
    bins = [(ids.astype(np.int32), mask, lens) for ids, mask, lens in bins]
    settings = (
        "sft.epochs=1",
        "sft.global_batch=1",
        "sft.micro_batch=1",
        "sft.lora=false",
        "sft.lr=5e-3",
        "sft.save_every=999",
        "sft.validate_every=999",
    )
    plan = small_plan(tmp_path, *settings, bins=bins)
    assert plan.recipe.seed == 3
    lines = list(read_metrics(train(plan, 1).path / "metrics.jsonl"))
    ((at, skipped),) = {m["step"]: m for m in lines if "skipped" in m}.items()
    assert at == late and skipped["bins"] == [noise] and len(lines) == steps
    print(f"one bin of noise in {steps} steps: {skipped['skipped']}, nothing else")
