"""A training stage that is asked to leave in its second step: `accelerate launch leaving.py RECIPE WORKSPACE STAGE OVERRIDE…`."""

import os
import signal
import sys

from graft.train import __main__ as rank
from graft.train.feed import Feed


def main(recipe, workspace, stage, *overrides):
    take = Feed.take

    def taken(feed, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(feed, step)

    Feed.take = taken
    sys.argv[1:] = [recipe, "--stage", stage, "--workspace", workspace, *(word for o in overrides for word in ("--set", o))]
    return rank.main()


sys.exit(main(*sys.argv[1:]))
