"""Start a training stage under `accelerate launch`: `python -m graft.train.launch RECIPE --stage sft`.

One process a GPU, or two on a machine without one (gloo). Several nodes: set NUM_NODES, NODE_RANK, MASTER_ADDR and
MASTER_PORT, as the scripts in slurm/ do. A launch costs about 10 s on two CPU cores.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from graft.core.environment import number
from graft.core.errors import ConfigError, GraftError, NodeFault, Preempted, TrainError
from graft.train.preempt import EXIT_CODE_FILE, RUN_FILE, SIGNALS

CPU_PROCESSES = 2
PR_SET_PDEATHSIG = 1
# of what slurm/train.sbatch warns ahead all but the 10 s that launchers and the job need to leave: a whole 8B model takes two thirds to save
SAVING_S = 170
GPUS = "GRAFT_GPUS"  # of the environment: how many the ranks of this machine must see


def processes_per_node() -> int:
    """GRAFT_PROCESSES, or the GPUs that this process may use, or two on the CPU."""
    return number("GRAFT_PROCESSES", _gpus() or CPU_PROCESSES, 1)


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    # CUDA stops at the first that is none; NoDevFiles is SLURM's for a job without GPUs
    return len(list(takewhile(lambda gpu: gpu not in ("", "-1", "NoDevFiles"), map(str.strip, visible.split(",")))))


def command(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of the launch on this node; ConfigError where what the environment says of it is wrong."""
    each, nodes, rank, port = processes_per_node(), number("NUM_NODES", 1, 1), number("NODE_RANK", 0, 0), number("MASTER_PORT", 0, 1)
    if nodes > 1 and (missing := [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]):
        raise ConfigError(f"NUM_NODES = {nodes}, but no {', '.join(missing)}: set them on each node, as slurm/job.sh does")
    if rank >= nodes:
        raise ConfigError(f"NODE_RANK = {rank}, but NUM_NODES = {nodes}: nodes are counted from 0")
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", str(each * nodes), "--num_machines", str(nodes)]
    argv += ["--machine_rank", str(rank), "--main_process_port", str(port or free_port())]
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the loop sets precision from the recipe
    if nodes > 1:
        argv += [
            "--main_process_ip",
            os.environ["MASTER_ADDR"],
            "--deepspeed_multinode_launcher",
            "standard",
            "--rdzv_backend",
            "static",
            "--same_network",
        ]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // each))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.setdefault("PYTHONWARNINGS", "ignore")
    environment[GPUS] = str(_gpus())
    if not _gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on stdout that it found none
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torchrun passes these on to the ranks, and gives them the time to save
    environment.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2")
    environment.setdefault("PET_SHUTDOWN_TIMEOUT", str(SAVING_S))
    return [*argv, "-m", "graft.train", *arguments], environment


def launch(arguments: list[str], log: Path) -> None:
    """Run to the end. TrainError where training refused, Preempted where it was asked to leave, NodeFault where a process failed or was lost.

    The ranks end with this process, however it ends.

    log: file for the stderr of the launcher, the ranks and their libraries; progress goes to stdout.
    """
    argv, environment = command(arguments)
    _require_free(os.environ.get("MASTER_PORT"))
    told, begun = log.with_suffix(".code"), log.with_suffix(".run")
    for file in (told, begun):
        file.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as stderr, _passing_on() as asked:
        process = subprocess.Popen(
            argv, env=environment | {EXIT_CODE_FILE: str(told), RUN_FILE: str(begun)}, stderr=stderr, preexec_fn=_end_with_parent
        )
        asked.process = process
        if asked.by:
            process.terminate()
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    left, run = (file.read_text(encoding="utf-8") if file.exists() else "" for file in (told, begun))
    for file in (told, begun):
        file.unlink(missing_ok=True)
    if code and asked.by and not left:
        raise _cut_off(asked.by, run)
    if code:
        kind = next((kind for kind in (TrainError, Preempted) if left == str(kind.exit_code)), NodeFault)
        raise kind(_reason(log) or f"training left with exit code {code}: see {log}")


def _cut_off(by: str, run: str) -> TrainError:
    """Of ranks that were asked to leave and could say nothing more. run: its directory, "" where training had not begun."""
    metrics = Path(run, "metrics.jsonl")
    if not run or not metrics.is_file() or not metrics.stat().st_size:
        return Preempted(f"asked to leave ({by}) before the first step: the same command starts again")
    kept = max(Path(run).glob("step-????????"), default=None)  # as checkpoint.steps, which would load torch
    newest = f"the newest checkpoint in {run} is {kept.name}" if kept else f"{run} holds no checkpoint yet"
    return NodeFault(f"asked to leave ({by}), and killed before its checkpoint was whole; {newest}: the same command goes on")


class _Asked:
    by: str | None = None  # the signal
    process: subprocess.Popen[bytes] | None = None

    def pass_on(self, number: int, frame: object) -> None:
        self.by = signal.Signals(number).name
        if self.process:
            self.process.send_signal(number)


@contextmanager
def _passing_on() -> Iterator[_Asked]:
    """While it lasts, what asks this process to leave is passed on to `process`; in the main thread alone, which hears signals."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked.pass_on) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _reason(log: Path) -> str | None:
    """The one line that a rank left for the user."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.removeprefix("graft: ") for line in reversed(lines) if line.startswith("graft: ")), None)


def _require_free(port: str | None) -> None:
    """The launcher of the first node listens there; it would say so with a traceback."""
    if port and os.environ.get("NODE_RANK", "0") == "0":
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the launcher does
            try:
                s.bind(("", int(port)))
            except (OSError, ValueError, OverflowError) as e:
                raise TrainError(f"MASTER_PORT = {port} on {socket.gethostname()} cannot be listened at ({e}): choose another") from None


def free_port() -> int:
    """Of those that neither the system nor Ray gives to whoever does not ask: one given and taken back could be another's a moment later."""
    while True:
        port = random.randrange(20_000, 26_000)  # tests name those from there on some time before anything listens
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def main() -> int:
    with tempfile.NamedTemporaryFile(prefix="graft-launch-", suffix=".log", delete=False) as f:
        log = Path(f.name)
    try:
        launch(sys.argv[1:], log)
    except GraftError as error:
        print(f"graft: {error}", file=sys.stderr)
        return error.exit_code
    log.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
