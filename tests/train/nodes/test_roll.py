"""A launcher whose machine stops answering ends the preflight too, in time and in one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ...ports import free_port

LAUNCHER = "import torch.distributed as d, time; s = d.TCPStore('127.0.0.1', {port}, is_master=True, wait_for_workers=False); print(flush=True); time.sleep(99)"
RANK = """
import sys
from graft.core.errors import NodeFault
from graft.train.nodes.roll import Roll
print(flush=True)
input()
try:
    roll = Roll(("a step",), {deadline_s})
    print(flush=True)
    input()
    roll.begin("a step")
except NodeFault as e:
    sys.exit("graft: " + str(e))
"""
DEADLINE_S = 2


def started(program, **variables):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | variables, text=True, **pipes)
    process.stdout.readline()
    return process


@pytest.mark.parametrize("connected", [True, False])
def test_a_launcher_that_does_not_answer_is_named_in_time(connected):
    port = str(free_port())
    launcher = started(LAUNCHER.format(port=port))
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    rank = started(RANK.format(deadline_s=DEADLINE_S), **variables)
    try:
        if connected:
            rank.stdin.write("\n")
            rank.stdin.flush()
            rank.stdout.readline()
        launcher.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, said = rank.communicate("\n", timeout=2 * DEADLINE_S + 20)
        print(f"ended {time.monotonic() - began:.1f} s after its launcher stopped")
        assert said.count("\n") == 1 and f"the launcher at 127.0.0.1:{port}" in said and "does not answer" in said, said
        assert rank.returncode == 69 or not connected
    finally:
        rank.kill()
        launcher.kill()
