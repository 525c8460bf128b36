"""One rank of a training stage that goes wrong at a step: `accelerate launch hung.py HOW RANK STEP FILE RECIPE --stage sft …`; FILE is made then.

HOW: `sleeps` in Python for good, `holds` Python's lock in a call outside it, `raises` a ValueError, `refuses` by a TrainError.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

from graft.core.errors import TrainError
from graft.train import __main__, feed

how, rank, at, file = sys.argv[1:5]
sys.argv[1:5] = []
take = feed.Feed.take


def take_or_hang(self, step):
    if step == int(at) and os.environ["RANK"] == rank:
        Path(file).touch()
        if how == "sleeps":
            time.sleep(10**6)
        if how == "holds":
            ctypes.PyDLL(None).sleep(10**6)
        raise ValueError("of no use") if how == "raises" else TrainError("will not")
    return take(self, step)


feed.Feed.take = take_or_hang
sys.exit(__main__.main())
