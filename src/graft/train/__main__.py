"""`accelerate launch ... -m graft.train RECIPE --stage sft`: one rank of a training stage. launch/train.sh starts it right."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback

from graft.core import tracking
from graft.core.errors import ConfigError, GraftError, TrainError
from graft.core.stages import Job, Plan
from graft.train.nodes.watch import Watch
from graft.train.preempt import leave


def main() -> int:
    parser = argparse.ArgumentParser(prog="graft.train", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--stage", choices=["base", "cpt", "sft"], help="default: the first of the recipe's that is not complete")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--workspace", default=".")
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of three steps, and a table of where their time goes, beside metrics.jsonl"
    )
    parser.add_argument("--allow-data-change", action="store_true", help="go on from an unfinished run of this stage over other data")
    args = parser.parse_args()
    try:
        plan = Plan(args.recipe, tuple(args.overrides), args.workspace, hub="recorded")
        job = plan.resolve(args.stage) if args.stage else _first_missing(plan)
        if job.artifact:
            if os.environ.get("RANK", "0") == "0":
                print(f"train {job.stage.name}: complete at {job.directory}")
            return 0
        if os.environ.get("RANK", "0") == "0":
            tracking.check(plan.recipe.tracking)
        from graft.train.loop import run

        run(job, args.profile, args.allow_data_change)
    except Exception as e:  # noqa: BLE001 the other ranks must hear of a bug too
        _leave_with(e)
    return 0


def _first_missing(plan: Plan) -> Job:
    """Of the recipe's training stages the first that is not complete, or the last."""
    stages = plan.recipe.train_stages()
    if not stages:
        raise ConfigError(f"recipe {plan.recipe.name!r} trains nothing: it has no [sft]")
    for stage in stages:
        job = plan.resolve(stage)
        if job.artifact is None:
            break
    return job


def _leave_with(error: Exception) -> None:
    """A GraftError's line or a bug's traceback, from every rank: the first to leave ends the others, and it may not be 0; the launcher says the line once."""
    sys.stdout.flush()
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error):  # safetensors says it in words
        error = TrainError(f"the disk is full ({error}): make room and start again, what is complete stays")
    line, code = (str(error), error.exit_code) if isinstance(error, GraftError) else (None, 1)
    if line is None:
        traceback.print_exception(error)
    if watch := Watch.running:
        watch.fail(line or f"{type(error).__name__}: {error}", code, bug=line is None)
    leave(line, code)  # other ranks may wait in a collective: at once


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; to take PyTorch, transformers and DeepSpeed apart again takes the interpreter seconds
