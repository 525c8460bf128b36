"""One rank of a training stage where chosen steps go wrong: `accelerate launch poisoned.py RECIPE WORKSPACE WRONG OVERRIDE…`.

WRONG is JSON, {step: what}: "nan" is a loss of one rank that is none, "gradient" a gradient, 30.0 a loss so many times as high.
"""

import json
import math
import os
import sys

from graft.train import __main__ as rank
from graft.train import loop
from graft.train.feed import Feed


def main(recipe, workspace, wrong, *overrides):
    wrong, at = {int(step): what for step, what in json.loads(wrong).items()}, None
    take, build = Feed.take, loop.build

    def taken(feed, step):
        nonlocal at
        at = step
        return take(feed, step)

    def spoil(module, given, loss):
        what = wrong.get(at)
        if what == "nan" and os.environ["RANK"] == "1":
            return loss * math.nan
        if what == "gradient" and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss * what if isinstance(what, float) else loss

    def built(*given):
        model = build(*given)
        model.register_forward_hook(spoil)
        return model

    Feed.take, loop.build = taken, built
    sys.argv[1:] = [recipe, "--stage", "sft", "--workspace", workspace, *(word for o in overrides for word in ("--set", o))]
    return rank.main()


sys.exit(main(*sys.argv[1:]))
