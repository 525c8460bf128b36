#!/usr/bin/env bash
# Read slurm/site.env, what differs by cluster. Sourced by job.sh in every job; `graft run --slurm` asks it:
#   bash slurm/site.sh       prints KEY=VALUE a line; what is wrong is one line and exit code 2
site_keys=(PARTITION CPU_PARTITION ACCOUNT QOS OPTIONS NODES GPUS_PER_NODE GPU TIME DATA_NODES DATA_TIME SERVE_TIME)
site_keys+=(MODULES PYTHON CONTAINER INTERFACE SCRATCH ENVIRONMENT RESTARTS BACKOFF_S LINGER_S)
declare -A site=()

site_read() { # fills `site`; 2 where a line is wrong
  local file="slurm/site.env" number=0 line key
  [ -f "$file" ] || return 0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    case "$line" in '' | '#'*) continue ;; esac
    key="${line%%=*}"
    if [ "$key" = "$line" ] || [[ " ${site_keys[*]} " != *" $key "* ]]; then
      echo "graft: $file, line $number: ${key@Q} is no key of it: known are ${site_keys[*]}, as KEY=VALUE without quotes" >&2
      return 2
    fi
    site[$key]="${line#*=}"
  done <"$file"
  for key in NODES DATA_NODES GPUS_PER_NODE RESTARTS BACKOFF_S LINGER_S; do
    if [[ ! "${site[$key]-0}" =~ ^[0-9]+$ ]] && [[ "$key" != *NODES || ! "${site[$key]}" =~ ^[0-9]+-[0-9]+$ ]]; then
      echo "graft: $file: $key=${site[$key]}: give a whole number$([[ "$key" != *NODES ]] || echo ", or a range such as 1-2")" >&2
      return 2
    fi
  done
}

site_enter() { # what a job needs of it, on the node and in all that it starts
  if [ -n "${site[MODULES]-}" ]; then
    # shellcheck disable=SC2086
    module load ${site[MODULES]} || { echo "graft: slurm/site.env: MODULES=${site[MODULES]} cannot be loaded on $(hostname)" >&2; return 2; }
  fi
  if [ -n "${site[PYTHON]-}" ]; then export GRAFT_PYTHON="${site[PYTHON]}"; fi
  if [ -n "${site[INTERFACE]-}" ]; then export NCCL_SOCKET_IFNAME="${site[INTERFACE]}" GLOO_SOCKET_IFNAME="${site[INTERFACE]}"; fi
  if [ -n "${site[SCRATCH]-}" ]; then export GRAFT_SCRATCH="${site[SCRATCH]}"; fi
  local pair
  for pair in ${site[ENVIRONMENT]-}; do
    export "${pair?}"
  done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  cd "$(dirname "$0")/.." || exit 2
  site_read || exit 2
  for key in "${!site[@]}"; do echo "$key=${site[$key]}"; done
fi
