#!/usr/bin/env bash
# What every job of graft does, sourced by the sbatch scripts: the site, a log directory an attempt, warnings, and what is started again.
# A job leaves with 0 when all nodes did; it is requeued when it was warned (time limit, preemption) or when a node or a rank
# failed, RESTARTS times with a growing pause; what the recipe or the site is at fault for (exit code 2) is not tried again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this by sbatch}"
[ -f slurm/site.sh ] || { echo "graft: $PWD is not graft's project: run sbatch there" >&2; exit 2; }
# shellcheck source=slurm/site.sh
source slurm/site.sh
site_read || exit 2
site_enter || exit 2

# once a node; said here, for a job that says it gets the fewest nodes of a range
once=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none)
linger_s="${site[LINGER_S]:-60}" # a node that is lost keeps srun waiting, --wait notwithstanding; so both look at the time
EARLY_S=20       # who is asked to leave sooner after the start than this has failed, as far as RESTARTS goes
REQUEUE_TRIES=30 # 10 s apart
KILLED="137 143 130"

# on each node before anything else. $1: the attempt's folder
# shellcheck disable=SC2016
look='[ "$(cat "$1/attempt" 2>/dev/null)" = "$GRAFT_ATTEMPT" ] || {
  echo "graft: $SLURMD_NODENAME does not see $1 as the first node wrote it: the project must lie on a file system that all nodes share" >&2
  exit 2
}'

# what runs on each node. $1: the attempt's folder; the rest: the command
# shellcheck disable=SC2016
on_node='folder="$1"; shift
trap : USR2 TERM
NODE_RANK="$SLURM_NODEID" "$@" &
command=$!
while :; do
  if wait "$command"; then code=0; else code=$?; fi
  kill -0 "$command" 2>/dev/null || break
done
echo "$code" >"$folder/$SLURM_NODEID.code"
exit "$code"'

free_port() { # from the job's own stretch of ports, so that jobs that share a node do not meet; Ray's workers take 10002 to 19999
  local port=$((20000 + SLURM_JOB_ID % 1000 * 10)) last
  last=$((port + 10))
  while [ "$port" -lt "$last" ]; do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    port=$((port + 1))
  done
  echo "graft: ports $((last - 10)) to $((last - 1)) of $(hostname) are taken: set MASTER_PORT in ENVIRONMENT of slurm/site.env" >&2
  return 2
}

over_nodes() { # COMMAND …, once a node; ends the job's script
  local attempt="${SLURM_RESTART_COUNT:-0}" logs="slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
  local folder="$logs/attempt-$attempt" failures="$logs/failures" left=0 code=0 began failed
  step='' warned='' ended=''
  trap 'warned=1; tell USR2' USR2
  trap 'ended=1; tell TERM' TERM
  mkdir -p "$folder"
  ln -sfn "attempt-$attempt" "$logs/latest"
  export GRAFT_ATTEMPT="$SLURM_JOB_ID.$attempt" GRAFT_JOB_DIR="$folder" NUM_NODES="$SLURM_JOB_NUM_NODES" MASTER_ADDR MASTER_PORT
  MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  if [ -z "${MASTER_PORT-}" ]; then MASTER_PORT="$(free_port)" || exit 2; fi
  echo "$GRAFT_ATTEMPT" >"$folder/attempt"
  began="$(date +%s)"
  echo "$began $SLURM_JOB_NODELIST" >"$folder/nodes"
  echo "attempt $attempt on $SLURM_JOB_NODELIST, log $folder/nodes.log"
  srun "${once[@]}" --mem=0 --input=none bash -c "$look" _ "$PWD/$folder" || code=$?
  if [ -n "$warned" ]; then code=75; elif [ "$code" = 0 ]; then run_nodes "$folder" "$@"; fi
  echo "$code" >"$folder/code"
  [ "$code" != 0 ] || exit 0
  echo "attempt $attempt ended with $code"
  if [ -n "$ended" ] || [ "$code" = 2 ]; then exit "$code"; fi
  # a limit shorter than a start would requeue for ever
  if [ "$code" = 75 ] && [ $(($(date +%s) - began)) -ge "$EARLY_S" ]; then again 0; fi
  echo "$GRAFT_ATTEMPT $code" >>"$failures"
  failed="$(wc -l <"$failures")"
  if [ "$failed" -gt "${site[RESTARTS]:-5}" ]; then
    echo "graft: given up after $failed failed attempts: look into $logs" >&2
    exit "$code"
  fi
  again $((${site[BACKOFF_S]:-30} * (1 << (failed - 1))))
}

tell() { # SIGNAL, to all nodes
  if [ -n "$step" ]; then kill -"$1" "$step" 2>/dev/null || true; fi
}

run_nodes() { # FOLDER COMMAND …; sets `code`
  local folder="$1"
  shift
  # shellcheck disable=SC2086
  srun "${once[@]}" --kill-on-bad-exit=0 --wait="$linger_s" --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --label --output="$folder/nodes.log" \
    ${site[CONTAINER]-} bash -c "$on_node" _ "$folder" "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    pause 1
    if [ -n "$(codes "$folder")" ]; then left=$((left + 1)); fi
    if [ "$left" -gt "$linger_s" ]; then
      echo "some node has not left $linger_s s after another did: not waiting for it"
      kill -KILL "$step" 2>/dev/null || true # it may have left since we looked
    fi
  done
  if wait "$step"; then code=0; else code=$?; fi
  grep -h '^[0-9]*: graft: ' "$folder/nodes.log" 2>/dev/null | sed 's/^[0-9]*: //' | sort -u || true
  code="$(verdict "$(codes "$folder")" "$code")"
}

codes() { cat "$1"/[0-9]*.code 2>/dev/null | sort -u | tr '\n' ' ' || true; }

verdict() { # of the nodes' exit codes and srun's: a refusal outweighs a wish to go on, which outweighs a failure
  local found=" $1" code
  for code in 2 75; do
    if [[ "$found" == *" $code "* ]]; then echo "$code"; return; fi
  done
  if [ "$2" = 2 ]; then echo 2; return; fi # before a node could say so itself
  for code in $1; do
    if [ "$code" != 0 ] && [[ " $KILLED " != *" $code "* ]]; then echo "$code"; return; fi
  done
  echo "$2"
}

again() { # after $1 seconds, on nodes that are then free
  local tries=1 ended=''
  trap 'ended=1' TERM # from the requeue itself, or, while that was not heard, from who cancels the job
  until scontrol requeue "$SLURM_JOB_ID"; do # slurmctld may be starting anew, or moving to its backup
    if [ "$tries" = "$REQUEUE_TRIES" ]; then
      echo "graft: SLURM did not requeue job $SLURM_JOB_ID in $tries attempts: submit it again, it goes on where it was" >&2
      exit 75
    fi
    tries=$((tries + 1))
    pause 10
    [ -z "$ended" ] || exit 75
  done
  echo "requeued$([ "$1" = 0 ] || echo ", to start in $1 s at the earliest")"
  if [ "$1" -gt 0 ]; then scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$1" || true; fi
  pause 30 # until the job is taken away: a script that ends by itself would count as its end
  exit 75
}

pause() { # SECONDS, less where a signal comes: bash hears of it only while it waits so
  sleep "$1" &
  wait "$!" || true
}
