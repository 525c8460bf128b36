#!/usr/bin/env bash
# Merge the CPT adapter of a recipe into its base, on this machine: bash launch/merge.sh RECIPE
set -euo pipefail
exec "${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}" -m graft.cli run --only merge "$@"
