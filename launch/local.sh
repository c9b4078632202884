#!/usr/bin/env bash
# Trains a recipe on this one machine:  launch/local.sh [--dry-run] RECIPE.yaml [any flag of Megatron or megatron-sfr]
# The same as `megatron-sfr train`, without its progress bar. Adapt it for your own launcher.
set -euo pipefail

# ---- site: edit these, or set them in the environment ----
PYTHON=${PYTHON:-.venv/bin/python}   # of the environment that has megatron-sfr
NPROC=${NPROC:-}                     # processes; empty: one for each GPU
MAX_RESTARTS=${MAX_RESTARTS:-0}      # how often all processes restart from the last checkpoint after a failure
GRACE_S=${GRACE_S:-600}              # seconds for the last checkpoint after SIGTERM or Ctrl-C
# ----------------------------------------------------------

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
RECIPE=${1:?usage: launch/local.sh [--dry-run] RECIPE.yaml [flags]}
shift
[[ -r $RECIPE ]] || { echo "$RECIPE: no such recipe" >&2; exit 2; }
if [[ -z $NPROC ]]; then
    NPROC=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    ((NPROC > 0)) || { echo "no GPU found: say how many processes share the CPU, for example NPROC=2" >&2; exit 2; }
fi

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # up to Hopper, Megatron asks for 1 with TP
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE_S # torchrun's --shutdown-timeout; before torch 2.12 it is always 30
if ((MAX_RESTARTS > 0)); then
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a separate store for each attempt: pytorch/pytorch#135712
fi

DISTRIBUTED_ARGS=(
    --standalone
    --nproc-per-node "$NPROC"
    --max-restarts "$MAX_RESTARTS"
)
MODEL_ARGS=(--recipe "$RECIPE") # shape, layout and precision are in the recipe
DATA_ARGS=()                    # for example: --train-data-path /data/personas/train
TRAINING_ARGS=(--exit-signal-handler "$@")

COMMAND=(
    "$PYTHON" -m torch.distributed.run "${DISTRIBUTED_ARGS[@]}"
    -m megatron_sfr.train "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}"
)
if [[ $DRY_RUN ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi
exec "${COMMAND[@]}"
