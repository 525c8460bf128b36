"""One launch of a made training stage that is tracked: `tracked.py ROOT FIRST LAST END [OVERRIDE…]`; END: finish, kill, leave or cut (the server's network)."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from graft.core import tracking
from graft.core.errors import GraftError
from graft.core.metrics import MetricsWriter

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.report.made import make, plan_in


def main(root, first, last, end, *overrides):
    tracking.BEGIN_S = tracking.END_S = float(os.environ.get("PATIENCE_S", "30"))
    plan = plan_in(Path(root), *overrides)
    if not (plan.home("checkpoints") / "merge").exists():
        make(plan, "merge")
    job = plan.resolve("sft")
    try:
        if end == "check":
            return tracking.check(plan.recipe.tracking)
        writer = MetricsWriter(job.run_directory / "metrics.jsonl", int(first))
        tracker = tracking.begin(job, job.run_directory / "metrics.jsonl")
    except GraftError as e:
        sys.exit(f"graft: {e}")
    for step in range(int(first), int(last)):
        line = {"step": step, "loss": 1 / (step + 1), "first": int(first), "validation_loss": None, "skipped": "spike" if step == 3 else None}
        writer.write(line)
        tracker.log(line)
    if end == "kill":
        time.sleep(float(os.environ.get("LINGER_S", "0")))
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "cut":
        print("begun", flush=True)
        sys.stdin.readline()
        tracker.log({"step": int(last), "loss": 0.0})
    with job.writing() as draft:
        (draft.path / "adapter_model.safetensors").write_bytes(b"the weights")
        draft.counts.update(json.loads('{"loss": 0.5}'))
    if end == "finish":
        tracker.table("evaluation", ("task", "system", "metric", "value"), [("chat", "adapter", "rougeL", 0.5)], {"chat/adapter/rougeL": 0.5})
    tracker.finish(job.artifact)
    print("finished", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
