#!/usr/bin/env bash
# One machine's part of a Ray cluster, for data stages on several nodes; stays in the foreground, Ctrl-C ends the node.
#   bash launch/ray.sh head             first machine; then: export RAY_ADDRESS=ITS_ADDRESS:6379 where `graft` runs
#   bash launch/ray.sh join ADDRESS     every other machine
# HOME (the token) and the workspace must be shared. OPENAI_API_KEY must be set here: callers run in this environment.
# RAY_PORT: the head's port. NODE_IP: this machine's address, where its name gives the wrong one. RAY_CPUS: fewer than all.
set -euo pipefail
ray="${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}"
ray="$(dirname "$ray")/ray"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
node=(--block --disable-usage-stats ${NODE_IP:+--node-ip-address="$NODE_IP"} ${RAY_CPUS:+--num-cpus="$RAY_CPUS"})
case "${1:-}" in
  head)
    "$ray" get-auth-token --generate >/dev/null
    chmod 600 "$HOME/.ray/auth_token"
    exec "$ray" start --head --port="${RAY_PORT:-6379}" --dashboard-host=127.0.0.1 "${node[@]}"
    ;;
  join)
    [ -r "$HOME/.ray/auth_token" ] || { echo "no $HOME/.ray/auth_token: start the head first, with the same HOME" >&2; exit 2; }
    exec "$ray" start --address="${2:?the address of the head: bash launch/ray.sh join ADDRESS:PORT}" "${node[@]}"
    ;;
  *)
    echo "usage: bash launch/ray.sh head | join ADDRESS:PORT" >&2
    exit 2
    ;;
esac
