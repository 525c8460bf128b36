#!/usr/bin/env bash
# One machine's part of a Ray cluster, for data stages on several nodes; stays in the foreground, Ctrl-C ends the node.
#   bash launch/ray.sh head             first machine; then: export RAY_ADDRESS=ITS_ADDRESS:6379 where `graft` runs
#   bash launch/ray.sh join ADDRESS     every other machine
#   bash launch/ray.sh over COMMAND …   on all machines at once: the first runs the command, all end with it
# HOME (the token) and the workspace must be shared. OPENAI_API_KEY must be set here: callers run in this environment.
# RAY_PORT: the head's port. NODE_IP: this machine's address, where its name gives the wrong one. RAY_CPUS: fewer than all.
# over: NODE_RANK, NUM_NODES, MASTER_ADDR and MASTER_PORT say which machine this is, GRAFT_JOB_DIR is a folder that all of them share;
# the cluster has a token and ports of its own. GRAFT_SCRATCH: a fast disk for Ray's files, which go at the end.
set -euo pipefail
ray="${GRAFT_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}"
ray="$(dirname "$ray")/ray"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
node=(--disable-usage-stats ${NODE_IP:+--node-ip-address="$NODE_IP"} ${RAY_CPUS:+--num-cpus="$RAY_CPUS"})
case "${1:-}" in
  head)
    "$ray" get-auth-token --generate >/dev/null
    chmod 600 "$HOME/.ray/auth_token"
    exec "$ray" start --block --head --port="${RAY_PORT:-6379}" --dashboard-host=127.0.0.1 "${node[@]}"
    ;;
  join)
    [ -r "$HOME/.ray/auth_token" ] || { echo "no $HOME/.ray/auth_token: start the head first, with the same HOME" >&2; exit 2; }
    exec "$ray" start --block --address="${2:?the address of the head: bash launch/ray.sh join ADDRESS:PORT}" "${node[@]}"
    ;;
  over) shift ;;
  *)
    echo "usage: bash launch/ray.sh head | join ADDRESS:PORT | over COMMAND …" >&2
    exit 2
    ;;
esac

folder="$PWD/${GRAFT_JOB_DIR:?a folder that all machines share}"
address="${MASTER_ADDR:?}:${MASTER_PORT:?}" dashboard=$((MASTER_PORT + 1))
# mode 0600; by its path, for what Ray starts later does not find it in the environment
export RAY_AUTH_TOKEN_PATH="$folder/ray-token" RAY_ADDRESS="$address"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # there is nowhere to move to: the head would wait 30 s for its own end
# the head's, of the same name on all machines; short: sockets' paths have a limit of 107 bytes
files="${GRAFT_SCRATCH:-/tmp}/ray-$(cksum <<<"$folder" | cut -d ' ' -f 1)"
daemon='' command=''

below() { # PID: all that descends from it
  local child
  for child in $(pgrep -P "$1"); do
    echo "$child"
    below "$child"
  done
}

clean() {
  if [ -n "$daemon" ]; then
    started="$(below "$daemon")"
    kill -TERM "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    # Ray's agents would try for a minute to report their raylet's end
    # shellcheck disable=SC2086
    kill -KILL $started 2>/dev/null || true
  fi
  rm -rf "$files"
  if [ "$NODE_RANK" = 0 ]; then rm -f "$RAY_AUTH_TOKEN_PATH"; fi
}
trap clean EXIT
asked() { # a warning from the scheduler: stages lose nothing, they go on where they were
  asked=1
  rm -f "$RAY_AUTH_TOKEN_PATH" # now: the time until SIGKILL may not suffice for the rest
  if [ -n "$command" ]; then kill -TERM "$command" 2>/dev/null || true; fi
}
trap asked USR2 TERM
asked=''

until_ends() { # PID: its exit code, whatever signals come meanwhile
  local code
  while :; do
    if wait "$1"; then code=0; else code=$?; fi
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

if [ "$NODE_RANK" = 0 ]; then
  (umask 077 && head -c 32 /dev/urandom | base64 -w 0 >"$RAY_AUTH_TOKEN_PATH.new" && mv "$RAY_AUTH_TOKEN_PATH.new" "$RAY_AUTH_TOKEN_PATH")
  mkdir -m 700 "$files"
  "$ray" start --block --head --port="$MASTER_PORT" --temp-dir="$files" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --ray-client-server-port=$((MASTER_PORT + 2)) "${node[@]}" >"$folder/ray-0.log" 2>&1 &
  daemon=$!
  echo "Ray's dashboard: ssh -L 8265:127.0.0.1:$dashboard ${USER:-$(id -un)}@$MASTER_ADDR, then http://127.0.0.1:8265"
  deadline=$((SECONDS + ${RAY_JOIN_S:-120}))
  until [ "$(cat "$folder"/ray-[0-9]*.log 2>/dev/null | grep -c 'Ray runtime started')" -ge "${NUM_NODES:?}" ]; do
    kill -0 "$daemon" 2>/dev/null || { echo "graft: Ray did not start on $MASTER_ADDR: see $folder/ray-0.log" >&2; exit 1; }
    [ "$SECONDS" -lt "$deadline" ] || { echo "graft: not all of $NUM_NODES machines joined Ray within ${RAY_JOIN_S:-120} s: see $folder" >&2; exit 1; }
    sleep 1
  done
  "${@}" &
  command=$!
  if until_ends "$command"; then code=0; else code=$?; fi
  if [ -n "$asked" ]; then code=75; fi
  echo "$code" >"$folder/command.code"
  exit "$code"
fi

until [ -r "$RAY_AUTH_TOKEN_PATH" ] && (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
  [ ! -e "$folder/command.code" ] || exit 0
  sleep 0.5
done
"$ray" start --block --address="$address" "${node[@]}" >"$folder/ray-$NODE_RANK.log" 2>&1 &
daemon=$!
until [ -e "$folder/command.code" ]; do
  if ! kill -0 "$daemon" 2>/dev/null && [ ! -e "$folder/command.code" ]; then
    echo "graft: Ray ended on $(hostname): see $folder/ray-$NODE_RANK.log" >&2
    exit 1
  fi
  sleep 1 &
  wait "$!" || true
done
