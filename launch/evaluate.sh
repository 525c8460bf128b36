#!/usr/bin/env bash
# Evaluate the trained adapter of a recipe, on this machine: bash launch/evaluate.sh RECIPE
set -euo pipefail
exec "${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}" -m graft.cli run --only evaluate "$@"
