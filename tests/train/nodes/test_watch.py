"""A rank that hangs, fails or is lost is named and ends the others in time, in real runs of two processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.core.metrics import read_metrics
from graft.train import fence
from graft.train.checkpoint import newest
from graft.train.launch import command
from graft.train.nodes.alarm import Answer, blame
from graft.train.nodes.peers import GONE, STOPPED, end, state, this_process
from graft.train.nodes.watch import SLOW, Watch, overdue

from ..small import curve, environment, small_plan, start
from ..test_resume import ranks_of

TIMEOUT_S = 5
WITHIN_S = TIMEOUT_S + 30
CAMPAIGN = pytest.mark.campaign


def plan_in(root, timeout_s=TIMEOUT_S, steps=40):
    return small_plan(
        root, f"sft.hang_timeout_s={timeout_s}", f"sft.max_steps={steps}", "sft.epochs=99", "sft.save_every=3", "sft.validate_every=1000"
    )


def until(condition, process):
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def steps_done(run):
    return len(list(read_metrics(run / "metrics.jsonl"))) if (run / "metrics.jsonl").exists() else 0


def ended(process, plan):
    """(the one line of the run, all that it said, seconds that it took from now); nothing of it is left."""
    began = time.monotonic()
    said, _ = process.communicate(timeout=150)
    took = time.monotonic() - began
    left = subprocess.run(["pgrep", "-f", str(plan.path)], capture_output=True, text=True).stdout
    assert not left, f"left: {left}"
    lines = set(re.findall("^graft: (.*)", said, re.MULTILINE))
    assert len(lines) <= 1, said[-3000:]
    return (lines or {""}).pop(), said, took


def wrong(plan, how, rank, processes=2):
    """Run until `rank` goes wrong at step 4: what ended() returns."""
    file = plan.root / "wrong"
    argv, variables = command([how, str(rank), "4", str(file), str(plan.path), "--stage", "sft", "--workspace", str(plan.root)])
    sets = [word for o in plan.overrides for word in ("--set", o)]
    module = argv.index("graft.train") - 1
    argv = [*argv[:module], str(Path(__file__).with_name("hung.py")), *argv[module + 2 :], *sets]
    process = subprocess.Popen(argv, env=variables | environment(processes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(file.exists, process)
    return ended(process, plan)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank_is_named_and_ended_in_time(tmp_path, rank):
    plan = plan_in(tmp_path)
    process, run = start(plan, 2), plan.resolve("sft").run_directory
    until(lambda: steps_done(run) >= 5, process)
    os.kill(ranks_of(plan)[rank], signal.SIGSTOP)
    line, said, took = ended(process, plan)
    print(f"rank {rank} stopped: named and ended after {took:.1f} s, {TIMEOUT_S} of them its time")
    assert took < WITHIN_S and process.returncode == 69 and "Traceback" not in said, said[-3000:]
    found, _ = newest(run)
    assert re.search(rf"sft: hung at .*: rank {rank} on \S+ does not answer \(stopped\); stacks in {run}/hang, ", line), line
    assert found and f"the last checkpoint is {found.name} in {run}" in line
    for n in range(2):
        stacks = (run / "hang" / f"rank-{n:05d}.txt").read_text()
        assert "Thread 0x" in stacks and "loop.py" in stacks and " in _train" in stacks and f"rank {n} on" in stacks, stacks
    if rank:
        stopped_at = {f.name: f.stat().st_mtime for f in (run / "hang").iterdir()}
        process = start(plan_in(tmp_path, 15), 2)
        line, said, _ = ended(process, plan)
        assert process.returncode == 0 and not line and "hung" not in said, said[-3000:]
        assert stopped_at == {f.name: f.stat().st_mtime for f in (run / "hang").iterdir()}, "an undisturbed run raises no alarm"
        assert [s[0] for s in curve(plan.resolve("sft").artifact.path)] == list(range(40))


def test_a_killed_rank_ends_the_others_at_once(tmp_path):
    plan = plan_in(tmp_path, 600)
    process, run = start(plan, 2), plan.resolve("sft").run_directory
    until(lambda: steps_done(run) >= 5, process)
    os.kill(ranks_of(plan)[1], signal.SIGKILL)
    line, _, took = ended(process, plan)
    print(f"rank 1 killed: named and ended after {took:.1f} s")
    assert took < 15 and process.returncode == 69
    assert re.search(r"sft: rank 1 on \S+ is gone \(killed\? out of memory\?\), the last checkpoint is step-", line), line


@pytest.mark.parametrize(
    ("how", "processes", "blamed"),
    [
        pytest.param("sleeps", 2, r"rank 1 on \S+ has been at \S+hung.py:\d+ in take_or_hang for \d+ s, the others wait for it; ", id="sleeps"),
        pytest.param("sleeps", 1, r"rank 0 on \S+ has been at \S+hung.py:\d+ in take_or_hang for \d+ s; ", marks=CAMPAIGN, id="alone"),
        pytest.param("holds", 2, r"rank 1 on \S+ does not answer \(alive, but no Python runs in it", marks=CAMPAIGN, id="holds the lock"),
    ],
)
def test_a_rank_that_hangs_in_its_program_is_named_with_the_place(tmp_path, monkeypatch, how, processes, blamed):
    monkeypatch.setenv("GRAFT_PROCESSES", str(processes))
    plan = plan_in(tmp_path)
    line, said, took = wrong(plan, how, processes - 1, processes)
    print(f"rank {processes - 1} of {processes} {how}: named and ended after {took:.1f} s")
    assert took < WITHIN_S and re.search(rf"sft: hung at step 4: {blamed}", line), said[-3000:]
    stacks = (plan.resolve("sft").run_directory / "hang" / f"rank-{processes - 1:05d}.txt").read_text()
    assert "in take_or_hang" in stacks


@pytest.mark.parametrize("how", ["raises", pytest.param("refuses", marks=CAMPAIGN)])
def test_a_rank_that_fails_takes_the_others_along(tmp_path, monkeypatch, how):
    monkeypatch.setenv("GRAFT_PROCESSES", "2")
    line, said, took = wrong(plan_in(tmp_path, 600), how, 1)
    print(f"rank 1 {how}: ended after {took:.1f} s")
    assert took < 15
    if how == "raises":
        assert not line and "ValueError: of no use" in said, "its traceback is in the log"
    else:
        assert line == "will not" and "TrainError: will not" not in said


def test_who_is_at_fault():
    def answer(collectives, at="loop.py:1 in run"):
        return Answer("a", "step 7", 612.4, collectives, at)

    waiting = answer(80, "c10d.py:9 in all_reduce")
    late = answer(79, "feed.py:3 in take")
    assert blame({0: waiting, 1: late, 2: waiting}, {}) == "rank 1 on a has been at feed.py:3 in take for 612 s, the others wait for it"
    assert blame({0: waiting, 1: late, 2: late}, {}) == "rank 1 on a has been at feed.py:3 in take for 612 s, rank 2 too, the others wait for it"
    assert blame({0: late}, {}) == "rank 0 on a has been at feed.py:3 in take for 612 s"
    assert blame({0: waiting, 1: waiting}, {}).startswith("no rank is behind the others, all wait for a GPU or the network")
    silent = {1: ("a", STOPPED), **{r: ("b", None) for r in range(8, 18)}}
    assert blame({0: waiting}, silent) == "rank 1 on a does not answer (stopped), ranks 8, 9, 10, 11, 12, 13, 14, 15 and 2 more on b do not answer"


def test_how_long_a_mark_may_stay():
    assert not overdue(599, False, 600) and overdue(600, False, 600)
    assert not overdue(SLOW * 600 - 1, True, 600) and overdue(SLOW * 600, True, 600)
    assert not overdue(900, False, 600, excused_s=400) and overdue(1000, False, 600, excused_s=400)
    assert overdue(SLOW * 600, False, 600, excused_s=SLOW * 600), "however long another rank takes"


def test_only_the_process_that_a_rank_was_is_signalled():
    own = this_process()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    peer = own._replace(pid=child.pid, started=started)
    other = peer._replace(started=started - 1)
    try:
        child.send_signal(signal.SIGSTOP)
        until(lambda: state(peer) == STOPPED, child)
        assert state(other) == GONE
        end(other)
        assert state(peer) == STOPPED, "it lives, and was not woken"
        end(peer)
        assert child.wait(10) < 0 and state(peer) == GONE
    finally:
        child.kill()


def watched(run, how):
    program = [sys.executable, str(Path(__file__).with_name("watched.py")), str(run), how]
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {fence.VARIABLE: "7.0" if how == "unreadable" else ""}
    )


def test_a_disk_that_fails_for_a_moment_ends_no_watch(tmp_path):
    process = watched(tmp_path, "unreadable")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "job 7 (attempt 1) has taken this run over" in said and "Traceback" not in said, said


def test_another_run_is_waited_for_as_long_as_it_takes(tmp_path, monkeypatch):
    monkeypatch.delenv(fence.VARIABLE, raising=False)
    held = fence.hold(tmp_path)
    process = watched(tmp_path, "waits")
    assert "waiting for it to leave" in process.stdout.readline()
    time.sleep(6)  # more than SLOW times its hang_timeout_s, and two looks
    held.close()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_a_mark_costs_nothing():
    watch = object.__new__(Watch)
    began = time.perf_counter()
    for step in range(1000):
        watch.at(f"step {step}")
    each_us = (time.perf_counter() - began) * 1e3
    print(f"a mark takes {each_us:.2f} us")
    assert each_us < 50
