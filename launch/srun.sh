#!/usr/bin/env bash
# A command on all nodes of a Slurm allocation, launch/node.sh on each: launch/srun.sh COMMAND CONFIG.yaml [key.path=value ...]
# distill.slurm and calibrate.slurm start it; inside another batch script it is a LAUNCHER of launch/reproduce.sh. SIGUSR1 stops the
# run with a checkpoint, and a job that was stopped before its end is requeued; one that failed or was refused is not.
#
#   LOG_DIR              shared by the nodes and seen here; out/logs/JOB.RESTARTS by default: node_<n>.txt and a file for each rank
#   REQUEUE              0: never
#   CONTAINER_IMAGE      with pyxis: the image, and what is mounted in it, FROM:TO,...; paths are those inside. Its working directory
#   CONTAINER_MOUNTS       has to be this checkout (docker/Dockerfile), with out/ mounted
#   also the variables of launch/node.sh
# shellcheck disable=SC2329  # functions that traps call
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)  # paths of the user's are from where they stand
# shellcheck source=launch/resumable.sh
source "$launch/resumable.sh"

: "${SLURM_JOB_ID:?this script runs inside a Slurm allocation}" "${SLURM_JOB_NODELIST:?}"
export NODES=${SLURM_JOB_NUM_NODES:-1} RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export LOG_DIR=${LOG_DIR:-out/logs/$RDZV_ID}
if ((NODES > 1)); then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Jobs that share a node get other ports; below the range from which systems hand out their own.
    export RDZV_ENDPOINT=${RDZV_ENDPOINT:-${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))}
fi
container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=(--container-image "$CONTAINER_IMAGE")
    launch=launch
    [[ -z ${CONTAINER_MOUNTS:-} ]] || container+=(--container-mounts "$CONTAINER_MOUNTS")
elif [[ -n ${CONTAINER_MOUNTS:-} ]]; then
    echo "launch/srun.sh: CONTAINER_MOUNTS without CONTAINER_IMAGE would have no effect" >&2
    exit 2
fi
mkdir -p "$LOG_DIR"
rm -f "$LOG_DIR/continue" "$LOG_DIR/user_error"

asked="" cancelled="" pid=""
on_usr1() {
    asked=yes
    kill -USR1 "$pid" 2> /dev/null || true  # srun passes it on to its tasks
}
on_term() { # cancelled, or preempted: then Slurm itself requeues
    cancelled=yes
    kill -TERM "$pid" 2> /dev/null || true
}
trap on_usr1 USR1
trap on_term TERM

# What rank 0 says, wherever torchrun put it, goes to the job's own output too: its loss among it.
echo "launch/srun.sh: output of each node and rank in $LOG_DIR"
files=()
for ((node = 0; node < NODES; node++)); do
    files+=("$LOG_DIR/node_$node.txt")
    : >> "${files[node]}"
done
tail -q -n 0 -F "${files[@]}" 2> /dev/null &
follower=$!
trap 'sleep 1; kill $follower 2> /dev/null || true' EXIT

# All cores of the node and its memory: since Slurm 22.05 a step has one core a task unless it asks.
resources=(--mem 0)
[[ -z ${SLURM_CPUS_ON_NODE:-} ]] || resources+=(--cpus-per-task "$SLURM_CPUS_ON_NODE")
# One task a node, which says its number; when one fails for good the others have nobody to work with.
# shellcheck disable=SC2016  # on the node
srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 "${resources[@]}" "${container[@]}" \
    --output "$LOG_DIR/node_%n.txt" --open-mode append \
    bash -c 'NODE_RANK=$SLURM_NODEID exec "$0/node.sh" "$@"' "$launch" "$@" &
pid=$!
status=0
await "$pid" || status=$?

if [[ -e $LOG_DIR/user_error ]]; then
    cat "$LOG_DIR/user_error" >&2
    exit 2
fi
if [[ $status == 2 || -n $cancelled || ${REQUEUE:-1} == 0 ]]; then
    exit "$status"
fi
if [[ -e $LOG_DIR/continue || ( -n $asked && $status != 0 ) ]]; then
    echo "launch/srun.sh: stopped before its end, requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
