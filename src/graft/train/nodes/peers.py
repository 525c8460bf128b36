"""The ranks' processes of one machine, as they look after each other: what /proc says of one, its stacks, and its end.

A process is signalled only where it began at the time that it told itself, since the system gives ids out again.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STACK_SIGNAL = signal.SIGRTMIN + 1  # taken by neither NCCL, torchrun, Slurm nor glibc
GONE, STOPPED = "gone", "stopped"
STATES = {
    "T": STOPPED,
    "t": "stopped by a debugger",
    "Z": GONE,
    "X": GONE,
    "D": "in the kernel, waiting for a disk, a network file system or a driver",
}
BUSY = "alive, but no Python runs in it: a call outside Python holds its lock"


class Process(NamedTuple):
    """A rank's process, as its peers must know it."""

    host: str
    machine: str  # equal where process ids mean the same
    pid: int
    started: int  # clock ticks after boot
    stacks: int  # file descriptor that STACK_SIGNAL writes to


def this_process() -> Process:
    """This one, which from now on writes all its stacks when it is sent STACK_SIGNAL: whatever holds Python's lock, and into memory, since a disk may hang."""
    pid = os.getpid()
    stacks = os.memfd_create("stacks")
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return Process(socket.gethostname(), machine, pid, int(_stat(pid)[19]), stacks)


def state(process: Process) -> str:
    """Of a process of this machine, in words."""
    try:
        fields = _stat(process.pid)
    except OSError:
        return GONE
    return STATES.get(fields[0], BUSY) if int(fields[19]) == process.started else GONE


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def end(process: Process) -> bytes:
    """End a silent process of this machine by SIGKILL, within 2 s; returns the stacks that it could write before."""
    found = b""
    with suppress(OSError):
        for number in (STACK_SIGNAL, signal.SIGCONT):  # a stopped one writes as it wakes
            _signal(process, number)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            before, found = found, Path(f"/proc/{process.pid}/fd/{process.stacks}").read_bytes()
            if found and found == before:
                break
            time.sleep(0.1)
    with suppress(OSError):
        _signal(process, signal.SIGKILL)
    return found


def _signal(process: Process, number: int) -> None:
    if state(process) != GONE:
        os.kill(process.pid, number)
