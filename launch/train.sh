#!/usr/bin/env bash
# One training stage on this machine, through `accelerate launch`: bash launch/train.sh RECIPE --stage sft [--set k=v]
# One process a GPU, two on a machine without one; GRAFT_PROCESSES, NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT override.
set -euo pipefail
exec "${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}" -m graft.train.launch "$@"
