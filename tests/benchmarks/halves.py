"""What tests of benchmarks in two halves share: a Python where nothing of the data stages is installed, as where the GPU is."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABSENT = ("ray", "numba", "orjson", "datasets")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{{name}} is not for trainers", name=name)
sys.meta_path.insert(0, Blocker())
"""


def without_data_stages(folder: Path) -> dict[str, str]:
    """The environment of such a Python; `folder` gets what makes it one."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run([sys.executable, "-c", "import ray"], env=environment, capture_output=True).returncode == 1
    return environment


def problem(rng: random.Random) -> dict[str, str]:
    """A row like GSM8K's."""
    name, other = rng.sample(["Ann", "Ben", "Cid", "Dora", "Eve", "Finn", "Gus", "Hana"], 2)
    thing, place = rng.choice(["apples", "pens", "coins", "stones", "shells", "cards"]), rng.choice(["home", "the shop", "school", "the river"])
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    question = f"{name} has {a} {thing}. {other} gives {name} {b} more at {place}. How many {thing} does {name} have now?"
    return {"question": question, "answer": f"{name} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {thing} at {place}.\n#### {a + b}"}
