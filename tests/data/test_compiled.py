"""Machine code is loaded where another process has compiled it, and compiled anew where nothing can be kept."""

import os
import subprocess
import sys

import pytest

MODULE = """
from graft.data.compiled import compiled

@compiled
def add(a, b):
    return a + b

print(add(1, 2), sum(add.stats.cache_hits.values()))
"""


@pytest.mark.parametrize(("kept", "says"), [(True, ["3 0", "3 1"]), (False, ["3 0", "3 0"])])
def test_where_the_cache_is(tmp_path, kept, says):
    (tmp_path / "sums.py").write_text(MODULE)
    if not kept:
        (tmp_path / "__pycache__").touch()  # no folder can be made beside the source, nor below a file
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | nowhere
    for line in says:
        done = subprocess.run([sys.executable, "-c", "import sums"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == line
