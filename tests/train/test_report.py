"""What a run tells of its steps."""

import pytest
import torch

from graft.core.metrics import read_metrics
from graft.train import report
from graft.train.flops import Flops
from graft.train.sizing.memory import MemoryPlan
from graft.train.sizing.needs import Setting

from .small import small_plan


@pytest.mark.parametrize(("on_gpu", "ceiling", "wanted"), [(True, 500.0, 0.003), (True, None, None), (False, 500.0, None)])
def test_mfu_is_told_against_the_nominal_and_the_measured_peak(tmp_path, monkeypatch, on_gpu, ceiling, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(report, "peak_flops", lambda: 1000e12)
    flops, setting = Flops(matmul=10**9, adapter=0, attention_width=0), MemoryPlan(Setting(1, "none"))
    reporter = report.Reporter(small_plan(tmp_path).resolve("sft"), tmp_path, 10, 0, 2, flops, setting, ceiling)
    reporter.step({"step": 0, "loss": 1.0, "step_time_s": 2.0, "tokens": 1000, "mean_document_tokens": 10.0})  # 6e12 FLOP in 2 s on two GPUs
    counts = reporter.finish()
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    assert step["mfu_nominal"] == counts["mfu_nominal"] == pytest.approx(0.0015)
    assert step["mfu_measured"] == counts.get("mfu_measured") == (wanted and pytest.approx(wanted))


def reporter(plan, tmp_path, first):
    flops = Flops(matmul=10**9, adapter=0, attention_width=0)
    return report.Reporter(plan.resolve("sft"), tmp_path, 4, first, 1, flops, MemoryPlan(Setting(1, "none")))


def test_rates_are_of_training_alone_and_of_the_usual_step(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "peak_flops", lambda: 1e13)
    made = reporter(small_plan(tmp_path), tmp_path, 0)
    for step, seconds, more in ((0, 8.0, {}), (1, 2.0, {"skipped": "nan", "bins": [1]}), (2, 2.0, {}), (3, 4.0, {"validation_s": 84.0})):
        made.step({"step": step, "loss": float(step), "step_time_s": seconds, "tokens": 1000, "mean_document_tokens": 10.0, **more})
    counts = made.finish()
    assert counts["tokens_per_s"] == 250 and counts["step_time_s"] == 3.0 and counts["steps_s"] == 100.0
    assert counts["mfu_nominal"] == pytest.approx(0.225), "the median of 0.075, 0.3, 0.3 and 0.15"
    assert counts["loss"] == 3.0


def test_a_launch_that_only_publishes_tells_the_figures_of_the_one_before(tmp_path):
    """Killed between its last checkpoint and publishing."""
    plan = small_plan(tmp_path)
    for first, count in ((0, 2), (2, 2), (4, 0)):
        made = reporter(plan, tmp_path, first)
        for step in range(first, first + count):
            made.step(
                {"step": step, "loss": 9.0 - step, "validation_loss": 5.0, "step_time_s": 1.0 + first, "tokens": 6, "mean_document_tokens": 3.0}
            )
        counts = made.finish()
        assert (counts["loss"], counts["validation_loss"]) == (8.0 if first == 0 else 6.0, 5.0)
        assert counts["tokens_per_s"] == {0: 6.0, 2: 2.0, 4: 3.0}[first], "of this launch, or where it took no step, of all"
