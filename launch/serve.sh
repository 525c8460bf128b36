#!/usr/bin/env bash
# Serve a finished recipe on this machine until Ctrl-C: bash launch/serve.sh RECIPE [--port N]
set -euo pipefail
exec "${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}" -m graft.cli serve "$@"
