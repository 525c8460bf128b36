#!/usr/bin/env bash
# The data stages of a recipe on this machine (Ray Data; RAY_ADDRESS joins a running cluster): bash launch/data.sh RECIPE
set -euo pipefail
exec "${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}" -m graft.cli run --data "$@"
