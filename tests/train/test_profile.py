"""Three steps' table and trace."""

import gzip
import json

import pytest
import torch

from graft.train.profile import AFTER, STEPS, Profiler


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
