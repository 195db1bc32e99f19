#!/usr/bin/env bash
# One node's part of a command: torchrun with restarts, logs and an orderly end. Hyperparameters are in the YAML and key.path=value.
#   launch/node.sh COMMAND CONFIG.yaml [key.path=value ...]
# Exit 0: done, or asked to stop and saved; 2: something only the user can fix; else: failed. All settings are in the environment:
#
#   PROCESSES      of this node; as many as it has GPUs, 1 without
#   NODES          1                 NODE_RANK   this one's number from 0
#   RDZV_ENDPOINT  HOST:PORT on node 0, the same on all nodes; needed where NODES > 1
#   RDZV_ID        name of the job, the same on all nodes
#   LOCAL_ADDR     address of this node for the others, where its host name is not one
#   RESTARTS       how often ranks that died are started again from the last checkpoint (3)
#   LOG_DIR        a file for each rank goes here; `continue` when the run was stopped before its end, `user_error` when it was refused
#   PYTHON         python
# shellcheck disable=SC2329  # functions that traps call
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)  # paths of the user's are from where they stand
# shellcheck source=launch/resumable.sh
source "$launch/resumable.sh"
export PYTHONPATH=${launch%/*}${PYTHONPATH:+:$PYTHONPATH}

python=${PYTHON:-python}
nodes=${NODES:-1}
node_rank=${NODE_RANK:-0}
log_dir=${LOG_DIR:-out/logs/$(date +%Y%m%d-%H%M%S)-$$}
# Three: what passes (a lost link, a process taken by the kernel) seldom comes more often in one job; what does not should end it soon.
restarts=${RESTARTS:-3}
if [[ -z ${PROCESSES:-} ]]; then
    PROCESSES=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
    ((PROCESSES)) || PROCESSES=1
fi

# Defaults; what the environment sets already stays.
# Megatron-Core needs the order in which kernels are given to the GPU where communication runs beside the product it belongs to.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# NCCL says why it failed; it is silent otherwise.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# 4 us x 2^22, 17 s for each try: a link that flaps is waited for.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Threads of several ranks that spin on each other's cores slow down by an order of magnitude.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Ranks that are started again would otherwise meet in the store of the agent, which keeps the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Restarted ranks end at once when this file is there: nothing but the user can help.
export MOE2DENSE_USER_ERROR=$log_dir/user_error

command=$1
arguments=("${@:2}")
mkdir -p "$log_dir"
rm -f "$log_dir/continue" "$log_dir/user_error"

# Checks the configuration once, before anything is started.
resolved=$("$python" -m megatron_moe2dense "$command" "${arguments[@]}" --print-config)
output=$("$python" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["output"])' <<< "$resolved")
if [[ $command == distill && ${SLURM_RESTART_COUNT:-0} != 0 ]] && trained "$output"; then
    echo "kept: $output" >&2  # requeued, but nothing is left to do
    exit 0
fi

rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-moe2dense-$$}")
if ((nodes > 1)); then
    : "${RDZV_ENDPOINT:?HOST:PORT on node 0, the same on all nodes}" "${RDZV_ID:?a name of the job, the same on all nodes}"
    # The meeting point is no part of an agent, so that any of these can be lost.
    rendezvous+=(--rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-conf is_host=0)
    if ((node_rank == 0)); then
        "$python" "$launch/rendezvous.py" "${RDZV_ENDPOINT##*:}" &
        trap 'kill '$!' 2> /dev/null || true' EXIT
    fi
    [[ -z ${LOCAL_ADDR:-} ]] || rendezvous+=(--local-addr "$LOCAL_ADDR")
else
    rendezvous+=(--rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
fi
agent=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$PROCESSES" --max-restarts "$restarts"
    --log-dir "$log_dir/node_$node_rank" --redirects 3 --tee 0:3
    # Ranks end with their agent: those of a lost one would go on beside the ranks that replace them.
    --no-python setpriv --pdeathsig KILL)
run=("$python" -m megatron_moe2dense "$command" "${arguments[@]}")

stopping="" ended="" pid=""
ask_to_stop() { # again and again: ranks only listen once they train, and may be started anew meanwhile
    while kill -0 "$1" 2> /dev/null; do
        # shellcheck disable=SC2046  # numbers of processes
        kill -USR1 $(cat /proc/"$1"/task/*/children) 2> /dev/null || true
        sleep 5
    done
}
on_usr1() {
    [[ -z $stopping ]] || return 0
    stopping=yes
    echo "launch/node.sh: asked to stop" >&2
    if [[ $command == distill ]]; then
        ask_to_stop "$pid" &
    else
        kill -TERM "$pid"  # the others go on from their last part
    fi
}
on_term() {
    ended=yes
    kill -TERM "$pid" 2> /dev/null || true  # torchrun gives ranks 30 s to save
}
trap on_usr1 USR1
trap on_term TERM INT

for ((lost = 0; ; lost++)); do
    # USR1 is for those who listen to it; everyone else, torchrun first, would die of it.
    (trap '' USR1 && exec "${agent[@]}" "${run[@]}") &
    pid=$!
    status=0
    await "$pid" || status=$?
    # only an agent that was killed is started again: torchrun itself restarts ranks
    if ((status <= 128 || lost >= restarts)) || [[ -n $stopping$ended || -e $MOE2DENSE_USER_ERROR ]]; then
        break
    fi
    echo "launch/node.sh: torchrun was killed ($status), started again" >&2
done

if [[ -e $MOE2DENSE_USER_ERROR ]]; then
    cat "$MOE2DENSE_USER_ERROR" >&2
    exit 2
fi
if [[ -n $stopping && $status != 0 ]] || { [[ $status == 0 && $command == distill ]] && ! trained "$output"; }; then
    touch "$log_dir/continue"
fi
exit "$status"
