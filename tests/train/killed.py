"""One rank of a training stage that kills itself at a file operation of a save: `accelerate launch killed.py RECIPE WORKSPACE RANK AT COUNTED OVERRIDE…`.

Counted are what Python opens, makes, renames and removes under the run's directory for checkpoints, each fsync, and the
writing of tensors, which safetensors does outside Python's sight.
"""

import json
import os
import signal
import sys
from pathlib import Path

from graft.core.stages import Plan
from graft.train import checkpoint, loop

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def main(recipe, workspace, rank, at, counted, *overrides):
    count = 0

    def operation():
        nonlocal count
        count += 1
        if count == int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == rank:
        tensors, fsync = checkpoint.save_file, os.fsync

        def seen(event, given):
            if event in EVENTS and isinstance(given[0], (str, Path)) and "/step-" in str(given[0]).replace("/.step-", "/step-"):
                operation()

        def written(*given, **named):
            operation()
            tensors(*given, **named)
            operation()

        def synced(file):
            operation()
            fsync(file)

        sys.addaudithook(seen)
        checkpoint.save_file, os.fsync = written, synced
    loop.run(Plan(recipe, overrides, workspace).resolve("sft"))
    if os.environ["RANK"] == rank:
        Path(counted).write_text(json.dumps(count))


main(*sys.argv[1:])
