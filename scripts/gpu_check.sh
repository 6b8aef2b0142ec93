#!/usr/bin/env bash
# What one GPU can show, in one command, about nine minutes, and without a network (docs/gpu.md). Results for people go
# to docs/results/DEVICE/; they and all that was said and traced to one archive. Nothing is installed for good: packages
# that are missing come out of the wheels that scripts/gpu_wheels.sh collected in .whl/, into a temporary folder.
#   scripts/gpu_check.sh [ARCHIVE]           default: $OUT/gpu_check.tar.gz, without OUT runs/gpu_check.tar.gz
#   scripts/gpu_check.sh --rehearse          every part, tiny, on a machine without a GPU
#   scripts/gpu_check.sh --parts step tests  those parts alone; see docs/gpu.md for their names
#   PYTHON=.venv/bin/python scripts/gpu_check.sh; WHEELS=FOLDER scripts/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d -t gpu_check-XXXXXX)
trap 'rm -rf "$work"' EXIT

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c 'import hydra, pydantic' 2>"$work/missing"; then
    echo "$(tail -n 1 "$work/missing"): taking ${WHEELS:=.whl}/*.whl"
    for wheel in "$WHEELS"/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$work/packages" # all that installing them would do, with or without pip
    done
    export PYTHONPATH=$PYTHONPATH:$work/packages
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo # where the host's own name does not resolve
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True} # layers of very unequal sizes
export XDG_CACHE_HOME=$work/cache # costs are measured anew
"$PYTHON" scripts/gpu_check.py "$work" "$@"
