#!/usr/bin/env bash
# Trains a recipe on several hosts without a scheduler. Run the same line on every host:
#   HOSTS=2 FIRST_HOST=10.0.0.1 launch/hosts.sh [--dry-run] RECIPE.yaml [any flag of Megatron or megatron-sfr]
# Ctrl-C or SIGTERM on one host leaves a checkpoint and ends the run on all of them. See docs/cluster.md.
set -euo pipefail

# ---- site: edit these, or set them in the environment ----
PYTHON=${PYTHON:-.venv/bin/python}   # of the environment that has megatron-sfr, on every host
HOSTS=${HOSTS:-2}                    # number of hosts
FIRST_HOST=${FIRST_HOST:-localhost}  # name or address of one of them, which all hosts reach
PORT=${PORT:-29500}                  # of the rendezvous, on the first host
NPROC=${NPROC:-}                     # processes of this host; empty: one for each GPU
RUN_ID=${RUN_ID:-megatron-sfr}       # distinguishes runs that share the first host and the port
LOCAL_ADDR=${LOCAL_ADDR:-}           # this host's address, if its own name does not lead to it; the first's is FIRST_HOST
INTERFACE=${INTERFACE:-}             # network interface for the rendezvous and gloo, if the default is wrong
MAX_RESTARTS=${MAX_RESTARTS:-3}      # how often this host's processes restart from the last checkpoint after a failure
REJOIN_S=${REJOIN_S:-1800}           # seconds that the others wait for a host that was lost
GRACE_S=${GRACE_S:-600}              # seconds for the last checkpoint after SIGTERM or Ctrl-C
# ----------------------------------------------------------

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
RECIPE=${1:?usage: launch/hosts.sh [--dry-run] RECIPE.yaml [flags]}
shift
[[ -r $RECIPE ]] || { echo "$RECIPE: no such recipe" >&2; exit 2; }
if [[ -z $NPROC ]]; then
    NPROC=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    ((NPROC > 0)) || { echo "no GPU found: say how many processes share the CPU, for example NPROC=2" >&2; exit 2; }
fi

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # up to Hopper, Megatron asks for 1 with TP
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE_S # torchrun's --shutdown-timeout; before torch 2.12 it is always 30
if [[ $INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi

# torchrun restarts nothing, this script does: a new agent of the first host opens a new rendezvous.
RENDEZVOUS="join_timeout=$REJOIN_S,read_timeout=$REJOIN_S"
DISTRIBUTED_ARGS=(
    --nnodes "$HOSTS"
    --nproc-per-node "$NPROC"
    --rdzv-id "$RUN_ID"
    --rdzv-backend c10d
    --rdzv-endpoint "$FIRST_HOST:$PORT"
    --max-restarts 0
)
if [[ $LOCAL_ADDR ]]; then # or torchrun compares FIRST_HOST with this host's name and its addresses
    IS_HOST=$([[ $LOCAL_ADDR == "$FIRST_HOST" ]] && echo 1 || echo 0)
    DISTRIBUTED_ARGS+=(--local-addr "$LOCAL_ADDR" --rdzv-conf "$RENDEZVOUS,is_host=$IS_HOST")
else
    DISTRIBUTED_ARGS+=(--rdzv-conf "$RENDEZVOUS")
fi
MODEL_ARGS=(--recipe "$RECIPE") # shape, layout and precision are in the recipe
DATA_ARGS=()                    # for example: --train-data-path /data/personas/train
TRAINING_ARGS=(--exit-signal-handler "$@")
COMMAND=(
    "$PYTHON" -m megatron_sfr.agent "${DISTRIBUTED_ARGS[@]}"
    -m megatron_sfr.train "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}"
)
if [[ $DRY_RUN ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi

FINISHED=0 USER_ERROR=2 STOPPED=143 # exit codes of megatron_sfr.agent
for ((attempt = 0; ; attempt++)); do
    "$PYTHON" -m megatron_sfr.runtime.lifetime $$ "${COMMAND[@]}" & # it ends with this script
    trap "kill -TERM $! 2>/dev/null; attempt=$MAX_RESTARTS" TERM INT HUP
    code=0
    while kill -0 $! 2>/dev/null; do wait $! && code=0 || code=$?; done
    case $code in "$FINISHED" | "$USER_ERROR" | "$STOPPED") exit "$code" ;; esac
    if ((attempt >= MAX_RESTARTS)); then exit "$code"; fi
    echo "attempt $attempt failed (exit code $code): restart $((attempt + 1)) of $MAX_RESTARTS from the last checkpoint" >&2
done
