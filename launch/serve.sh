#!/usr/bin/env bash
# Serve a finished recipe on this machine until Ctrl-C: bash launch/serve.sh RECIPE [--port N]
#   bash launch/serve.sh --probe RECIPE      start it, ask it, record the reply, and end
set -euo pipefail
python="${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}"
if [ "${1-}" = --probe ]; then exec "$python" -m graft.cli run --only serve "${@:2}"; fi
exec "$python" -m graft.cli serve "$@"
