#!/usr/bin/env bash
# One host, workers started by torchrun: the same program, the same arguments as `moetrain train`.
#
#   launch/local.sh [WORKERS] [overrides ...]
#   launch/local.sh 4 model=tiny parallel.ep=2 train.steps=50
set -euo pipefail

workers=2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  workers=$1
  shift
fi
bin=""
here=$(cd "$(dirname "$0")/.." && pwd)
if [[ -x "$here/.venv/bin/torchrun" ]]; then bin="$here/.venv/bin/"; fi

exec "${bin}torchrun" --standalone --nproc-per-node "$workers" -m moetrain train "$@"
