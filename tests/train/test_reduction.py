"""However a step is split over ranks and micro-batches, its gradient is the same: that of DistributedDataParallel, reduced once a step."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from graft.train.profile import AFTER, STEPS

from .small import curve, environment, small_plan, start, train

BATCH = 8  # bins a step, of 14: an epoch ends inside a step
MICRO = (4, 2, 1)  # on two ranks one, two and four micro-batches; on one rank twice as many
SETTINGS = (f"sft.global_batch={BATCH}", f"sft.max_steps={AFTER + STEPS}", "sft.epochs=10", "sft.save_every=100", "sft.lr=1e-3")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """(plan, artifact) by (ranks, bins a micro-batch)."""
    found = {}
    for ranks in (1, 2):
        for micro in MICRO:
            plan = small_plan(tmp_path_factory.mktemp(f"{ranks}-{micro}"), *SETTINGS, f"sft.micro_batch={micro}")
            found[ranks, micro] = plan, train(plan, ranks, *(["--profile"] if ranks == 2 else []))
    return found


def difference(ours, theirs):
    """The largest relative difference, (of the loss, of the gradient norm)."""
    return tuple(max(abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(ours, theirs, strict=True)) for n in (0, 1))


def figures(artifact):
    return [(loss, norm) for _, loss, norm, *_ in curve(artifact.path)]


def test_the_six_splits_of_a_batch_give_the_same_losses_and_gradient_norms(splits):
    first = figures(splits[1, 4][1])
    targets = [m[4] for m in curve(splits[1, 4][1].path)]
    assert max(targets) > 1.2 * min(targets), "targets are spread unevenly over steps, and more so over bins"
    found = {}
    for (ranks, micro), (_, artifact) in splits.items():
        assert artifact.counts["processes"] == ranks and artifact.counts["steps"] == len(first)
        found[ranks, micro] = difference(figures(artifact), first)
        print(f"{ranks} ranks, {micro} x {BATCH // ranks // micro}: loss {found[ranks, micro][0]:.1e}, gradient norm {found[ranks, micro][1]:.1e}")
    assert max(map(max, found.values())) < 1e-5, found


def test_the_ranks_meet_once_a_step_however_many_micro_batches_it_has(splits):
    """Counted in the trace of --profile: all that gloo was asked to do in STEPS steps."""
    found = {}
    for micro in MICRO:
        trace = splits[2, micro][0].resolve("sft").run_directory / "trace.json.gz"
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        found[BATCH // 2 // micro] = Counter(e["name"] for e in events if e.get("name", "").startswith("gloo:"))
    print({accumulated: dict(counted) for accumulated, counted in found.items()})
    assert found[1]["gloo:all_reduce"] >= 3 * STEPS, "of the loss, the gradients and their norm"
    assert found[1] == found[2] == found[4]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_zero_2_has_the_losses_and_gradient_norms_of_ddp(splits, tmp_path, lora):
    """Four micro-batches a step on two ranks; with and without clipping, whose factor is of the norm."""
    plan, artifact = splits[2, 1]
    if not lora:
        plan = small_plan(tmp_path, *SETTINGS, "sft.micro_batch=1", "sft.lora=false", "sft.lr=1e-4")
        artifact = train(plan)
    out = tmp_path / "ddp.json"
    worker = [str(Path(__file__).with_name("ddp.py")), str(out), str(plan.path), str(plan.root), *plan.overrides]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, *worker], env=environment(2), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = figures(artifact), json.loads(out.read_text())
    loss, norm = difference(ours, theirs)
    print(
        f"{'lora' if lora else 'full'}: loss {loss:.1e}, gradient norm {norm:.1e} over norms {min(n for _, n in ours):.2f} to {max(n for _, n in ours):.2f}"
    )
    assert loss < 1e-6 and norm < 1e-6


def test_another_zero_stage_is_refused_in_one_line(tmp_path):
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    process = start(small_plan(tmp_path, "deepspeed=zero3.json"), 2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and said == "graft: deepspeed = 'zero3.json' has zero_optimization.stage = 3: graft trains with 1 or 2\n"
