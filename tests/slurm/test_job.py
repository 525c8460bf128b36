"""What slurm/job.sh does where SLURM itself fails; a function in the place of its command, no cluster."""

import os
import subprocess

import pytest

from ..e2e.tree import ROOT

JOB = """
set -euo pipefail
source "$SLURM_SUBMIT_DIR/slurm/job.sh"
scontrol() {
  echo "$*" >>"$ASKED"
  if [ "$(wc -l <"$ASKED")" -le "$FAILURES" ]; then echo "Unable to contact slurm controller (connect failure)" >&2; return 1; fi
}
sleep() { [ -z "$CANCELLED" ] || kill -TERM $$; }
again 30
"""


@pytest.mark.parametrize(
    ("failures", "cancelled", "asked", "said"),
    [
        (2, "", 4, "requeued, to start in 30 s at the earliest\n"),
        (30, "", 30, "graft: SLURM did not requeue job 5 in 30 attempts: submit it again"),
        (30, "meanwhile", 1, "Unable to contact slurm controller"),
    ],
)
def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, failures, cancelled, asked, said):
    environment = os.environ | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "5",
        "ASKED": str(tmp_path / "asked"),
        "FAILURES": str(failures),
        "CANCELLED": cancelled,
    }
    (tmp_path / "asked").touch()
    done = subprocess.run(["bash", "-c", JOB], env=environment, capture_output=True, text=True, timeout=60)
    calls = (tmp_path / "asked").read_text().splitlines()
    assert done.returncode == 75 and len(calls) == asked and calls[0] == "requeue 5", done.stderr
    assert said in done.stdout + done.stderr and ("requeued" in done.stdout) == (failures < 30)
