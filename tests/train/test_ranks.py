"""What a rank loads before it trains."""

import subprocess
import sys

CODE = """
import sys
from deepspeed.runtime import compiler
from graft.train.ranks import _import_muon

usual = compiler.compile
_import_muon()
assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules and compiler.compile is usual
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_deepspeeds_muon_loads_no_compiler():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
