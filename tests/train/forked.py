"""Ranks of training stages, forked from a process that has imported what they need: a start costs about a second, not ten.

`Host` is for tests; run as a script this file is that process. What users start, the launcher, is in test_two_process.py and
test_resume.py. A rank writes which bins it trained on, and can be told to end by SIGKILL, as a machine that is lost ends.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from graft.train.launch import free_port

LIMIT_S = 240  # of one start


class Host:
    """With OMP_NUM_THREADS = 1, so that what it says of the last bits holds on every machine."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.starts = 0

    def train(self, plan, world, lose_after=None):
        """Start the sft stage in `world` processes; returns [(step, bins)] of this start, of all ranks together.

        lose_after: all ranks end by SIGKILL when the checkpoint of so many steps is whole and one more step is done.
        """
        folder, codes = self._start(plan, world, lose_after=lose_after)
        said = "".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
        assert codes == [0] * world if lose_after is None else -signal.SIGKILL in codes, f"{codes}\n{said}"
        ranks = [[json.loads(line) for line in (folder / f"{rank}.bins").read_text().splitlines()] for rank in range(world)]
        whole = [step for step, _ in min(ranks, key=len)]
        return [(step, sorted(i for rank in ranks for i in dict(rank)[step])) for step in whole]

    def kill(self, plan, world, rank, at):
        """Start it, with SIGKILL to `rank` before number `at` of its file operations in saves, and then to the others.

        None where that came about, otherwise how many operations there were in the whole run.
        """
        folder, codes = self._start(plan, world, kill=[rank, at])
        counted = folder / "operations"
        assert codes == [0] * world if counted.exists() else codes[rank] == -signal.SIGKILL, codes
        return int(counted.read_text()) if counted.exists() else None

    def _start(self, plan, world, **told):
        """(a folder of what the ranks left, their exit codes)."""
        self.starts += 1
        asked = {"world": world, "port": free_port(), "folder": str(plan.root / f"start-{self.starts}"), **told}
        asked["plan"] = [str(plan.path), str(plan.root), *plan.overrides]
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Path(asked["folder"]), json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def _forget_the_parents_randomness():
    """What is drawn without a seed shall differ from start to start, as in processes of their own."""
    import random

    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()


def rank_of(rank, asked):
    """In a forked process: train, as this rank."""
    folder, world, lose_after = Path(asked["folder"]), asked["world"], asked.get("lose_after")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked["port"])}
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _forget_the_parents_randomness()
    from killed import Operations

    from graft.core.shards import ShardSet
    from graft.core.stages import Plan
    from graft.train import checkpoint, feed, loop

    read, bin_at, collate, take, save = feed.Feed._read, ShardSet.bin, feed.collate, feed.Feed.take, checkpoint.Writer.save
    number, own, of_step = {}, [], {}
    trained = (folder / f"{rank}.bins").open("w")

    def known(shards, i):
        found = bin_at(shards, i)
        number[id(found)] = int(i), found  # held, so that no other gets its id
        return found

    def collected(bins):
        own.extend(number[id(b)][0] for b in bins if id(b) in number)  # those of the validation were read before any step
        return collate(bins)

    def noted(self, step):
        number.clear()
        own.clear()
        found = read(self, step)
        of_step[step] = list(own)
        return found

    def taken(self, step):
        if lose_after is not None and step == lose_after + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        found = take(self, step)
        trained.write(json.dumps([step, of_step[step]]) + "\n")
        trained.flush()
        return found

    def saved(writer, *given):
        why, cursor = save(writer, *given), given[-1]
        return writer.finish() if cursor["step"] == lose_after else why

    ShardSet.bin, feed.collate, feed.Feed._read, feed.Feed.take, checkpoint.Writer.save = known, collected, noted, taken, saved
    recipe, workspace, *overrides = asked["plan"]
    job = Plan(recipe, tuple(overrides), workspace).resolve("sft")
    killed, at = asked.get("kill", (None, None))
    operations = Operations(at) if killed == rank else None
    loop.run(job)
    if operations:
        (folder / "operations").write_text(str(operations.count))


def ended(processes):
    """Their exit codes, minus the signal's number where one ended them; when one is lost, the others are too."""
    codes, until = {}, time.monotonic() + LIMIT_S
    while len(codes) < len(processes):
        for pid in processes:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if any(codes.values()) or time.monotonic() > until:
            for pid in processes:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)
    return [codes[pid] for pid in processes]


def _import_all():
    """By use: much is imported, and built once a process, when it is first needed."""
    import bitsandbytes  # noqa: F401
    import torch._dynamo.trace_rules
    from deepspeed.ops import __compatible_ops__  # noqa: F401
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    from small import small_plan

    import graft.train.loop  # noqa: F401
    from graft.core.shards import ShardSet
    from graft.model.base import load_base

    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    with tempfile.TemporaryDirectory() as folder:
        plan = small_plan(Path(folder))
        load_base(*plan.base_model("sft"), "fp32", torch.device("cpu"))
        ShardSet.open(plan.artifact("shard-sft").path / "train")


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    _import_all()
    for line in sys.stdin:
        asked = json.loads(line)
        Path(asked["folder"]).mkdir()
        processes = []
        for rank in range(asked["world"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    rank_of(rank, asked)
                    code = 0
                except BaseException:  # noqa: BLE001
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            processes.append(pid)
        answers.write(json.dumps(ended(processes)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
