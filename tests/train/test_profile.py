"""Three steps' table and trace."""

import gzip
import json

import pytest
import torch

from graft.train.profile import AFTER, STEPS, Profiler, waits


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table is of kernels there")
def test_it_records_some_steps_after_the_first(tmp_path):
    profiler = Profiler(tmp_path)
    x = torch.randn(50, 50)
    for done in range(1, AFTER + STEPS + 2):
        torch.mm(x, x)
        profiler.step(done)
    table = (tmp_path / "profile.txt").read_text()
    assert "ms a step in all" in table and "1 x  aten::mm" in table
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(e.get("name") == "aten::mm" for e in events) == STEPS


def test_waits_are_told_by_what_ran_before_and_after():
    kernels = [(0.0, 100.0, "a"), (50.0, 80.0, "inside"), (1100.0, 1200.0, "b"), (1200.0, 1300.0, "a"), (3300.0, 3400.0, "b"), (3500.0, 3600.0, "c")]
    first, *others = waits(kernels, steps=2)
    assert first.split(maxsplit=1) == ["1.55", "ms a step in which the GPU waits"]
    assert [line.split(maxsplit=4) for line in others] == [["1.50", "ms", "1", "x", "a -> b"], ["0.05", "ms", "0", "x", "b -> c"]]
    assert waits([], steps=1) == ["      0.00 ms a step in which the GPU waits"]
