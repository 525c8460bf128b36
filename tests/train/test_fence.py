import threading
import time

import pytest

from graft.core.errors import TrainError
from graft.train import fence


def named(monkeypatch, attempt):
    monkeypatch.setenv(fence.VARIABLE, attempt)


def test_a_later_attempt_of_the_same_job_takes_over_and_the_earlier_publishes_nothing(tmp_path, monkeypatch):
    named(monkeypatch, "7.0")
    held = fence.hold(tmp_path)
    fence.check(tmp_path)
    waits = threading.Thread(target=lambda: fence.hold(tmp_path).close())
    named(monkeypatch, "7.1")
    waits.start()
    deadline = time.monotonic() + 10
    while (tmp_path / fence.FILE).read_text() != "7.1":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    named(monkeypatch, "7.0")
    with pytest.raises(TrainError, match=r"job 7 \(attempt 1\) has taken this run over, nothing more is written by 7.0"):
        fence.check(tmp_path)
    held.close()
    named(monkeypatch, "7.1")
    waits.join(10)
    fence.check(tmp_path)


@pytest.mark.parametrize("earlier", ["7.1", "8.0", "node:12"])
def test_nobody_else_is_pushed_out(tmp_path, monkeypatch, earlier):
    named(monkeypatch, earlier)
    held = fence.hold(tmp_path)
    named(monkeypatch, "7.0")
    monkeypatch.setattr(fence, "OTHER_JOB_S", 0.5)
    with pytest.raises(TrainError, match="is training here already: follow it by `graft status`"):
        fence.hold(tmp_path)
    assert (tmp_path / fence.FILE).read_text() == earlier
    held.close()


def test_without_a_scheduler_one_waits_for_the_other(tmp_path, monkeypatch):
    monkeypatch.delenv(fence.VARIABLE, raising=False)
    held = fence.hold(tmp_path)
    monkeypatch.setattr(fence, "OTHER_JOB_S", 0.0)
    threading.Timer(0.5, held.close).start()
    began = time.monotonic()
    fence.hold(tmp_path).close()
    assert time.monotonic() - began > 0.4
