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
